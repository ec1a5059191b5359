"""Gradient diagnostics for torch networks: Gradient Scale Coefficients with error bars, growth rates and a verdict."""

import importlib
from typing import TYPE_CHECKING, Any

from gradscope import frames, initializers, meanfield, measures, models, probes, testing
from gradscope.alarms import MonitorWarning
from gradscope.checking import check
from gradscope.coefficients import gsc, gsc_matrix
from gradscope.comparison import compare
from gradscope.depth import EffectiveDepth, effective_depth
from gradscope.estimates import Estimate
from gradscope.evidence import NonFiniteError
from gradscope.growth import Growth
from gradscope.layers import Layer
from gradscope.measuring import measure
from gradscope.monitor import Monitor
from gradscope.nonfinite import first_nonfinite
from gradscope.nonlinearity import nlc
from gradscope.norms import qm_norm
from gradscope.operators import LinearOperator
from gradscope.parameters import parameter_gsc
from gradscope.profiles import Matrix, Profile
from gradscope.recording import Capture, capture
from gradscope.subspace import Deflated
from gradscope.taps import tap
from gradscope.taylor import taylor_losses

if TYPE_CHECKING:
    from gradscope import plots

__all__ = [
    "Capture",
    "Deflated",
    "EffectiveDepth",
    "Estimate",
    "Growth",
    "Layer",
    "LinearOperator",
    "Matrix",
    "Monitor",
    "MonitorWarning",
    "NonFiniteError",
    "Profile",
    "capture",
    "check",
    "compare",
    "effective_depth",
    "first_nonfinite",
    "frames",
    "gsc",
    "gsc_matrix",
    "initializers",
    "meanfield",
    "measure",
    "measures",
    "models",
    "nlc",
    "parameter_gsc",
    "plots",
    "probes",
    "qm_norm",
    "tap",
    "taylor_losses",
    "testing",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``plots`` on first use: matplotlib and seaborn take longer to import than a small network to measure."""
    if name == "plots":
        return importlib.import_module("gradscope.plots")
    raise AttributeError(f"module 'gradscope' has no attribute {name!r}")
