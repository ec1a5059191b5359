"""Batches of images, text and noise; configurations name these functions as ``experiments.data.NAME``."""

from experiments.data.batches import cifar10, digits, digits_8x8, noise
from experiments.data.corpus import text
from experiments.data.own import arrays, folder

__all__ = ["arrays", "cifar10", "digits", "digits_8x8", "folder", "noise", "text"]
