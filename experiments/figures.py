"""Draw the figures of a study or sweep, and write the page of a study.

python -m experiments.figures study=architectures
python -m experiments.figures sweep=mine               # every network, in panels, with its growth rate
python -m experiments.figures sweep=mine x=width col=depth hue=activation row=norm,residual
python -m experiments.figures study=all                # every study, from the reference results
"""

from __future__ import annotations

import io
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from PIL import Image

from experiments.archive import collecting, labels, reference
from experiments.archive.tables import Collected
from experiments.config import command_line
from experiments.evidence import study
from experiments.evidence.colors import COLORS
from experiments.evidence.study import Claim
from experiments.program import program
from experiments.reports import chosen_figures, networks_page, pages, sweep_figures, terminal, training_figures
from experiments.reports import growth as report_growth
from experiments.reports.roles import Choice
from gradscope.files import printable, written

mpl.use("Agg")
mpl.rcParams.update({"font.size": 10, "svg.fonttype": "none", "savefig.dpi": 150})
mpl.rcParams.update({"axes.titlesize": "medium", "figure.titlesize": "medium"})
mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
mpl.rcParams["axes.prop_cycle"] = cycler(color=COLORS)

ALL = "all"
DEFAULT = Choice()


@dataclass
class Config:
    """Options of the command.

    Arguments:
        study: The study to draw (default: the name of the sweep); "all" draws all reference results.
        sweep: The collected sweep to read (default: the sweep of the study, or else the study's reference results).
        results: The folder of sweeps.
        reference: The folder of reference results.
        pages: The folder of the pages of studies.
        publish: Also write frame, manifest and figures to ``reference``/``study``, and the page to ``pages``.
        note: A remark on the data for the page and the titles, such as "JPEG-recompressed".
        html: Also write ``report.html``, one page of all networks to send to a colleague.
        x: The x axis: a key of the configuration, layer, step or epoch; y is then drawn for every network.
        y: A quantity such as gsc, sign_diversity or test_accuracy, or rate (of growth).
        hue: Keys that are distinguished by color, joined with commas.
        col: Keys whose values are columns of panels.
        row: Keys whose values are rows of panels.
    """

    study: str | None = None
    sweep: str | None = None
    results: str = "results/runs"
    reference: str = "results"
    pages: str = "docs/studies"
    publish: bool = False
    note: str | None = None
    html: bool = False
    x: str | None = None
    y: str | None = None
    hue: str | None = None
    col: str | None = None
    row: str | None = None

    @property
    def choice(self) -> Choice:
        """What the user wants to see instead of the default figures."""
        return Choice(self.x, self.y, self.hue, self.col, self.row)


def read(cfg: Config) -> tuple[Collected, Path]:
    """The results to draw (the collected runs, or else the reference results), and the folder for the figures."""
    asked = _named(cfg)
    name = study.results(asked)
    runs, published = Path(cfg.results) / (cfg.sweep or name), Path(cfg.reference) / name
    if (collected := collecting.load(runs)) is not None:
        own = replace(collected, frame=collected.frame.drop(columns="run", errors="ignore"))
        return study.condensed(asked, own), runs / "figures"
    if cfg.sweep is None and (published / reference.DATA).is_file():
        return reference.load(published), published
    first = f"{program('collect')} sweep={runs.relative_to(cfg.results)}"
    besides = "" if cfg.sweep else f", and {published / reference.DATA} does not exist either"
    raise FileNotFoundError(f"Nothing to draw: {runs} was not collected ({first}){besides}.")


def drawn(name: str, collected: Collected, claims: list[Claim], choice: Choice = DEFAULT) -> dict[str, Figure]:
    """The figures of a study or of another sweep.  Prints the claims, growth rates or accuracies."""
    title = sweep_figures.describe(collected)
    if choice:
        return chosen_figures.by_choice(collected, choice, title)
    if (asked := study.find(name)) is not None:
        terminal.print_claims(claims, f"{asked.question} ({title})")
        return asked.figures(collected)
    frame = collected.frame
    if collected.metrics is None:
        if "gsc" not in {*frame["quantity"]}:
            return chosen_figures.by_choice(collected, choice, title)
        frame = frame[frame["quantity"].isin(sweep_figures.USUAL)]
        keys = labels.network_keys(frame)
        frame = labels.in_order(frame, keys)
        growth = report_growth.growth_table(frame, keys)
        terminal.print_growth(growth, keys, f"{name}: {title}")
        return sweep_figures.draw(frame, keys, growth, title)
    keys = labels.network_keys(frame)
    tables = (labels.in_order(table, keys) for table in (frame, collected.metrics))
    frame, metrics = (labels.with_networks(table, keys) for table in tables)
    terminal.print_learning(metrics, f"{name}: {title}")
    return training_figures.draw(frame, metrics, title, keys)


