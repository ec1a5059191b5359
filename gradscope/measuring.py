"""``measure(model, x)``: statistics of every layer's pre-activations, from one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gradscope import frames
from gradscope.estimates import Estimate
from gradscope.inputs import Forward, as_batch, check_devices
from gradscope.measures import PreactivationStd, SignDiversity
from gradscope.modules import state_restored, unwrap

# Elementwise nonlinearities of torch.nn.  Classes, because "what the nonlinearity receives" is a question about roles;
# gradients never depend on this list.
NONLINEARITIES = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid,
    nn.Mish, nn.PReLU, nn.ReLU, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign,
    nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip


class Measure(Protocol):
    """A statistic of one layer: the name of its quantity, and a pure function of the pre-activations (B, ...)."""

    @property
    def quantity(self) -> str:
        """Name of the statistic in a frame."""

    def __call__(self, preactivations: Tensor) -> Estimate:
        """The statistic with its standard error over samples."""


DEFAULT_MEASURES: tuple[Measure, ...] = (PreactivationStd(), SignDiversity())


def measure(
    model: nn.Module,
    data: Any,
    *,
    forward: Forward | None = None,
    measures: Sequence[Measure] = DEFAULT_MEASURES,
) -> pd.DataFrame:
    """Statistics of what every nonlinearity of the model receives, as a tidy frame.

    Arguments:
        model: Any module whose nonlinearities are modules of torch.nn; it is left exactly as it was.
        data: A tensor (B, ...), or a mapping; with ``forward`` anything.
        forward: ``(model, batch) -> output``.
        measures: Statistics to take, each a callable (B, ...) -> `Estimate`.

    Returns:
        One row a call of a nonlinearity and measure; ``index`` counts those calls from 1, ``log10_stderr_sample`` is
        the sampling error over the batch.  Cost: one forward pass without gradients.

    Raises:
        ValueError: No nonlinearity fired, or bad data.
    """
    model = unwrap(model)
    batch = as_batch(data, forward=forward, loss_fn=None)
    modules = dict(model.named_modules())
    if forward is None:
        check_devices(modules, batch)
    found: list[tuple[str, list[Estimate]]] = []

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            received = args[0] if args else kwargs["input"]
            found.append((name, [statistic(received) for statistic in measures]))

        return hook

    handles = []
    try:
        for name, module in modules.items():
            if isinstance(module, NONLINEARITIES):
                handles.append(module.register_forward_pre_hook(listen(name), with_kwargs=True))
        with state_restored(modules), torch.no_grad():
            batch.run(model, forward)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError(
            f"No nonlinearity module fired in {type(model).__name__}: functional calls such as F.relu are not seen; "
            "use nn.ReLU() and the like as modules."
        )
    index = np.arange(1, len(found) + 1)
    parts = [
        frames.tidy(
            {
                "layer": [name for name, _ in found],
                "index": index,
                "depth_from_output": len(found) - index,
                "target": None,
                "quantity": statistic.quantity,
                "log10_value": [values[number].log10_value for _, values in found],
                "log10_stderr_probe": 0.0,
                "log10_stderr_sample": [values[number].log10_stderr for _, values in found],
                "reduction": None,
                "coupled": None,
                "num_probes": 0,
                "num_samples": batch.size,
            }
        )
        for number, statistic in enumerate(measures)
    ]
    return pd.concat(parts, ignore_index=True)
