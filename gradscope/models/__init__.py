"""Reference networks for experiments and tests; the measuring half of gradscope never imports them."""

from gradscope.models.alexnet import AlexNetA, AlexNetB
from gradscope.models.mlp import MLP
from gradscope.models.resnet import ResNet

__all__ = ["MLP", "AlexNetA", "AlexNetB", "ResNet"]
