"""Figures of tidy frames on matplotlib Axes; nothing is measured or saved here."""

from gradscope.frames import to_last_target
from gradscope.plots.curves import MAX_DIRECT_LABELS, convergence, named_profile, profile, rates, statistic, theory
from gradscope.plots.maps import matrix, phase_diagram
from gradscope.plots.rows import DIVERGING, LABELS, MAX_NAMED_LAYERS
from gradscope.plots.training import before_after, evolution, learning, over_steps

__all__ = [
    "DIVERGING",
    "LABELS",
    "MAX_DIRECT_LABELS",
    "MAX_NAMED_LAYERS",
    "before_after",
    "convergence",
    "evolution",
    "learning",
    "matrix",
    "named_profile",
    "over_steps",
    "phase_diagram",
    "profile",
    "rates",
    "statistic",
    "theory",
    "to_last_target",
]