def write_png(figure: Figure, path: Path) -> None:
    """Write a small PNG: 256 colors for lines and bands; for heat maps all colors, but a lower resolution."""
    buffer = io.BytesIO()
    smooth = any(isinstance(artist, QuadMesh) for ax in figure.axes for artist in ax.collections)
    figure.savefig(buffer, format="png", dpi=110 if smooth else 150, pil_kwargs={"compress_level": 1})
    image = Image.open(buffer).convert("RGB")
    small = image if smooth else image.quantize(256)
    written(path, lambda temporary: small.save(temporary, format="png", optimize=True))


def main(cfg: Config) -> None:
    """Print the findings, and write every figure as PNG and SVG; for reference results, write PNG and the page."""
    if cfg.study != ALL:
        _make(cfg)
        return
    each = every(cfg)
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(each))) as pool:
        found = dict(zip(each, pool.map(_make, each.values()), strict=True))
    decided = {name: (asked.question, *found[name]) for name in each if (asked := study.find(name)) is not None}
    print(f"Page: {pages.write_index(decided, Path(cfg.pages))}")


def every(cfg: Config) -> dict[str, Config]:
    """One configuration for each study with reference results, and for each sweep whose results no study reads."""
    if cfg.publish or cfg.sweep or cfg.note or cfg.choice:
        raise ValueError(
            "study=all draws the reference results; use sweep=, publish=, note=, x=, y=, hue=, col= and row= with one "
            "study only."
        )
    own = {path.parent.name for path in Path(cfg.reference).glob(f"*/{reference.DATA}")}
    names = {study.reader(name) for name in own} | {name for name in study.names() if study.results(name) in own}
    if not names:
        raise FileNotFoundError(f"No folder of {cfg.reference} has reference results ({reference.DATA}).")
    return {name: replace(cfg, study=name, results="") for name in sorted(names)}


def _named(cfg: Config) -> str:
    if name := cfg.study or cfg.sweep:
        return name
    raise ValueError("Name what to draw: study=NAME of a study or of a sweep that was collected, or study=all.")


def _make(cfg: Config) -> tuple[str, list[Claim]]:
    """Draw one study or sweep; returns the answer and the claims of the study."""
    name = study.reader(_named(cfg))
    cfg = replace(cfg, study=name)
    collected, output = read(cfg)
    published = Path(cfg.reference) / study.results(name)
    if cfg.note:
        collected.manifest["note"] = cfg.note
    if cfg.publish:
        output = published
        reference.save(collected, output)
        collected = reference.load(output)  # draw the figures from the rounded numbers that are published
    if cfg.choice:  # beside the figures of the study
        output = Path(cfg.results or "results/runs") / study.results(name) / "figures"
    asked = None if cfg.choice else study.find(name)
    try:
        claims = [] if asked is None else asked.claims(collected)
        figures = drawn(name, collected, claims, cfg.choice)
    except (ValueError, OSError):
        raise
    except Exception as error:  # results from elsewhere can hold anything
        raise ValueError(
            f"The results for {name} cannot be drawn ({type(error).__name__}: {error}): were they made by this study?"
        ) from error
    if not figures:
        raise ValueError(
            f"Nothing was drawn, because no figure of {name} has data: {program('status')} says which runs are missing."
        )
    if output.is_symlink():
        raise ValueError(f"{output} is a link; figures are written only into a folder: remove the link.")
    output.mkdir(parents=True, exist_ok=True)
    for figure_name, figure in figures.items():
        write_png(figure, output / f"{figure_name}.png")
        if output != published:
            written(output / f"{figure_name}.svg", partial(figure.savefig, format="svg"))
        print(printable(f"Figure: {output / figure_name}.png"))
        plt.close(figure)
    if cfg.html:
        print(printable(f"Page: {networks_page.write(name, collected, output / 'report.html')}"))
    if output == published and asked is not None:
        paths = [output / f"{figure_name}.png" for figure_name in figures]
        print(f"Page: {pages.write(name, asked, collected, claims, paths, Path(cfg.pages))}")
    return "" if asked is None else asked.answer(collected).strip(), claims


if __name__ == "__main__":
    command_line.run(main, Config)
