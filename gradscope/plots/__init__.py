"""Figures of what the library returns, on matplotlib Axes in the caller's style; nothing is measured or saved here."""

from gradscope.plots.coordinates import coordinates
from gradscope.plots.curves import MAX_DIRECT_LABELS, MAX_NAMED_LAYERS, named_profile, profile, statistic, theory
from gradscope.plots.differences import difference
from gradscope.plots.drawing import DIVERGING
from gradscope.plots.heads import attention
from gradscope.plots.ledger import residual
from gradscope.plots.maps import matrix, phase_diagram
from gradscope.plots.positions import positions
from gradscope.plots.rows import LABELS
from gradscope.plots.training import before_after, evolution, learning, over_steps
from gradscope.plots.verdicts import convergence, rates

__all__ = [
    "DIVERGING",
    "LABELS",
    "MAX_DIRECT_LABELS",
    "MAX_NAMED_LAYERS",
    "attention",
    "before_after",
    "convergence",
    "coordinates",
    "difference",
    "evolution",
    "learning",
    "matrix",
    "named_profile",
    "over_steps",
    "phase_diagram",
    "positions",
    "profile",
    "rates",
    "residual",
    "statistic",
    "theory",
]
