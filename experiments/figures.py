"""Frames -> figures, and the page of a study.

python -m experiments.figures study=architectures
python -m experiments.figures study=all                # every study, from the reference results
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from PIL import Image

from experiments.archive import collecting, labels, reference
from experiments.archive.tables import Collected
from experiments.config import command_line
from experiments.evidence import study
from experiments.reports import growth as report_growth
from experiments.reports import pages, sweep_figures, terminal, training_figures

mpl.use("Agg")
mpl.rcParams.update({"font.size": 10, "svg.fonttype": "none", "savefig.dpi": 150})

ALL = "all"


@dataclass
class Config:
    """What to draw: the runs of ``sweep``, or of the sweep of that name, else the reference results of ``study``; with
    ``study=all`` all reference results.  ``study`` is whose figures they are (default: of the name of the sweep).

    ``publish=true`` writes frame, manifest and figures to ``reference``/``study``, and the page of a study to
    ``pages``; ``note`` says there, and in the titles, what the configuration cannot know about the data.
    """

    study: str | None = None
    sweep: str | None = None
    results: str = "results/runs"
    reference: str = "results"
    pages: str = "docs/studies"
    publish: bool = False
    note: str | None = None


def named(cfg: Config) -> str:
    """The study to draw.

    Raises:
        ValueError: None is named.
    """
    name = cfg.study or cfg.sweep
    if name is None:
        raise ValueError("Name what to draw: study=NAME of a study or of a sweep that was collected, or study=all.")
    return name


def read(cfg: Config) -> tuple[Collected, Path]:
    """The study's frame, records of training and manifest, from its runs or else from the reference results, and where
    figures go.

    Raises:
        FileNotFoundError: Neither exists, or not the sweep that was asked for.
        ValueError: Neither study nor sweep is named.
    """
    asked = named(cfg)
    name = study.results(asked)
    runs, published = Path(cfg.results) / (cfg.sweep or name), Path(cfg.reference) / name
    if (collected := collecting.load(runs)) is not None:
        own = replace(collected, frame=collected.frame.drop(columns="run", errors="ignore"))
        return study.condensed(asked, own), runs / "figures"
    if cfg.sweep is None and (published / reference.DATA).is_file():
        return reference.load(published), published
    first = f"python -m experiments.collect sweep={runs.relative_to(cfg.results)}"
    besides = "" if cfg.sweep else f", and {published / reference.DATA} does not exist either"
    raise FileNotFoundError(f"Nothing to draw: {runs} was not collected ({first}){besides}.")


def drawn(name: str, collected: Collected) -> dict[str, Figure]:
    """The figures of a study, or of any sweep; its claims, growth rates or accuracies are printed."""
    title = sweep_figures.describe(collected)
    if (asked := study.find(name)) is not None:
        terminal.print_claims(asked.claims(collected), f"{asked.QUESTION} ({title})")
        return asked.figures(collected)
    keys = labels.network_keys(collected.frame)
    frame = labels.in_order(collected.frame, keys)
    if collected.metrics is None:
        growth = report_growth.growth_table(frame, keys)
        terminal.print_growth(growth, keys, f"{name}: {title}")
        return sweep_figures.draw(frame, keys, growth, title)
    metrics = labels.in_order(collected.metrics, keys)
    frame, metrics = (labels.with_networks(table, keys) for table in (frame, metrics))
    terminal.print_learning(metrics, f"{name}: {title}")
    return training_figures.draw(frame, metrics, title)


def write_png(figure: Figure, path: Path) -> None:
    """A small PNG: lines and bands do with 256 colors, a heat map keeps all of them at half of the resolution."""
    buffer = io.BytesIO()
    smooth = any(isinstance(artist, QuadMesh) for ax in figure.axes for artist in ax.collections)
    figure.savefig(buffer, format="png", dpi=80 if smooth else 150)
    image = Image.open(buffer).convert("RGB")
    (image if smooth else image.quantize(256, kmeans=1)).save(path, optimize=True)


def main(cfg: Config) -> None:
    """Print what was found, and write every figure as PNG and SVG; of reference results PNG and the page."""
    if cfg.study == ALL:
        if cfg.publish or cfg.sweep or cfg.note:
            raise ValueError("study=all draws the reference results; sweep=, publish= and note= are for one study.")
        published = _published(cfg)
        for name in published:
            _make(replace(cfg, study=name, results=""))
        answered = {
            name: (asked, reference.load(Path(cfg.reference) / study.results(name)))
            for name in published
            if (asked := study.find(name)) is not None
        }
        print(f"Page: {pages.write_index(answered, Path(cfg.pages))}")
    else:
        _make(cfg)


def _published(cfg: Config) -> list[str]:
    """Every study with reference results, its own or those of another, which then has no figures besides."""
    own = {path.parent.name for path in Path(cfg.reference).glob(f"*/{reference.DATA}")}
    return sorted({study.reader(name) for name in own} | {name for name in study.names() if study.results(name) in own})


def _make(cfg: Config) -> None:
    name = study.reader(named(cfg))
    cfg = replace(cfg, study=name)
    collected, output = read(cfg)
    published = Path(cfg.reference) / study.results(name)
    if cfg.note:
        collected.manifest["note"] = cfg.note
    if cfg.publish:
        output = published
        reference.save(collected, output)
        # What is drawn and written is what the saved digits say, so that anybody can draw and write the same.
        collected = reference.load(output)
    figures = drawn(name, collected)
    output.mkdir(parents=True, exist_ok=True)
    for figure_name, figure in figures.items():
        write_png(figure, output / f"{figure_name}.png")
        if output != published:
            figure.savefig(output / f"{figure_name}.svg")
        print(f"Figure: {output / figure_name}.png")
        plt.close(figure)
    asked = study.find(name)
    if output == published and asked is not None:
        paths = [output / f"{figure_name}.png" for figure_name in figures]
        print(f"Page: {pages.write(name, asked, collected, paths, Path(cfg.pages))}")


if __name__ == "__main__":
    command_line.run(main, Config)
