"""From a configuration to what it describes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from copy import deepcopy
from functools import cache, partial
from typing import Any

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from experiments import run
from experiments.recipe import MakeOptimizer


def call(cfg: Mapping[str, Any], **further: Any) -> Any:
    """``_target_`` with the other keys as arguments; unlike Hydra's own ``instantiate`` it leaves errors readable."""
    return get_object(cfg["_target_"])(**(_arguments(cfg) | further))


def model(cfg: Mapping[str, Any], seed: int, **further: Any) -> torch.nn.Module:
    """The model of a configuration, with weights from the seed's own generator.

    A class that takes no ``generator`` draws from torch's global one, which is seeded for it and put back.
    """
    generator = run.generator(seed, "model")
    if _takes_generator(cfg["_target_"]):
        made = call(cfg, **further, generator=generator)
    else:
        with torch.random.fork_rng():
            run.seed_torch(generator.initial_seed())
            made = call(cfg, **further)
    if not isinstance(made, torch.nn.Module):
        raise TypeError(f"model._target_={cfg['_target_']} made a {type(made).__name__}, not a torch.nn.Module.")
    return made


def optimizer(cfg: DictConfig) -> MakeOptimizer:
    """The optimizer of a configuration, short of the parameters.

    Raises:
        ValueError: It takes other arguments; those of ``optimizer=sgd`` stay where only the class is replaced.
    """
    made_by, arguments = get_object(cfg._target_), _arguments(cfg)
    taken = inspect.signature(made_by).parameters.values()
    foreign = sorted(arguments.keys() - {parameter.name for parameter in taken})
    if foreign and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        away = " ".join(f"~optimizer.{key}" for key in foreign)
        raise ValueError(f"optimizer._target_={cfg._target_} takes no {' and no '.join(foreign)}: leave out {away}.")
    return partial(made_by, **arguments)


@cache
def _takes_generator(path: str) -> bool:
    try:
        return "generator" in inspect.signature(get_object(path)).parameters
    except ValueError:  # a class written in C has no signature
        return False


def _arguments(cfg: Mapping[str, Any]) -> dict[str, Any]:
    # A copy, because what is called may change a list that it is given, and the next seed is given it too.
    values: Any = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else deepcopy(cfg)
    return {key: value for key, value in values.items() if key != "_target_"}
