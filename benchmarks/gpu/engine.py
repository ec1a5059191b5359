"""Coefficients of three networks, compared with one forward and backward pass and with ``vmap(jacrev)``."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import gradscope as gs
from benchmarks.large import Large, gpt2, resnet50
from benchmarks.race import peers
from benchmarks.race.chains import Chain, mlp
from benchmarks.race.speed import EXACT, JACREV, MATRIX, PASS, PROFILE
from benchmarks.tables.rows import Row, timed
from benchmarks.tables.timing import Contestant, race

PARAMETERS, MEASURE = "parameter profile, 1 probe", "statistics of all layers"
Call = Callable[[], Any]


class Reads(TorchDispatchMode):
    """Counts values that the CPU reads one by one; on a CPU, copies of whole tensors are not visible."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def blocking_reads(call: Call, device: torch.device) -> int:
    """How often one call makes the CPU wait for the device."""
    if device.type != "cuda":
        with Reads() as reads:
            call()
        return reads.num
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


def rows(device: torch.device, quick: bool, repeats: int) -> Iterator[list[Row]]:
    """Times of each network's coefficients over one forward and backward pass, and blocking reads."""
    chain = on(mlp(*((4, 16, 8) if quick else (50, 1000, 128))), device)
    calls = {PASS: chain.forward_backward, **coefficients(chain.model, chain.x), **exact(chain)}
    yield measured("MLP 4 x 16" if quick else "MLP 50 x 1000, batch 128", calls, device, repeats)
    for name, large in (
        ("ResNet-50, batch 32 at 224", resnet50(quick, samples=32)),
        ("GPT-2 small, 8 x 512 tokens", gpt2(quick, samples=8, tokens=512)),
    ):
        batch = {key: value.to(device) for key, value in large.batch.items()}
        moved = Large(large.model.to(device), batch)
        calls = {PASS: moved.forward_backward, **coefficients(moved.model, batch)}
        if "input_ids" in batch:
            del calls[MEASURE]  # it needs modules of torch.nn as nonlinearities
        yield measured(name, calls, device, repeats)


def coefficients(model: torch.nn.Module, data: Any) -> dict[str, Call]:
    """What gradscope measures of a network."""
    return {
        PROFILE: lambda: gs.gsc(model, data, probes=1),
        MATRIX: lambda: gs.gsc_matrix(model, data, probes=1),
        PARAMETERS: lambda: gs.parameter_gsc(model, data, probes=1),
        MEASURE: lambda: gs.measure(model, data),
    }


def exact(chain: Chain) -> dict[str, Call]:
    """The exact profile of the first ten outputs, by gradscope and by ``vmap(jacrev)``."""
    head = torch.nn.Linear(chain.x.shape[1], 10, device=chain.x.device)
    short = Chain(
        torch.nn.Sequential(*chain.modules.values(), head), OrderedDict(chain.modules) | {"head": head}, chain.x
    )
    return {
        EXACT: lambda: gs.gsc(short.model, short.x, probes="exact"),
        JACREV: lambda: peers.vmap_jacrev(short),
    }


def measured(name: str, calls: dict[str, Call], device: torch.device, repeats: int) -> list[Row]:
    """Times of one network in turns, and the blocking reads of each call."""
    times = race([Contestant(what, call) for what, call in calls.items()], repeats)
    reads = [
        Row(name, "blocking reads", what, "count", blocking_reads(call, device)) for what, call in calls.items()
        if what not in (PASS, JACREV)
    ]  # fmt: skip
    return [*timed(name, "", times, PASS), *reads]


def on(chain: Chain, device: torch.device) -> Chain:
    """The chain on the device.  Its modules are parts of the model, so they move with it."""
    x: Tensor = chain.x.to(device)
    return Chain(chain.model.to(device), chain.modules, x)
