"""The pages of studies in docs/studies, their numbers read from the frames."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.archive.tables import Collected
from experiments.evidence.study import VERDICTS, Claim, Study, results
from experiments.files import written

LEGEND = (
    "Of the claims of each study, those that its data support or contradict, and those that they cannot decide.  An "
    "identity is a theorem: that it holds up to rounding says that the code is right, and nothing of the world, so it "
    "is counted apart."
)
DENIED = "Each of these sentences was claimed, and is not so; behind it stands what was measured instead."
NOTICE = "<!-- Written by python -m experiments.figures; edit experiments/studies instead. -->"
WORDS = """
> **Words.** **GSC**, the gradient scale coefficient ([formula](../../README.md#what-is-measured)), is
> qm(J)² ‖f_k‖² / ‖f_l‖²: a small random relative change of layer k arrives at layer l with its square multiplied by so
> much, in the mean. At 1 it arrives as large as it was; growth with depth is an explosion. It is squared throughout;
> part of the literature takes the root, whose logarithms are half as large. **Mean field** ([theory](../theory.md)) is
> what a network of infinite width with random weights does, computed and not measured. **NLC**, the nonlinearity
> coefficient ([formula](../../README.md#what-is-measured)), is 1 for an affine map and grows with the nonlinearity of
> the whole network. **Probes** ([estimates](../estimates.md)) are random vectors that estimate the length of a Jacobian
> where the exact one would cost too much.
"""
# So many claims are read at a glance and stand beside the answer; more of them are looked up.
FEW_CLAIMS = 8
CORES = 2


def write(name: str, asked: Study, collected: Collected, figures: Sequence[Path], folder: Path) -> Path:
    """Write the page of a study, which shows ``figures``, into ``folder``; returns its path."""
    text = page(name, asked, collected, [(path.stem, os.path.relpath(path, folder)) for path in figures])
    return written(folder / f"{name}.md", lambda temporary: temporary.write_text(text))


def page(name: str, asked: Study, collected: Collected, figures: Sequence[tuple[str, str]]) -> str:
    """What a study found, for a reader who stops early: answer and main figure first; ``figures``: name, path."""
    claims = asked.claims(collected)
    few, shown = len(claims) <= FEW_CLAIMS, [_figure(asked, *figure) for figure in figures]
    parts = [
        NOTICE,
        f"# {asked.QUESTION}",
        asked.answer(collected).strip(),
        WORDS.strip(),
        *([_table(claims)] if few else []),
        *shown[:1],
        "## Method",
        filled(asked.METHOD, collected).strip(),
        *shown[1:],
        *([] if few else ["## Claims", _table(claims)]),
        "## How sure",
        filled(asked.HOW_SURE, collected).strip(),
        "## Run it again",
        _origin(name, collected),
    ]
    return "\n\n".join(parts) + "\n"


def filled(text: str, collected: Collected) -> str:
    """With ``{model.depth}`` replaced by that key of the configuration, several values by ``10, 20 and 30``.

    Raises:
        ValueError: The configuration has no such key.
    """
    config = collected.manifest.get("config", {})

    def value(field: re.Match[str]) -> str:
        if field[1] == "num_seeds":
            return str(collected.frame["seed"].nunique())
        try:
            found = functools.reduce(lambda place, key: place[key], field[1].split("."), config)
        except (KeyError, TypeError):
            raise ValueError(f"The configuration has no key {field[1]!r}, which the text of a study names.") from None
        return _listed(found, "and")

    return re.sub(r"{([a-z_.]+)}", value, text)


def _listed(values: Any, last: str) -> str:
    """``1``, ``1 or 2``, ``1, 2 or 3``; a list is sorted, a single value may stand alone."""
    words = [f"{one:g}" if isinstance(one, float) else str(one) for one in sorted(_all(values))]
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)


def _all(value: Any) -> list[Any]:
    """What a manifest holds of a key: a list where runs differ."""
    return value if isinstance(value, list) else [value]


def _figure(asked: Study, name: str, path: str) -> str:
    caption = getattr(asked, "CAPTIONS", {}).get(name, name.replace("_", " "))
    first = caption.split(". ")[0].rstrip(".")
    return f"![{first}]({path})\n\n*{caption}*"


def _table(claims: Sequence[Claim]) -> str:
    rows = ["| claim | verdict | because |", "|---|---|---|"]
    rows += [_row(claim.says, f"**{claim.verdict}**", claim.because) for claim in claims]
    if any(claim.verdict == "checked" for claim in claims):
        rows += ["", "*Checked*: an identity or a theorem, held against rounding; only a mistake could contradict it."]
    return "\n".join(rows)


def write_index(studies: Mapping[str, tuple[Study, Collected]], folder: Path) -> Path:
    """Write ``README.md`` into the folder of the pages: every study with its verdicts; returns its path."""
    text = index(studies)
    return written(folder / "README.md", lambda temporary: temporary.write_text(text))


def index(studies: Mapping[str, tuple[Study, Collected]]) -> str:
    """One row a study: its question, how many claims the data support, contradict, or cannot decide, and identities."""
    rows = [
        "| study | question | supported | contradicted | undecided | identities checked |",
        "|---|---|---|---|---|---|",
    ]
    contradicted = []
    for name, (asked, collected) in studies.items():
        claims = asked.claims(collected)
        counts = [sum(claim.verdict == verdict for claim in claims) for verdict in VERDICTS]
        rows.append(_row(f"[{name}]({name}.md)", asked.QUESTION, *map(str, counts)))
        contradicted += [
            f"- [{name}]({name}.md): {claim.says}. {claim.because}." for claim in claims if claim.holds is False
        ]
    parts = [
        NOTICE,
        "# Studies",
        "\n".join(rows),
        LEGEND,
        "## What the data contradict",
        DENIED,
        "\n".join(contradicted),
    ]
    return "\n\n".join(parts) + "\n"


def _row(*cells: str) -> str:
    """Of a table in Markdown, where a bar ends a cell."""
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _origin(name: str, collected: Collected) -> str:
    manifest = collected.manifest
    module = "train" if collected.metrics is not None else "measure"
    source = results(name)
    hardware = manifest["hardware"]
    cpu = hardware.get("cpu", hardware["machine"])  # older manifests do not name it
    threads = _listed(hardware["num_threads"], "or")
    facts = [
        f"{manifest['runs']} runs, {manifest['seconds']:.0f} s of one process",
        f"{cpu}, {threads} {'thread' if threads == '1' else 'threads'} a run, not measured on a GPU"
        if hardware["gpu"] is None
        else f"{hardware['gpu']}",
        f"torch {manifest['versions']['torch']}, commit {str(manifest['commit'])[:10]}",
    ]
    if "note" in manifest:
        facts.append(str(manifest["note"]))
    commands = [
        f"python -m experiments.{module} -m study={source} launcher=processes",
        f"python -m experiments.collect sweep={source}",
        f"python -m experiments.figures study={name}",
    ]
    lines = ["```sh", *commands, "```", ""]
    if hardware["gpu"] is None:
        lines += [f"This takes {_duration(manifest)} on two cores, judging by the reference runs.", ""]
    return "\n".join([*lines, f"The reference results: {'; '.join(facts)}."])


def _duration(manifest: Mapping[str, Any]) -> str:
    """Of all runs on two cores, where a run with one thread leaves the other core to the next."""
    busy = max(_all(manifest["hardware"]["num_threads"]))
    minutes = round(manifest["seconds"] * min(busy, CORES) / CORES / 60)
    return f"about {minutes} {'minute' if minutes == 1 else 'minutes'}" if minutes else "less than a minute"
