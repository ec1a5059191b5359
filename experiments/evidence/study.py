"""What a study is: a question, figures and claims that its frame supports, or contradicts."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from experiments.archive.tables import Collected

if TYPE_CHECKING:
    from matplotlib.figure import Figure


PACKAGE = "experiments.studies"
VERDICTS = ("supported", "contradicted", "undecided", "checked")


@dataclass(frozen=True)
class Claim:
    """A sentence that the data decide.

    ``says`` is what is claimed, ``holds`` whether the data support it (None: they cannot tell), ``because`` the numbers
    with their errors, read from the frame.  ``identity``: it is a theorem, held against rounding, so that it says the
    code is right and nothing of the world; it is counted apart.
    """

    says: str
    holds: bool | None
    because: str
    identity: bool = False

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`: an identity that holds is checked, not supported."""
        if self.identity and self.holds:
            return "checked"
        return {True: "supported", False: "contradicted", None: "undecided"}[self.holds]


class Study(Protocol):
    """A module of `experiments.studies`, by the name of its configuration in conf/study.

    In ``METHOD`` and ``HOW_SURE`` a field such as ``{model.depth}`` stands for that key of the configuration, and
    ``{num_seeds}`` for the number of seeds; `experiments.reports.pages` fills them in.  Optional: ``RESULTS``,
    the study whose runs are read; ``condensed``, what is kept of them; and ``CAPTIONS``, words under figures by name,
    whose first sentence, without brackets, is read to those who do not see them.
    """

    QUESTION: str
    """The question, as the title of its page."""
    METHOD: str
    """What is measured and how, with formulas and references; Markdown."""
    HOW_SURE: str
    """What the error bars are of, and what the answer does not cover; Markdown."""

    def figures(self, collected: Collected) -> dict[str, Figure]:
        """Figures by the name of their file; the first stands for the study."""

    def claims(self, collected: Collected) -> list[Claim]:
        """What was claimed, decided."""

    def answer(self, collected: Collected) -> str:
        """The answer in a few sentences, its numbers read from the frame; Markdown."""


def names() -> list[str]:
    """Every study that has a page."""
    package = importlib.import_module(PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def find(name: str) -> Study | None:
    """The study of that name; None where a name has runs or a configuration only."""
    if name not in names():
        return None
    return cast(Study, importlib.import_module(f"{PACKAGE}.{name}"))


def results(name: str) -> str:
    """The study whose runs it reads: its own, unless it says ``RESULTS``."""
    return getattr(find(name), "RESULTS", name)


def reader(name: str) -> str:
    """The study that these runs are for: that of their name, or the one whose ``RESULTS`` they are."""
    return name if name in names() else next((other for other in names() if results(other) == name), name)


def condensed(name: str, collected: Collected) -> Collected:
    """What a study keeps of its runs: everything, unless it has a function ``condensed``, for frames of many steps."""
    return getattr(find(name), "condensed", lambda everything: everything)(collected)


def evenly(depth: int, num: int) -> list[int]:
    """Numbers of so many layers, or all there are, at equal distances; the last one is the last layer."""
    return [-(-depth * n // num) - 1 for n in range(1, num + 1)] if num < depth else list(range(depth))
