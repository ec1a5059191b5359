"""Networks of all sizes and seeds, and their lengths in one tidy frame."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import nn
from torch.optim import Optimizer

from gradscope import frames
from gradscope.comparing.coordinates.matching import FIRST, Names, by_name, by_place
from gradscope.comparing.coordinates.measurement import GSC, Network, Task, measured, parts
from gradscope.comparing.coordinates.parametrizations import (
    DEPTH,
    EARLY,
    OUTPUT,
    STREAM,
    WIDTH,
    role_of,
)
from gradscope.forward.state import alone, same_draws


def swept(
    factory: Callable[..., Any], task: Task, axis: str, sizes: Sequence[int], fixed: Mapping[str, int],
    seeds: Sequence[int], report: Callable[[str], None],
) -> tuple[pd.DataFrame, type[Optimizer] | None]:  # fmt: skip
    """The tidy frame of the networks of all sizes and seeds, and the class of their optimizer.

    All sizes are measured with the first seed first, so that a factory that does not fit is found early.
    """
    parts: list[pd.DataFrame] = []
    for seed in seeds:
        networks = {size: _network(factory, task, {axis: size, **fixed}, seed, axis) for size in sorted(sizes)}
        if seed == seeds[0]:
            names = by_name(networks) if axis == WIDTH else by_place(networks)
            roles, optimizer = _roles(networks, names, axis), next(iter(networks.values())).optimizer
        parts += [
            _frame(network, names[size], roles, task).assign(axis=axis, size=size, seed=seed, **{axis: size}, **fixed)
            for size, network in networks.items()
        ]
        report(f"seed {seed}: {axis}s {', '.join(map(str, networks))}")
    return pd.concat(parts, ignore_index=True), optimizer


def _network(factory: Callable[..., Any], task: Task, given: Mapping[str, int], seed: int, axis: str) -> Network:
    _check_signature(factory, given)
    with alone, same_draws(None, seed) as draws, draws:
        model, optimizer = parts(factory(**given) if len(given) > 1 else factory(*given.values()), task.steps)
        try:
            return measured(model, optimizer, task, seed, trunk=axis == DEPTH)
        except ValueError as error:
            where = ", ".join(f"{name} {value}" for name, value in given.items())
            raise ValueError(f"At {where} and seed {seed}: {error}") from error


def _check_signature(factory: Callable[..., Any], given: Mapping[str, int]) -> None:
    """Raise TypeError if the factory does not take the width, or with ``depths`` width and depth by keyword."""
    form = ", ".join(f"{name}=" for name in given) if len(given) > 1 else next(iter(given))
    if isinstance(factory, nn.Module):
        raise TypeError(
            f"factory is a model, {type(factory).__name__}: give a function that builds one, called as factory({form})."
        )
    with contextlib.suppress(ValueError):  # a function written in C need not have a signature
        try:
            inspect.signature(factory).bind(**given) if len(given) > 1 else inspect.signature(factory).bind(1)
        except TypeError as error:
            raise TypeError(f"factory must be a function that is called as factory({form}): {error}.") from error


def _roles(networks: Mapping[int, Network], names: Mapping[int, Names], axis: str) -> dict[str, str]:
    """The role of each layer by its common name, in execution order."""
    small, large = networks[min(networks)], networks[max(networks)]
    roles = {}
    for own, name in names[min(networks)].items():
        if axis == WIDTH:
            roles[name] = role_of(small.shapes[own], large.shapes[own], target=own == small.target)
        else:
            roles[name] = OUTPUT if own == small.target else EARLY if FIRST in name.split(".") else STREAM
    return roles


def _frame(network: Network, names: Names, roles: Mapping[str, str], task: Task) -> pd.DataFrame:
    """The tidy frame of one network, with layers under their common names."""
    rows = [(names[own], *key, value) for (own, *key), value in network.log10_values.items() if own in names]
    layer, quantity, step, log10_value = zip(*rows, strict=True)
    places = {name: place for place, name in enumerate(roles, start=1)}
    index = np.array([places[name] for name in layer])
    probed = np.array(quantity) == GSC
    columns = {
        "layer": layer, "index": index, "depth_from_output": len(roles) - index, "quantity": quantity,
        "target": [network.target if own else None for own in probed], "log10_value": log10_value,
        "log10_stderr_probe": np.where(probed, np.nan, 0.0), "num_probes": np.where(probed, task.probes, 0),
        "num_samples": task.batch.size,
    }  # fmt: skip
    return frames.tidy(columns).assign(step=step, role=[roles[name] for name in layer])
