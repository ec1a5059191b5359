"""A study: a question, how it was measured, figures, and claims that the data decide."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from experiments.archive.tables import Collected

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGE = "experiments.studies"
VERDICTS = ("supported", "contradicted", "undecided", "checked")


@dataclass(frozen=True)
class Claim:
    """A sentence that the data support, contradict or leave undecided.

    Arguments:
        says: The sentence, without the full stop.
        holds: Whether the data support the claim; None if they cannot decide.
        because: The numbers that decide, with their intervals, read from the frame.
        identity: The claim is a theorem, tested up to rounding. It checks the code, so it is counted separately.
    """

    says: str
    holds: bool | None
    because: str
    identity: bool = False

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`. An identity that holds is "checked"."""
        if self.identity and self.holds:
            return "checked"
        return {True: "supported", False: "contradicted", None: "undecided"}[self.holds]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What `experiments.studies.NAME.STUDY` must provide. NAME is also the name of a configuration in conf/study.

    The texts are Markdown. In ``use``, ``method`` and ``how_sure`` a field such as ``{model.depth}`` stands for that
    key of the configuration, and ``{num_seeds}`` for the number of seeds.

    Arguments:
        question: The title of the page.
        answer: At most three sentences, with numbers read from the frame.
        use: What the reader can do with the answer.
        method: What is measured and how, with formulas and references.
        how_sure: What the error bars cover, and what the answer does not cover.
        claims: The claims of the study, each with the verdict of the data.
        figures: Figures by file name; the first one illustrates the answer.
        captions: A caption for every figure of the page, by name. Its first sentence is the alternative text.
        details: Tables, and sentences for which the answer has no room.
        results: The sweep whose runs are read, if its name is not the name of the study.
        condensed: Reduces the collected runs to what the study reads; needed if every training step has its own rows.
    """

    question: str
    answer: Callable[[Collected], str]
    use: str = ""
    method: str
    how_sure: str
    claims: Callable[[Collected], list[Claim]]
    figures: Callable[[Collected], dict[str, Figure]]
    captions: Mapping[str, str] = field(default_factory=dict)
    details: Callable[[Collected], str] | None = None
    results: str | None = None
    condensed: Callable[[Collected], Collected] = lambda collected: collected


def names() -> list[str]:
    """The names of all studies."""
    package = importlib.import_module(PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def find(name: str) -> Study | None:
    """The study of this name, or None if only a sweep has the name."""
    if name not in names():
        return None
    found = importlib.import_module(f"{PACKAGE}.{name}").STUDY
    assert isinstance(found, Study), f"{PACKAGE}.{name}.STUDY must be a Study, got {type(found).__name__}."
    return found


def results(name: str) -> str:
    """The sweep whose runs the study reads."""
    asked = find(name)
    return name if asked is None or asked.results is None else asked.results


def reader(name: str) -> str:
    """The study that reads the runs of the sweep ``name``; ``name`` itself if there is no such study."""
    return name if name in names() else next((other for other in names() if results(other) == name), name)


def condensed(name: str, collected: Collected) -> Collected:
    """The collected runs, reduced to what the study reads."""
    return asked.condensed(collected) if (asked := find(name)) else collected


def evenly(depth: int, num: int) -> list[int]:
    """Indices of ``num`` of ``depth`` layers, equally spaced up to the last one; all layers if there are fewer."""
    return [-(-depth * n // num) - 1 for n in range(1, num + 1)] if num < depth else list(range(depth))
