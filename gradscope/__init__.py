"""Gradient diagnostics for torch networks: Gradient Scale Coefficients with error bars, growth rates and a verdict."""

import importlib
from typing import TYPE_CHECKING, Any

from gradscope import frames, initializers, meanfield, measures, models, probes, sinks, testing
from gradscope.backward.cotangents import Deflated
from gradscope.checks.against_theory import compare
from gradscope.checks.comparison import Comparison
from gradscope.checks.reading import UnreadableError
from gradscope.checks.report import Report
from gradscope.checks.self_check import check
from gradscope.coefficients.growth import Growth, growth
from gradscope.coefficients.gsc import gsc, gsc_matrix
from gradscope.coefficients.nonlinearity import nlc
from gradscope.coefficients.parameters import parameter_gsc
from gradscope.coefficients.profiles import Matrix, Profile
from gradscope.comparing.coordinates.check import CoordinateCheck, coordinate_check
from gradscope.comparing.differences.difference import Difference
from gradscope.comparing.differences.two_models import diff
from gradscope.comparing.models import ModelComparison, compare_models
from gradscope.comparing.norms.logged import NormCheck, check_norm
from gradscope.comparing.repair.plan import repair
from gradscope.comparing.repair.result import Repair
from gradscope.depth.effective import EffectiveDepth, effective_depth
from gradscope.depth.taylor import taylor_losses
from gradscope.estimates import Estimate
from gradscope.forward.layers import Layer
from gradscope.forward.lengths import ZeroOutputError
from gradscope.forward.modules import tap
from gradscope.forward.wrappers.sharding import unsharded
from gradscope.jacobians.capture import Capture, capture
from gradscope.jacobians.description import Description
from gradscope.jacobians.jacobian import Affine, Jacobian
from gradscope.measures.measuring import Measure, measure
from gradscope.monitor.alarms import MonitorWarning
from gradscope.monitor.monitor import Monitor
from gradscope.monitor.nonfinite import Fault, NonFiniteError, first_nonfinite
from gradscope.norms import qm_norm
from gradscope.operators import LinearOperator
from gradscope.report.networks import report_frame
from gradscope.report.page import report
from gradscope.transformers.attention.measurement import AttentionHeads, attention
from gradscope.transformers.coherence import Coherence, jacobian_coherence
from gradscope.transformers.positions import Positions
from gradscope.transformers.residual.measurement import Residual, residual

if TYPE_CHECKING:
    from gradscope import plots

__all__ = [
    "Affine",
    "AttentionHeads",
    "Capture",
    "Coherence",
    "Comparison",
    "CoordinateCheck",
    "Deflated",
    "Description",
    "Difference",
    "EffectiveDepth",
    "Estimate",
    "Fault",
    "Growth",
    "Jacobian",
    "Layer",
    "LinearOperator",
    "Matrix",
    "Measure",
    "ModelComparison",
    "Monitor",
    "MonitorWarning",
    "NonFiniteError",
    "NormCheck",
    "Positions",
    "Profile",
    "Repair",
    "Report",
    "Residual",
    "UnreadableError",
    "ZeroOutputError",
    "attention",
    "capture",
    "check",
    "check_norm",
    "compare",
    "compare_models",
    "coordinate_check",
    "diff",
    "effective_depth",
    "first_nonfinite",
    "frames",
    "growth",
    "gsc",
    "gsc_matrix",
    "initializers",
    "jacobian_coherence",
    "meanfield",
    "measure",
    "measures",
    "models",
    "nlc",
    "parameter_gsc",
    "plots",
    "probes",
    "qm_norm",
    "repair",
    "report",
    "report_frame",
    "residual",
    "sinks",
    "tap",
    "taylor_losses",
    "testing",
    "unsharded",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import ``plots`` on first use, because matplotlib and seaborn are slow to import."""
    if name == "plots":
        return importlib.import_module("gradscope.plots")
    raise AttributeError(f"module 'gradscope' has no attribute {name!r}")
