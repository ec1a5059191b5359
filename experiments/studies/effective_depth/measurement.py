"""Train networks on digits, and measure how much of their depth the trained networks use."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradscope as gs
from experiments.data.batches import digits_8x8_with_labels
from gradscope.frames import observed

MOMENTUM = 0.9
# Effective depth is measured after these steps and at the end of training.
RECORDED = tuple(2**power for power in range(20))
# PROBES: random cotangents if samples are coupled. TRIED: training digits for losses with replaced layers.
PROBES, TRIED = 8, 256
TOLERANCES = (1e-6, 1e-3)

Digits = tuple[Tensor, Tensor]


def measure(
    model: nn.Module, x: Tensor, *, generator: torch.Generator,
    steps: int, train_batch_size: int, learning_rates: Sequence[float],
) -> pd.DataFrame:  # fmt: skip
    """Accuracy, effective depth during training, and losses with replaced layers.

    The learning rate is the one with the lowest final training loss.

    Arguments:
        model: An MLP with 64 inputs and ten outputs. A copy of the MLP is trained in float32.
        x: The digits on which effective depths are measured, in float64.
        generator: Draws the order of the training digits. All learning rates use the same order.
        steps, train_batch_size, learning_rates: Options of SGD with momentum `MOMENTUM`. All learning rates are tried.
    """
    pixels, labels = digits_8x8_with_labels()
    held_out = torch.arange(len(pixels)) % 4 == 3
    digits, test = (pixels[~held_out], labels[~held_out]), (pixels[held_out], labels[held_out])
    order = torch.randint(len(digits[0]), (steps, train_batch_size), generator=generator)
    tried = [(descend(model, digits, order, rate), rate) for rate in learning_rates]
    ends = [loss_of(states[-1], digits) if len(states) > 1 else math.inf for states, _ in tried]
    if math.isinf(min(ends)):  # Training diverged with every rate: a result, not an error.
        return observed("train_loss", math.inf, num_samples=len(digits[0]), step=steps)
    states, rate = tried[int(np.argmin(ends))]
    recorded = [step for step in RECORDED if step < steps] + [steps]
    parts = [
        observed("learning_rate", rate),
        observed("train_loss", min(ends), num_samples=len(digits[0]), step=steps),
        observed("test_accuracy", accuracy_of(states[-1], test), num_samples=len(test[0]), step=steps),
    ]
    coupled = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    before, probes = _double(model), PROBES if coupled else "exact"
    for step, state in zip(recorded, states[1:], strict=True):
        found = gs.effective_depth(_double(state), x.double(), initial=before, probes=probes)
        for tolerance in TOLERANCES:
            values = (found.at(tolerance), *found.interval(tolerance))
            for end, value in zip(("", "_low", "_high"), values, strict=True):
                parts.append(observed(f"effective_depth{end}", value, step=step, tolerance=tolerance))
        parts.append(observed("independent_depth", _independent(found), step=step, tolerance=TOLERANCES[0]))
    some = digits[0][:TRIED].double(), digits[1][:TRIED]
    losses = gs.taylor_losses(_double(states[-1]), some, initial=before, loss_fn=_losses)
    return pd.concat([*parts, *(rows.assign(step=steps) for rows in (found.to_frame(), losses))], ignore_index=True)


def descend(model: nn.Module, digits: Digits, order: Tensor, rate: float) -> list[nn.Module]:
    """Copies of the network before training, at recorded steps and at the end; only the first if training diverged."""
    network, steps = copy.deepcopy(model).float(), len(order)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=MOMENTUM)
    states = [copy.deepcopy(network)]
    for step, chosen in enumerate(order, start=1):
        loss = _losses(network(digits[0][chosen]), digits[1][chosen]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in RECORDED or step == steps:
            if not torch.isfinite(loss):
                return states[:1]
            states.append(copy.deepcopy(network))
    return states if math.isfinite(loss_of(network, digits)) else states[:1]


@torch.no_grad()
def loss_of(model: nn.Module, digits: Digits) -> float:
    """Mean cross-entropy of all digits, evaluated as one batch."""
    return float(_losses(model(digits[0]), digits[1]).mean())


@torch.no_grad()
def accuracy_of(model: nn.Module, digits: Digits) -> float:
    """Fraction of correctly classified digits. Batch normalization uses the statistics of all digits."""
    return float((model(digits[0]).argmax(dim=1) == digits[1]).double().mean())


def _losses(output: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(output, labels, reduction="none")


def _double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def _independent(found: gs.EffectiveDepth) -> int:
    """The effective depth that layers with independent directions would have."""
    return int(np.flatnonzero(found.log10_independent >= math.log10(TOLERANCES[0])).max(initial=0))
