"""Batches of images and noise; configurations name these functions as ``experiments.data.NAME``."""

from experiments.data.batches import cifar10, digits, digits_8x8, noise

__all__ = ["cifar10", "digits", "digits_8x8", "noise"]
