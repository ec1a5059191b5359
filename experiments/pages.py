"""The pages of studies in docs/studies, their numbers read from the frames."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.collect import Collected
from experiments.files import written
from experiments.study import Study, results

NOTICE = "<!-- Written by python -m experiments.figures; edit experiments/studies instead. -->"


def write(name: str, asked: Study, collected: Collected, figures: Sequence[Path], folder: Path) -> Path:
    """Write the page of a study, which shows ``figures``, into ``folder``; returns its path."""
    text = page(name, asked, collected, [(path.stem, os.path.relpath(path, folder)) for path in figures])
    return written(folder / f"{name}.md", lambda temporary: temporary.write_text(text))


def page(name: str, asked: Study, collected: Collected, figures: Sequence[tuple[str, str]]) -> str:
    """Question, answer, claims, method, figures, how sure, and where the numbers come from; ``figures``: name, path."""
    claims = ["| claim | verdict | because |", "|---|---|---|"]
    claims += [_row(claim.says, f"**{claim.verdict}**", claim.because) for claim in asked.claims(collected)]
    parts = [
        NOTICE,
        f"# {asked.QUESTION}",
        asked.answer(collected).strip(),
        "\n".join(claims),
        "## Method",
        asked.METHOD.strip(),
        "\n\n".join(f"![{figure.replace('_', ' ')}]({path})" for figure, path in figures),
        "## How sure",
        asked.HOW_SURE.strip(),
        "## Run it again",
        _origin(name, collected),
    ]
    return "\n\n".join(parts) + "\n"


def write_index(studies: Mapping[str, tuple[Study, Collected]], folder: Path) -> Path:
    """Write ``README.md`` into the folder of the pages: every study with its verdicts; returns its path."""
    text = index(studies)
    return written(folder / "README.md", lambda temporary: temporary.write_text(text))


def index(studies: Mapping[str, tuple[Study, Collected]]) -> str:
    """One row a study: its question, and how many claims the data support, contradict, or cannot decide."""
    rows = ["| study | question | supported | contradicted | undecided |", "|---|---|---|---|---|"]
    contradicted = []
    for name, (asked, collected) in studies.items():
        claims = asked.claims(collected)
        counts = [sum(claim.holds is holds for claim in claims) for holds in (True, False, None)]
        rows.append(_row(f"[{name}]({name}.md)", asked.QUESTION, *map(str, counts)))
        contradicted += [
            f"- [{name}]({name}.md): {claim.says}. {claim.because}." for claim in claims if claim.holds is False
        ]
    parts = [NOTICE, "# Studies", "\n".join(rows), "## What the data contradict", "\n".join(contradicted)]
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
    facts = [
        f"{manifest['runs']} runs, {manifest['seconds']:.0f} s of one process",
        f"{cpu}, {hardware['num_threads']} threads a run, not measured on a GPU"
        if hardware["gpu"] is None
        else f"{hardware['gpu']}",
        f"torch {manifest['versions']['torch']}, commit {str(manifest['commit'])[:10]}",
    ]
    if "note" in manifest:
        facts.append(str(manifest["note"]))
    commands = [
        f"python -m experiments.{module} -m study={source}",
        f"python -m experiments.collect sweep={source}",
        f"python -m experiments.figures study={name}",
    ]
    lines = ["```sh", *commands, "```", "", f"The reference results: {'; '.join(facts)}."]
    return "\n".join(lines)
