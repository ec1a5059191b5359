"""Mean-field theory of wide random networks: lengths, correlations, gradients, GSC, NLC, and critical points.

Needs no torch.  All rates are growth factors of GSC per layer, in the squared convention.

The theory holds at infinite width; rates measured at finite width deviate by O(1 / width).  Inputs are independent
unless ``correlation`` is given.  With batch normalization, the batch size must be much smaller than the width.
"""

from gradscope.meanfield.activations import NAMED, Activation, as_activation
from gradscope.meanfield.attention import RandomAttention, critical_score, random_attention
from gradscope.meanfield.batch import BatchMoments, batch_moments
from gradscope.meanfield.critical import (
    CriticalPoint,
    PhaseDiagram,
    critical_line,
    critical_point,
    phase_diagram,
    weight_gain,
)
from gradscope.meanfield.maps import DepthScales, MeanField
from gradscope.meanfield.prediction import LayerSpec, Prediction, predict, predict_mlp
from gradscope.meanfield.quadrature import gaussian, gaussian_pair
from gradscope.meanfield.rates import (
    elementwise_nlc,
    gsc_rate,
    log_gradient_variance,
    network_nlc,
    residual_rate,
    standard_variance,
)
from gradscope.meanfield.transformers import Transformer

__all__ = [
    "NAMED",
    "Activation",
    "BatchMoments",
    "CriticalPoint",
    "DepthScales",
    "LayerSpec",
    "MeanField",
    "PhaseDiagram",
    "Prediction",
    "RandomAttention",
    "Transformer",
    "as_activation",
    "batch_moments",
    "critical_line",
    "critical_point",
    "critical_score",
    "elementwise_nlc",
    "gaussian",
    "gaussian_pair",
    "gsc_rate",
    "log_gradient_variance",
    "network_nlc",
    "phase_diagram",
    "predict",
    "predict_mlp",
    "random_attention",
    "residual_rate",
    "standard_variance",
    "weight_gain",
]
