"""Gradient diagnostics for torch networks: Gradient Scale Coefficients with error bars, growth rates and a verdict."""

from gradscope import frames, initializers, meanfield, measures, models, plots, probes, testing
from gradscope.alarms import MonitorWarning
from gradscope.checking import check
from gradscope.coefficients import gsc, gsc_matrix
from gradscope.comparison import compare
from gradscope.estimates import Estimate
from gradscope.growth import Growth
from gradscope.layers import Layer
from gradscope.measuring import measure
from gradscope.monitor import Monitor, NonFiniteError
from gradscope.nonfinite import first_nonfinite
from gradscope.nonlinearity import nlc
from gradscope.norms import qm_norm
from gradscope.operators import LinearOperator
from gradscope.parameters import parameter_gsc
from gradscope.profiles import Matrix, Profile
from gradscope.recording import Capture, capture
from gradscope.subspace import Deflated
from gradscope.taps import tap

__all__ = [
    "Capture",
    "Deflated",
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
    "testing",
]
__version__ = "0.1.0"
