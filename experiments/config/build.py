"""Build the model and the data of a configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from experiments import seeds, targets
from experiments.config.schema import MeasureConfig
from experiments.data import own
from experiments.data.cifar10_files import IMAGE_SHAPE

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def call(cfg: Mapping[str, Any], name: str, **further: Any) -> Any:
    """Call ``_target_`` of the group ``name`` with the other keys as arguments."""
    make, values = targets.called(cfg, name)
    targets.check(make, values | further, name)
    return make(**values | further)


def model(cfg: Mapping[str, Any], seed: int, **further: Any) -> torch.nn.Module:
    """The model of a configuration, with weights from the generator of the seed."""
    generator = seeds.generator(seed, "model")
    make, _ = targets.called(cfg, "model")
    if "generator" in (targets.parameters(make) or {}):
        made = call(cfg, "model", **further, generator=generator)
    else:  # the model draws its weights from torch's global generator
        with torch.random.fork_rng():
            seeds.seed_torch(generator.initial_seed())
            made = call(cfg, "model", **further)
    if not isinstance(made, torch.nn.Module):
        raise TypeError(f"model._target_={cfg['_target_']} returned a {type(made).__name__}, not a torch.nn.Module.")
    return made


def network(cfg: MeasureConfig) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model and the batch of a configuration, on the configured device."""
    if cfg.mode not in ("train", "eval"):
        raise ValueError(f"mode must be train or eval, got {cfg.mode!r}.")
    if cfg.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {cfg.dtype!r}.")
    x = batch(cfg)
    sizes = {"in_features": math.prod(x.shape[1:])} if cfg.model.get("in_features", 0) is None else {}
    built = model(cfg.model, cfg.seed, **sizes)
    device, dtype = seeds.device(cfg.device), DTYPES[cfg.dtype]
    x = x.to(device, dtype if x.is_floating_point() else x.dtype)  # tokens are whole numbers
    return built.train(cfg.mode == "train").to(device, dtype), x


def batch(cfg: MeasureConfig) -> torch.Tensor:
    """The batch of a configuration; a dataset gives random samples."""
    make, arguments, generator = *targets.called(cfg.data, "data"), seeds.generator(cfg.seed, "data")
    shape = {} if isinstance(make, type) else {"shape": _sample_shape(cfg)}
    found = own.given(make, arguments, generator=generator, **shape)
    return own.batch(found, cfg.data.get("batch_size", 0), generator, f"data._target_={cfg.data['_target_']}")


def _sample_shape(cfg: MeasureConfig) -> tuple[int, ...]:
    """Shape of one sample of noise: the configured shape, or the shape of the model's input."""
    if cfg.data.get("shape") is not None:
        return tuple(cfg.data["shape"])
    if "in_features" in cfg.model:
        return (cfg.model["in_features"] or cfg.model["width"],)
    return IMAGE_SHAPE
