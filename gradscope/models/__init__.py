"""Reference networks for experiments and tests.  The measuring code does not import this package."""

from gradscope.models.alexnet import AlexNetA, AlexNetB
from gradscope.models.gpt import GPT
from gradscope.models.mlp import MLP
from gradscope.models.resnet import ResNet

__all__ = ["GPT", "MLP", "AlexNetA", "AlexNetB", "ResNet"]
