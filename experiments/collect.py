"""Collect the runs of a sweep into one Parquet data set.

python -m experiments.collect sweep=architectures
python -m experiments.collect sweep=architectures --csv
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.archive import collecting
from experiments.archive.collecting import COUNTED, DATA
from experiments.config import command_line
from gradscope import frames
from gradscope.files import printable

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
    counts = collecting.update(sweep)
    rest = ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in COUNTED if counts[name])
    print(printable(f"{counts['runs']} runs{f' ({rest})' if rest else ''}, {counts['rows']} rows -> {sweep / DATA}"))
    unread = [f"Left out: {name}: {why}" for name, (_, why) in collecting.unreadable(sweep).items()]
    for line in unread[:SHOWN] + [f"and {len(unread) - SHOWN} more."] * bool(unread[SHOWN:]):
        print(printable(line).replace("\n", " "))
    if cfg.csv and (collected := collecting.load(sweep)) is not None:
        print(printable(f"-> {frames.save(collected.frame, sweep / 'collected.csv')}"))


if __name__ == "__main__":
    command_line.run(main, Config)
