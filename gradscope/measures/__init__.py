"""Per-layer statistics, one small frozen dataclass each: fields are the configuration, calls are pure."""

from gradscope.measures.activation import (
    DeadFraction,
    EffectiveRank,
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
]
