"""The page about the difference of two models."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from gradscope.comparing.differences.difference import FREE, HELD, Difference
from gradscope.report import charts, sections, words
from gradscope.report.sections import Section
from gradscope.report.writing import require_packages, write

KINDS = {HELD: "given equal inputs", FREE: "whole difference"}
COLUMNS = ["layer", "other", "quantity", "value", "low", "high", "rounding", "differs"]


def report(found: Difference, path: Path, title: str) -> Path:
    """Write the page and return its path; see `gradscope.Difference.report`."""
    require_packages()
    frame = found.frame
    parts = []
    drawn = frame[frame["quantity"].isin(KINDS)]
    if len(drawn):
        rows = drawn[["layer", "index", "rounding"]].assign(kind=drawn["quantity"].map(KINDS), distance=drawn["value"])
        caption = "Relative distance of the outputs of every layer; gray ticks are what rounding explains."
        parts.append(Section("Which layer differs?", chart=charts.distances(rows), caption=caption))
    table = frame.sort_values("differs", ascending=False, kind="stable", ignore_index=True)[COLUMNS]
    table["quantity"] = table["quantity"].str.replace("_", " ")
    table["differs"] = table["differs"].map({True: "yes", False: "no"})
    caption, errors = "One row per layer and quantity; rows that differ come first.", pd.DataFrame(index=table.index)
    parts.append(sections.sortable("All quantities", table, errors, caption, ("value", "low", "high")))
    parts.append(Section("How this page was made", facts=words.versions()))
    facts = [("Finding", sentence) for sentence in found.sentences()]
    return write(path, title, found.subject.rstrip(":"), found.headline, "", facts, parts)
