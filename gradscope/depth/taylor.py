"""``taylor_losses``: how many of the last layers can be replaced by their first-order expansion?

    g(theta; h) ~ g(theta_0; h) + dg/dtheta (theta_0; h) (theta - theta_0),   g the last n units, h their input

The expansion keeps only terms in which at most one of the n layers has changed.  If the loss stays the same, the other
terms, in which several layers change together, do not matter.  Reference: arXiv:1712.05577.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn
from torch.autograd import forward_ad

from gradscope import frames
from gradscope.choices import checked
from gradscope.depth.segments import Parameters, initial_parameters
from gradscope.forward.inputs import Batch, Forward, LossFunction
from gradscope.forward.interrupts import interruptible
from gradscope.forward.layers import module_name
from gradscope.forward.modules import recording_gradients, unwrap
from gradscope.forward.replay import Passive
from gradscope.jacobians.capture import Capture, capture


@checked
def taylor_losses(
    model: nn.Module,
    data: Any,
    *,
    initial: nn.Module | Parameters,
    loss_fn: LossFunction,
    forward: Forward | None = None,
) -> pd.DataFrame:
    """Mean loss of a trained network with its last n units linearized in their parameters, for n = 0, 1, 2, ...

    The output is expanded to first order in the change of the parameters of the last n units, from ``initial`` to
    their trained values.  The other units keep their trained parameters.

    Arguments:
        model, initial: As for `gradscope.effective_depth`.
        data, loss_fn, forward: As for `gradscope.gsc`; ``data`` must be one batch.

    Returns:
        A tidy frame of quantity ``taylor_loss``.  ``index`` is n, the number of linearized units; units without
        parameters do not count.  ``layer`` is the first linearized unit in execution order ("none" for n = 0).
        ``stderr_sample`` is the standard error of the mean over samples, as if they were independent.  A parameter that
        several units share keeps its trained value until all of these units are linearized.

    Cost: for each unit, one forward pass with forward-mode differentiation, which takes twice the work of a normal
    pass.

    Raises:
        ValueError: ``initial`` has other parameters than ``model`` or shares its memory, no unit has parameters, or the
            losses do not have shape (B,).
        NotImplementedError: torch has no forward-mode derivative of an operation in the model.

    >>> import copy, torch, gradscope as gs
    >>> model = gs.models.MLP(depth=2, width=3)
    >>> data = torch.ones(4, 3), torch.zeros(4, dtype=torch.long)
    >>> def losses(y, labels):
    ...     return torch.nn.functional.cross_entropy(y, labels, reduction="none")
    >>> taylor_losses(model, data, initial=copy.deepcopy(model), loss_fn=losses)["layer"].tolist()
    ['none', 'layers.1', 'layers.0']
    """
    model = unwrap(model)
    before = initial_parameters(model, initial)
    captured = capture(model, data, forward=forward, loss_fn=loss_fn)
    owned = _owned(captured)
    if not owned:
        raise ValueError("No unit of the network has parameters: no layer that leads to the output can be replaced.")
    replaced, rows = set[str](), []
    for name in ("none", *reversed(owned)):
        replaced |= owned.get(name, set())
        with interruptible() as whole, whole, recording_gradients():
            batch, _ = captured.replay.batch.differentiable()
            losses = loss_fn(_expanded(captured, batch, before, replaced), batch.labels).detach()
        rows.append((name, float(losses.double().mean()), _error(losses)))
    names, values, errors = zip(*rows, strict=True)
    columns = {"layer": list(names), "index": np.arange(len(rows)), "depth_from_output": 0, "quantity": "taylor_loss"}
    columns |= {"value": np.array(values), "log10_value": np.full(len(rows), np.nan), "stderr_sample": np.array(errors)}
    columns |= {"log10_stderr_probe": np.nan, "log10_stderr_sample": np.nan, "num_samples": captured.batch_size}
    return frames.tidy({**columns, "target": None, "reduction": None, "coupled": captured.coupled, "num_probes": 0})


def _owned(captured: Capture) -> dict[str, set[str]]:
    """Names of the parameters of each unit that has any, in execution order; a shared one belongs to the first."""
    names = {id(parameter): name for name, parameter in captured.replay.model.named_parameters()}
    owned: dict[str, set[str]] = {}
    for unit in captured.units:
        module = captured.replay.modules.get(module_name(unit.name))
        if module is not None and module is not captured.replay.model:
            own = {names[id(parameter)] for parameter in module.parameters()}.difference(*owned.values())
            owned |= {unit.name: own} if own else {}
    return owned


def _expanded(captured: Capture, batch: Batch, before: Parameters, replaced: Collection[str]) -> Tensor:
    """The output to first order in the change of the ``replaced`` parameters; the others keep their present values."""
    replay = captured.replay
    with warnings.catch_warnings(), forward_ad.dual_level():  # torch itself calls a deprecated function at first use
        warnings.filterwarnings("ignore", message=r"`torch.jit.script", category=DeprecationWarning)
        parameters = {}
        for name, parameter in replay.model.named_parameters():
            now, then = parameter.detach(), before[name].detach()
            base = (then if name in replaced else now).requires_grad_(parameter.requires_grad)
            parameters[name] = forward_ad.make_dual(base, now - then) if name in replaced else base
        try:
            output = replay.output(batch, Passive(), parameters)
        except (NotImplementedError, RuntimeError) as error:
            if not re.search(r"forward.(mode )?AD", str(error)):
                raise
            raise NotImplementedError(
                f"torch has no forward-mode derivative of one operation of the model: {str(error).splitlines()[0]} For "
                "attention, call taylor_losses under torch.nn.attention.sdpa_kernel(SDPBackend.MATH); your own "
                "autograd.Function needs a jvp."
            ) from error
        value, change = forward_ad.unpack_dual(output)
        return value if change is None else value + change


def _error(losses: Tensor) -> float:
    return float(losses.double().std()) / math.sqrt(len(losses)) if len(losses) > 1 else math.inf
