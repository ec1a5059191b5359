"""The pages of studies in docs/studies. Every number on a page is read from the frame or the manifest."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from experiments.archive.tables import Collected
from experiments.evidence.study import VERDICTS, Claim, Study, results
from experiments.evidence.words import listed, table
from experiments.program import program
from experiments.reports.claims import claim_list
from gradscope.files import printable, written

LEGEND = (
    "Each row counts the claims of a study that the data support, contradict, or leave undecided. Identities are "
    "theorems, tested up to rounding. They check the code, so they are counted separately. The page of a study lists "
    "its claims, each with what was measured."
)
INTRODUCTION = (
    "GSC is the gradient scale coefficient ([glossary](../glossary.md)). Brackets after a number contain its "
    "95 % interval. The page of a study explains its networks, signals and other terms."
)
NOTICE = "<!-- Written by python -m experiments.figures; edit experiments/studies instead. -->"
GLOSSARY = """
- **GSC**, the gradient scale coefficient ([formula](../../README.md#what-is-measured)), is qm(J)² ‖f_k‖² / ‖f_l‖².
  Here f_k is the output of layer k, and f_l is the output of a later layer l. J is the Jacobian of f_l with respect to
  f_k. qm(J)² is the squared Frobenius norm of J, divided by the number of columns of J. In words: a small random change
  of f_k changes f_l. GSC is the squared relative change of f_l, on average over such changes, divided by the squared
  relative change of f_k. Gradients explode if GSC grows exponentially with the number of layers between k and l. Part
  of the literature calls the square root of this number GSC; these pages use the squared convention.
- **Growth rate** of GSC, or rate: the factor by which GSC to the output grows per layer, from the output towards the
  input. One rate for many layers comes from a line fitted to log GSC.
- **Mean field** ([theory](../theory.md)): the theory of networks with random weights and infinite width.
- **Names** such as tanh+layer give the activation and the normalization of a network: tanh+layer has layer
  normalization, tanh+batch has batch normalization, and tanh has no normalization.
- Other terms are explained in the [glossary](../glossary.md).
"""
CORES = 2


def write(
    name: str, asked: Study, collected: Collected, claims: Sequence[Claim], figures: Sequence[Path], folder: Path
) -> Path:
    """Write the page of a study, which shows ``figures``, into ``folder``; returns the path of the page."""
    text = page(name, asked, collected, claims, [(path.stem, os.path.relpath(path, folder)) for path in figures])
    return written(folder / f"{name}.md", lambda temporary: temporary.write_text(text))


def page(
    name: str, asked: Study, collected: Collected, claims: Sequence[Claim], figures: Sequence[tuple[str, str]]
) -> str:
    """The text of a page: answer, first figure, use, method, folded details.  ``figures``: pairs of name and path."""
    shown = [_figure(asked, *figure) for figure in figures]
    counts = (f"{number} {word}" for word, number in _counts(claims).items() if number)
    return _joined(
        NOTICE,
        f"# {asked.question}",
        asked.answer(collected).strip(),
        *shown[:1],
        *(["## What to do with it", filled(asked.use, collected)] if asked.use else []),
        "## How it was found",
        filled(asked.method, collected),
        "## How sure it is",
        filled(asked.how_sure, collected),
        "## Details",
        _folded(f"{len(claims)} claims: {', '.join(counts)}", claim_list(claims)),
        *([_folded("All results", asked.details(collected).strip())] if asked.details else []),
        *([_folded("More figures", "\n\n".join(shown[1:]))] if shown[1:] else []),
        _folded("Words", GLOSSARY.strip()),
        _folded("Run it again", _origin(name, collected)),
    )


def _joined(*parts: str) -> str:
    return printable("\n\n".join(parts)) + "\n"


def filled(text: str, collected: Collected) -> str:
    """``text`` with fields such as ``{model.depth}`` replaced by the value (or values) of this configuration key."""
    config = collected.manifest.get("config", {})

    def value(field: re.Match[str]) -> str:
        if field[1] == "num_seeds":
            return str(collected.frame["seed"].nunique())
        try:
            found = functools.reduce(lambda place, key: place[key], field[1].split("."), config)
        except (KeyError, TypeError):
            raise ValueError(f"The configuration has no key {field[1]!r}, which the text of a study names.") from None
        return escape(listed(_all(found)), quote=False)

    return re.sub(r"{([a-z_.]+)}", value, text).strip()


def _all(value: Any) -> list[Any]:
    """The sorted values of one entry of the manifest.  The entry is a list if the runs differ."""
    return sorted(value) if isinstance(value, list) else [value]


def _figure(asked: Study, name: str, path: str) -> str:
    caption = asked.captions.get(name, name.replace("_", " "))
    first = caption.split(". ")[0].rstrip(".")
    return f"![{first}]({path})\n\n*{caption}*"


def _folded(summary: str, text: str) -> str:
    return f"<details>\n<summary>{summary}</summary>\n\n{text}\n\n</details>"


def _counts(claims: Sequence[Claim]) -> dict[str, int]:
    return {word: sum(claim.verdict == word for claim in claims) for word in VERDICTS}


def write_index(studies: Mapping[str, tuple[str, str, Sequence[Claim]]], folder: Path) -> Path:
    """Write ``README.md`` into the folder of the pages; returns its path."""
    return written(folder / "README.md", lambda temporary: temporary.write_text(index(studies)))


def index(studies: Mapping[str, tuple[str, str, Sequence[Claim]]]) -> str:
    """The index: answers and counts of verdicts.  ``studies``: question, answer and claims by name."""
    answers = (f"**[{question}]({name}.md)** {answer}" for name, (question, answer, _) in studies.items())
    counts = [[f"[{name}]({name}.md)", *_counts(claims).values()] for name, (*_, claims) in studies.items()]
    return _joined(
        NOTICE,
        "# What did the studies find?",
        INTRODUCTION,
        *answers,
        "## How many claims does each study decide?",
        LEGEND,
        table(["study", "supported", "contradicted", "undecided", "identities checked"], counts),
    )


def _origin(name: str, collected: Collected) -> str:
    manifest = collected.manifest
    module = "train" if collected.metrics is not None else "measure"
    source = results(name)
    hardware = manifest["hardware"]
    threads = listed(_all(hardware["num_threads"]), "or")
    commits = [str(commit)[:10] for commit in _all(manifest["commit"])]
    facts = [
        f"{manifest['runs']} runs, {manifest['seconds']:.0f} s in total",
        f"{hardware.get('cpu', hardware['machine'])}, {threads} {'thread' if threads == '1' else 'threads'} per run"
        if hardware["gpu"] is None
        else str(hardware["gpu"]),
        f"torch {manifest['versions']['torch']}, {'commit' if len(commits) == 1 else 'commits'} {listed(commits)}",
        *([f"data: {manifest['note']}"] if "note" in manifest else []),
    ]
    commands = [
        f"{program(module)} -m study={source} launcher=processes",
        f"{program('collect')} sweep={source}",
        f"{program('figures')} study={name}",
    ]
    lines = ["```sh", *commands, "```", ""]
    if hardware["gpu"] is None:
        lines += [f"The runs take {_duration(manifest)} on two cores (estimated from the reference runs).", ""]
    return "\n".join([*lines, f"Reference results: {escape('; '.join(facts), quote=False)}."])


def _duration(manifest: Mapping[str, Any]) -> str:
    """The time of all runs on two cores in words.  Runs with one thread are executed two at a time."""
    busy = max(_all(manifest["hardware"]["num_threads"]))
    minutes = round(manifest["seconds"] * min(busy, CORES) / CORES / 60)
    return f"about {minutes} {'minute' if minutes == 1 else 'minutes'}" if minutes else "less than a minute"
