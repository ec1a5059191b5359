"""Statistics of a layer.  Each statistic is a frozen dataclass with options as fields; a call returns an `Estimate`.

This package also has functions that measure the symmetry of feature maps and outputs under translation.
"""

from gradscope.measures.activation import (
    DeadFraction,
    Kurtosis,
    LinearFitError,
    PreactivationMean,
    PreactivationStd,
    SampleCosine,
    SaturatedFraction,
    SignDiversity,
)
from gradscope.measures.gradient import (
    GradientCosine,
    GradientNorm,
    GradientRms,
    GradientToWeight,
    GradientZeroFraction,
    LayerGradient,
    SignalToNoise,
    UpdateToWeight,
)
from gradscope.measures.rank import EffectiveRank
from gradscope.measures.symmetry import argmax_agreement, contrast, equivariance_error, invariance_error, shifted

__all__ = [
    "DeadFraction",
    "EffectiveRank",
    "GradientCosine",
    "GradientNorm",
    "GradientRms",
    "GradientToWeight",
    "GradientZeroFraction",
    "Kurtosis",
    "LayerGradient",
    "LinearFitError",
    "PreactivationMean",
    "PreactivationStd",
    "SampleCosine",
    "SaturatedFraction",
    "SignDiversity",
    "SignalToNoise",
    "UpdateToWeight",
    "argmax_agreement",
    "contrast",
    "equivariance_error",
    "invariance_error",
    "shifted",
]
