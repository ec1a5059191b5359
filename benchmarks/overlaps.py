"""Draw every study and a set of hard cases, and look for texts that overlap and for names that look alike.

python -m benchmarks.overlaps                    # all studies and all hard cases; prints one line per figure
python -m benchmarks.overlaps hard residual      # only these
python -m benchmarks.overlaps --folder /tmp/seen # also writes the figures
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.path import Path as Outline
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from benchmarks.hard_figures import CASES
from experiments import figures
from experiments.evidence import study
from experiments.evidence.study import Study

SLACK = 1.0  # pixels: boxes of texts have some air, so boxes that only touch are no fault
CONTRAST = 3.0  # least contrast of a text with its background, as in WCAG 2.1 for large text
SPREADS = ("seed", "run", "initialization", "band", "bars", "exact", "mean field")  # one is in a caption or title


def faults(figure: Figure) -> list[str]:
    """One sentence per fault of the figure as it is drawn: overlaps, hidden or pale texts, and names that look alike.

    Boxes are those of matplotlib, turned with their texts.  Names look alike if color, dashes and marker are the same.
    """
    boxes, panels = _drawn(figure)
    owner = {text: ax for ax in figure.axes for text in ax.findobj(Text)}
    found = [
        f"{_words(a)} overlaps {_words(b)}"
        for (a, one), (b, other) in combinations(boxes.items(), 2)
        if one.intersects_path(other, filled=True)
    ]
    inside = figure.bbox.padded(SLACK)
    for text, box in boxes.items():
        ends = box.get_extents()
        if not (inside.contains(ends.x0, ends.y0) and inside.contains(ends.x1, ends.y1)):
            found.append(f"{_words(text)} leaves the figure")
        if any(box.intersects_path(panel, filled=True) for ax, panel in panels.items() if owner.get(text) is not ax):
            found.append(f"{_words(text)} lies on another panel")
        if (ax := owner.get(text)) in panels and any(box.intersects_path(curve, filled=False) for curve in _curves(ax)):
            found.append(f"{_words(text)} lies on a curve")
        if ax is None or not any(isinstance(part, QuadMesh) for part in ax.collections):
            behind = figure.get_facecolor() if ax is None else ax.get_facecolor()
            if (contrast := _contrast(text.get_color(), behind)) < CONTRAST:
                found.append(f"{_words(text)} is pale: contrast {contrast:.1f}")
    parts: list[Axes | Figure] = [*figure.axes, figure]
    for part in parts:
        found += _alike(part)
    return found


def _drawn(figure: Figure) -> tuple[dict[Text, Outline], dict[Artist, Outline]]:
    """The boxes of all texts that are drawn, tick labels and legends included, and of all visible Axes."""
    boxes: dict[Text, Outline] = {}
    draw = Text.draw

    def noted(text: Text, renderer: RendererBase) -> None:
        if text.get_visible() and text.get_text().strip():
            boxes[text] = _box(text)
        draw(text, renderer)

    with patch.object(Text, "draw", noted):
        figure.canvas.draw()
    shown = [ax for ax in figure.axes if ax.get_visible() and ax.axison]
    return boxes, {ax: _rectangle(ax.get_window_extent()) for ax in shown}


def _box(text: Text) -> Outline:
    """The rectangle around a text, turned with the text."""
    around, angle = Text.get_window_extent(text), text.get_rotation()
    if angle % 90 == 0:
        return _rectangle(around)
    text.set_rotation(0)
    flat = Text.get_window_extent(text)
    text.set_rotation(angle)
    cos, sin = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    corners = (_rectangle(flat).vertices - _center(flat)) @ [[cos, sin], [-sin, cos]]
    return Outline(corners + _center(around), closed=True)


def _center(box: Bbox) -> np.ndarray:
    return box.get_points().mean(axis=0)


def _rectangle(box: Bbox) -> Outline:
    (x0, y0), (x1, y1) = box.padded(-SLACK / 2).get_points()
    return Outline([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)], closed=True)


def _curves(ax: Axes) -> Iterator[Outline]:
    """The lines and error bars of Axes in pixels, as far as they are visible, without reference lines behind all."""
    lines: list[tuple[Any, Sequence[Outline]]] = [
        (line, [line.get_path()]) for line in ax.lines if line.get_linestyle() != "None"
    ]
    lines += [(bars, bars.get_paths()) for bars in ax.collections if isinstance(bars, LineCollection)]
    for line, paths in lines:
        if line.get_visible() and line.get_zorder() > 0:
            for path in paths:
                points = path.transformed(line.get_transform()).cleaned(remove_nans=True)
                yield points if not line.get_clip_on() else points.clip_to_bbox(ax.bbox, inside=True)


def _alike(part: Axes | Figure) -> list[str]:
    """Different names of the lines of one Axes, or of one legend, with the same color, dashes and marker."""
    groups = [[(str(line.get_label()), line) for line in getattr(part, "lines", ()) if _named(line)]]
    for legend in part.legends if isinstance(part, Figure) else part.findobj(Legend):
        names = [text.get_text() for text in legend.get_texts()]
        groups.append(list(zip(names, map(_line, legend.legend_handles), strict=True)))
    found = []
    for group in groups:
        looks = defaultdict(set)
        for name, line in group:
            if line is not None:
                looks[_look(line)].add(name)
        found += [f"{', '.join(sorted(map(repr, names)))} look alike" for names in looks.values() if len(names) > 1]
    return found


def _named(line: Line2D) -> bool:
    return not str(line.get_label()).startswith("_") and len(np.ravel(line.get_xdata())) > 0


def _line(handle: Artist | None) -> Line2D | None:
    parts: Sequence[Any] = handle.findobj(Line2D) if handle is not None else ()
    return parts[0] if parts else None


def _look(line: Line2D) -> tuple[str, ...]:
    face = line.get_markerfacecolor()
    dashes: Any = vars(line)["_unscaled_dash_pattern"]  # get_linestyle() calls every pattern "--"
    return tuple(map(str, (to_hex(line.get_color()), dashes, line.get_marker(), face, line.get_linewidth())))


def _contrast(one: Any, other: Any) -> float:
    """Contrast of two colors, from 1 to 21 (WCAG 2.1)."""
    colors = np.array([to_rgb(one), to_rgb(other)], dtype=np.float64)
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    dark, bright = np.sort(linear @ [0.2126, 0.7152, 0.0722])
    return float((bright + 0.05) / (dark + 0.05))


def _words(text: Text) -> str:
    words = text.get_text().replace("\n", " ")
    return repr(words if len(words) <= 40 else words[:37] + "...")


def without_words(figure: Figure, name: str, asked: Study | None) -> list[str]:
    """Whether a figure of the page of a study has no caption, or says nowhere what its lines and bars average."""
    caption = asked.captions.get(name, "") if asked else "no page shows this figure"
    titles = [figure.get_suptitle(), *(ax.get_title() for ax in figure.axes)]
    said = " ".join([*titles, caption]).lower()
    return ["it has no caption"] * (not caption) + ["it names no spread"] * (not any(word in said for word in SPREADS))


def drawn(asked: set[str]) -> Iterator[tuple[str, Figure, list[str]]]:
    """The hard cases and the figures of all studies, or those with the names ``asked``: name, figure and faults."""
    for name, case in CASES.items():
        if not asked or asked & {"hard", name}:
            for own, figure in case().items():
                yield f"hard/{name}{own}", figure, faults(figure)
    for name, one in figures.every(figures.Config()).items():
        if not asked or name in asked:
            collected, _ = figures.read(one)
            known = study.find(name)
            with contextlib.redirect_stdout(io.StringIO()):
                made = figures.drawn(name, collected, known.claims(collected) if known else [])
            for own, figure in made.items():
                yield f"{name}/{own}", figure, faults(figure) + without_words(figure, own, known)


def main() -> int:
    """Print one line per figure with its number of faults, and the faults; returns their number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help='studies, hard cases, or "hard" for all hard cases')
    parser.add_argument("--folder", type=Path, help="where to write the figures")
    options = parser.parse_args()
    number = total = 0
    for name, figure, found in drawn(set(options.names)):
        print("\n    ".join([f"{name}: {len(found) or 'no'} faults", *found]), flush=True)
        if options.folder:
            options.folder.mkdir(parents=True, exist_ok=True)
            figures.write_png(figure, options.folder / f"{name.replace('/', '.')}.png")
        plt.close(figure)
        number, total = number + 1, total + len(found)
    print(f"{number} figures, {total} faults")
    return total


if __name__ == "__main__":
    sys.exit(bool(main()))
