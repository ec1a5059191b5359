"""The network of a configuration, and the batch that it is measured on."""

from __future__ import annotations

import math

import torch

from experiments import build, run
from experiments.cifar10 import IMAGE_SHAPE
from experiments.config import MeasureConfig

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def network(cfg: MeasureConfig) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model and the batch that a configuration describes, on its device."""
    if cfg.mode not in ("train", "eval"):
        raise ValueError(f"mode must be train or eval, got {cfg.mode!r}.")
    if cfg.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {cfg.dtype!r}.")
    x = build.call(cfg.data, shape=_sample_shape(cfg), generator=run.generator(cfg.seed, "data"))
    sizes = {}
    if cfg.model.get("in_features", 0) is None:
        sizes["in_features"] = math.prod(x.shape[1:])
    model = build.model(cfg.model, cfg.seed, **sizes)
    device, dtype = run.device(cfg.device), DTYPES[cfg.dtype]
    return model.train(cfg.mode == "train").to(device, dtype), x.to(device, dtype)


def _sample_shape(cfg: MeasureConfig) -> tuple[int, ...]:
    """Shape of one sample of noise: as configured, or what the model takes."""
    if cfg.data.get("shape") is not None:
        return tuple(cfg.data["shape"])
    if "in_features" in cfg.model:
        return (cfg.model["in_features"] or cfg.model["width"],)
    return IMAGE_SHAPE
