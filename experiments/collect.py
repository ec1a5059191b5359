"""Collect the runs of a sweep into one Parquet data set.

python -m experiments.collect sweep=architectures
python -m experiments.collect sweep=architectures --csv
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.archive.collecting import COUNTED, DATA, collect, unreadable
from experiments.config import command_line
from gradscope import frames

SHOWN = 5  # at most this many unreadable runs are printed


@dataclass
class Config:
    """``results``/``sweep`` is the folder whose runs are collected.  ``csv``: write ``collected.csv``, too."""

    results: str = "results/runs"
    sweep: str = "measure"
    csv: bool = False


def main(cfg: Config) -> None:
    """Bring the data set of a sweep up to date, and print how complete it is."""
    sweep = Path(cfg.results) / cfg.sweep
    collected = collect(sweep)
    counts = collected.manifest
    rest = ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in COUNTED if counts[name])
    print(f"{counts['runs']} runs{f' ({rest})' if rest else ''}, {len(collected.frame)} rows -> {sweep / DATA}")
    unread = [f"Left out: {name}: {why}" for name, (_, why) in unreadable(sweep).items()]
    for line in unread[:SHOWN] + [f"and {len(unread) - SHOWN} more."] * bool(unread[SHOWN:]):
        print(line)
    if cfg.csv:
        print(f"-> {frames.save(collected.frame, sweep / 'collected.csv')}")


if __name__ == "__main__":
    command_line.run(main, Config)
