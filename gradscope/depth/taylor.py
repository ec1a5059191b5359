"""``taylor_losses``: how many of the last layers can be replaced by their first-order expansion?

    g(theta; h) ~ g(theta_0; h) + dg/dtheta (theta_0; h) (theta - theta_0),   g the last n units, h what enters them

The expansion keeps the terms in which a single one of the n layers has learned.  If the loss stays the same, training
used no composition of these layers.  Exact.  See G. Philipp, D. Song and J. Carbonell (arXiv:1712.05577).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gradscope import frames
from gradscope.depth.segments import Parameters, initial_parameters
from gradscope.forward.inputs import Forward, LossFunction
from gradscope.forward.layers import module_name
from gradscope.forward.modules import unwrap
from gradscope.forward.replay import Passive
from gradscope.jacobians.capture import Capture, capture


def taylor_losses(
    model: nn.Module,
    data: Any,
    *,
    initial: nn.Module | Parameters,
    loss_fn: LossFunction,
    forward: Forward | None = None,
) -> pd.DataFrame:
    """Mean loss of a trained network with its last 0, 1, 2, ... units replaced by one first-order expansion.

    Arguments:
        model, initial: As for `gradscope.effective_depth`.
        data, loss_fn, forward: As for `gradscope.gsc`, one batch.

    Returns:
        A tidy frame of quantity ``taylor_loss``: ``index`` is the number of units replaced, of those that have
        parameters, and ``layer`` the lowest of them ("none" for 0); ``stderr_sample`` the error of the mean over
        samples, which counts them as independent.  A parameter that several units share counts with the lowest of them,
        so it keeps its present value until all of them are replaced.

    Cost: one forward pass of twice the work per unit (forward-mode differentiation).

    Raises:
        ValueError: ``initial`` is another model, no unit has parameters, or there is not one loss per sample.
        NotImplementedError: torch has no forward-mode derivative of an operation.
    """
    model = unwrap(model)
    before = initial_parameters(model, initial)
    captured = capture(model, data, forward=forward, loss_fn=loss_fn)
    owned = _owned(captured)
    if not owned:
        raise ValueError("No unit of the network has parameters, so there is nothing to replace.")
    labels, replaced, rows = captured.replay.batch.labels, set[str](), []
    for name in ("none", *reversed(owned)):
        replaced |= owned.get(name, set())
        with torch.no_grad():
            losses = loss_fn(_expanded(captured, before, replaced), labels)
        rows.append((name, float(losses.double().mean()), _error(losses)))
    names, values, errors = zip(*rows, strict=True)
    columns = {"layer": list(names), "index": np.arange(len(rows)), "depth_from_output": 0, "quantity": "taylor_loss"}
    columns |= {"value": np.array(values), "log10_value": np.full(len(rows), np.nan), "stderr_sample": np.array(errors)}
    columns |= {"log10_stderr_probe": np.nan, "log10_stderr_sample": np.nan, "num_samples": captured.batch_size}
    return frames.tidy({**columns, "target": None, "reduction": None, "coupled": captured.coupled, "num_probes": 0})


def _owned(captured: Capture) -> dict[str, set[str]]:
    """Names of the parameters of each unit that has any, in execution order; a shared one counts for the lowest."""
    names = {id(parameter): name for name, parameter in captured.replay.model.named_parameters()}
    owned: dict[str, set[str]] = {}
    for unit in captured.units:
        module = captured.replay.modules.get(module_name(unit.name))
        if module is not None and module is not captured.replay.model:
            own = {names[id(parameter)] for parameter in module.parameters()}.difference(*owned.values())
            owned |= {unit.name: own} if own else {}
    return owned


def _expanded(captured: Capture, before: Parameters, replaced: Collection[str]) -> Tensor:
    """The output, to first order in the change of the ``replaced`` parameters, at the present values of the others."""
    replay = captured.replay
    with warnings.catch_warnings(), forward_ad.dual_level():
        # On first use of forward mode torch compiles its own formulas in a deprecated way.
        warnings.filterwarnings("ignore", message=r"`torch.jit.script", category=DeprecationWarning)
        parameters = {}
        for name, parameter in replay.model.named_parameters():
            now, then = parameter.detach(), before[name].detach()
            parameters[name] = forward_ad.make_dual(then, now - then) if name in replaced else now
        try:
            output = replay.output(replay.batch, Passive(), parameters)
        except (NotImplementedError, RuntimeError) as error:
            if not re.search(r"forward.(mode )?AD", str(error)):
                raise
            raise NotImplementedError(
                f"torch has no forward-mode derivative of one operation of the model: {str(error).splitlines()[0]} For "
                "attention, call this under torch.nn.attention.sdpa_kernel(SDPBackend.MATH); a function of your own "
                "needs a jvp."
            ) from error
        value, change = forward_ad.unpack_dual(output)
        return value if change is None else value + change


def _error(losses: Tensor) -> float:
    return float(losses.double().std()) / math.sqrt(len(losses)) if len(losses) > 1 else math.inf
