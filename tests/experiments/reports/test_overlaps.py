"""The check of figures is tested on planted faults; the hard cases of the figures are tested by the check."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from benchmarks.hard_figures import CASES
from benchmarks.overlaps import faults, without_words

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def clean():
    """A figure whose texts lie apart: two panels with labels, titles and a legend."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for ax in axes:
        ax.plot([0, 1, 2], [0, 1, 4], "o-", color="C0", label="one")
        ax.plot([0, 1, 2], [0, 2, 3], "s-", color="C1", label="other")
        ax.set(xlabel="x", ylabel="y", title="a panel")
        ax.legend(loc="upper left")
    return figure, axes


def test_a_clean_figure_has_no_faults():
    figure, _ = clean()
    assert faults(figure) == []


@pytest.mark.parametrize(
    ("plant", "fault"),
    [
        (lambda figure, axes: [axes[0].text(1.5, 0.5, text) for text in ("here", "there")], "'here' overlaps 'there'"),
        (lambda figure, axes: axes[0].set_xticks([1, 1.01], ["first", "second"]), "'first' overlaps 'second'"),
        (lambda figure, axes: figure.text(0.98, 0.02, "far out"), "'far out' leaves the figure"),
        (lambda figure, axes: axes[0].text(2.6, 2, "next door", in_layout=False), "'next door' lies on another panel"),
        (lambda figure, axes: axes[0].text(0.4, 0.5, "in the way"), "'in the way' lies on a curve"),
        (lambda figure, axes: axes[1].text(1.5, 0.5, "faint", color="0.8"), "'faint' is pale: contrast 1.6"),
        (lambda figure, axes: axes[0].plot([0, 1], [4, 4.2], "o-", color="C0", label="a"), "'a', 'one' look alike"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(plant, fault):
    figure, axes = clean()
    for ax in axes:
        ax.get_legend().remove()
    plant(figure, axes)
    assert fault in faults(figure)


def test_twins_in_a_legend_are_found():
    figure, ax = plt.subplots()
    handles = [mpl.lines.Line2D([], [], color="C0", label=name) for name in ("one", "other")]
    figure.legend(handles=handles)
    ax.set(xlabel="x")
    assert faults(figure) == ["'one', 'other' look alike"]


def test_turned_texts_are_compared_along_their_direction():
    """The boxes of both texts overlap if they are not turned with the texts."""
    figure, ax = plt.subplots()
    for x in (0.3, 0.4):
        ax.text(x, 0.2, "a text of some length", rotation=60)
    assert faults(figure) == []
    ax.text(0.41, 0.2, "a text of some length", rotation=60)
    assert len(faults(figure)) == 1


def test_a_figure_of_a_page_needs_a_caption_and_a_spread():
    figure, ax = plt.subplots()
    ax.set_title("Rates of all networks")
    assert without_words(figure, "rates", None) == ["it names no spread"]
    figure.suptitle("mean over 8 seeds, band: one standard deviation")
    assert without_words(figure, "rates", None) == []


@pytest.mark.parametrize(
    "name",
    [
        "matrix_12_long", "matrix_decades", "over_steps_12", "over_steps_decades", "before_after_1_of_1",
        "before_after_300_long_of_5", "profile_curves_25_long", "rates_25_long", "convergence_25", "learning_25",
        "sweep_two_together", "sweep_words", "choice_two_many", "choice_six",
    ],
)  # fmt: skip
def test_hard_figures_have_no_faults(name):
    for own, figure in CASES[name]().items():
        assert faults(figure) == [], own


def test_keys_that_belong_together_need_no_empty_panels():
    figure = CASES["sweep_two_together"]()[".gsc"]
    assert len(figure.axes) == 3
    assert all(any(len(line.get_xdata()) == 11 for line in ax.lines) for ax in figure.axes)
