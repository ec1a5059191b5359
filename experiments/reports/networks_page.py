"""The networks of a sweep or study as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

import gradscope as gs
from experiments.archive import labels
from experiments.archive.tables import Collected
from experiments.reports import growth, sweep_figures


def write(name: str, collected: Collected, path: Path) -> Path:
    """Write the page and return its path; of training, the last step is shown, without theory."""
    gsc = collected.frame[collected.frame["quantity"] == "gsc"]
    if gsc.empty:
        raise ValueError(f"html=true writes a page about GSC, which {name} did not measure: leave html=true out.")
    keys = labels.network_keys(gsc)
    frame = labels.with_networks(labels.in_order(collected.frame, keys), keys)
    known = {} if "step" in frame else {
        "growth": growth.growth_table(frame, [labels.NETWORK]), "theory": growth.profiles(frame, [labels.NETWORK])
    }  # fmt: skip
    return gs.report_frame(frame, path, title=name, about=sweep_figures.describe(collected), **known)
