"""`check_norm(model, logged)`: whether a logged gradient norm is the norm of the whole gradient, or what else it is.

The global norm is |g| = sqrt(sum over parameters p of |g_p|^2), where g_p is the whole gradient in ``.grad``: all parts
of a DTensor, or the mean over processes if these hold different gradients of the same parameter.

Cost: three passes over the gradient, and three sums over all processes per sharded parameter; one more pass and sum if
the gradient was not averaged.  No forward or backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from gradscope import distributed
from gradscope.choices import Level, Positive, checked, shown
from gradscope.comparing.norms.guesses import (
    CLIPPED,
    GLOBAL,
    LOCAL,
    OTHER,
    ROOT,
    SCALED,
    WORLD,
    Guess,
    gradient_of,
    guesses,
    root,
)
from gradscope.forward.modules import unwrap

UNDECIDED, UNKNOWN = "undecided", "unknown"
WAYS_OUT = {
    GLOBAL: "",
    LOCAL: "Sum its square over all processes (DTensor: norm.full_tensor()), or log it after gradients are averaged.",
    WORLD: "Average over the processes exactly once.",
    ROOT: "Sum squares over processes only if these hold different parts of the gradient.",
    CLIPPED: "Log the norm that clip_grad_norm_ returns: it is the one before clipping.",
    SCALED: "Call scaler.unscale_(optimizer) exactly once before the norm is computed.",
    OTHER: "Log torch.nn.utils.get_total_norm of all gradients.",
}
DECIDED_BY = {
    LOCAL: "with at least two processes",
    WORLD: "with at least two processes",
    ROOT: "with at least two processes",
    CLIPPED: "before clipping, in a step that clipping changes",
    SCALED: "while the loss scale is not 1",
}


@dataclass(frozen=True)
class NormCheck:
    """Which norm of the gradient a logged number is; made by `gradscope.check_norm`, and the same in every process.

    - ``verdict``: a kind of norm that `gradscope.check_norm` lists, such as "global" or "clipped".  "undecided" if
      norms of several kinds equal the logged number, and "unknown" if none does.
    - ``logged``: the logged number; of the first process that gave one.
    - ``norm``: the global norm.
    - ``fits``: descriptions of the norms that equal the logged number.
    - ``rtol``: largest relative difference of numbers that are taken as equal.
    - ``advice``: what to do.

    >>> import gradscope as gs
    >>> print(gs.NormCheck("clipped", 1.0, 2.0, ("the norm after clipping",), 1e-6, "Log the norm before clipping."))
    clipped: the logged norm 1 is 0.5 times the global norm 2.
    It is the norm after clipping.
    Log the norm before clipping.
    """

    verdict: str
    logged: float
    norm: float
    fits: tuple[str, ...]
    rtol: float
    advice: str

    @property
    def ratio(self) -> float:
        """The logged norm divided by the global one; NaN if both are 0."""
        return self.logged / self.norm if self.norm else math.inf if self.logged else math.nan

    def __str__(self) -> str:
        first = f"{self.verdict}: the logged norm {self.logged:.6g} is {self.ratio:.6g} times the global norm"
        fits = f"It is {' or '.join(self.fits)}." if self.fits else ""
        return "\n".join(filter(None, (f"{first} {self.norm:.6g}.", fits, self.advice)))


@checked
def check_norm(
    model: nn.Module,
    logged: Any,
    *,
    scaler: GradScaler | None = None,
    max_norm: Positive | None = None,
    rtol: Level | None = None,
) -> NormCheck:
    """Return which norm a logged number is: the global norm |g| of the gradient g in ``.grad``, or another one.

    Call `check_norm` after ``backward()``, before the gradient is clipped or set to zero.  To check the number that
    ``clip_grad_norm_`` returns, first call ``clip_grad_norm_`` with an infinite bound, which clips nothing (see the
    example).  With a ``GradScaler``, give ``scaler=`` and call `check_norm` before ``scaler.update()``.  It does not
    matter whether ``scaler.unscale_`` comes before or after `check_norm`.  Under ``torch.distributed``, all processes
    must call `check_norm`.  Parameters must then be DTensors (FSDP2, tensor parallelism) or replicas (DDP).

    These kinds of norms are recognized:

    - "global": |g|.
    - "local": the norm of the gradient in one process: of its shards only, or before gradients are averaged over
      processes.
    - "times world size": |g| multiplied or divided by the number of processes.
    - "times root of world size": |g| multiplied or divided by the square root of the number of processes.
    - "clipped": |g| after clipping to ``max_norm``.
    - "loss scale": |g| multiplied or divided by the scale of ``scaler``.
    - "another norm": one of these numbers; ``fits`` says which.  (1) |g|^2.  (2) The largest absolute value, the sum of
      absolute values, or the root mean square of all entries of g.  (3) The largest, the sum, the mean, or the root
      mean square of the gradient norms of all parameters.  (4) The sum, the mean, or the root of the summed squares of
      the gradient norms of all processes.  (5) |g| with tied parameters counted twice.  (6) The gradient norm of
      some parameters only: those in one module, those outside of one module, those with two or more dimensions, those
      with fewer, or those not frozen.

    Arguments:
        model: Any module with gradients, also wrapped or sharded.
        logged: The number that this process logs: a float, or a tensor with one entry.  For a DTensor, its
            ``full_tensor()`` is used.  None in processes that log nothing.
        scaler: The ``GradScaler``, if there is one.  If ``scaler.unscale_`` was not yet called in this step,
            the gradient g is ``.grad`` divided by the scale.
        max_norm: The largest norm, if the training clips.
        rtol: Largest relative difference of numbers that are taken as equal.  A number from a log has few digits: for
            0.225, give 0.003.  Default: 4e-6, for sums in float32, plus the machine epsilon of the gradient's dtype.

    Returns:
        A `NormCheck`.  A norm is accepted if it equals the logged number in all processes.  The norms in (5) and (6)
        above are tried only if the probability that one of them equals the logged number by chance is below 1 %.

    Raises:
        ValueError: There is no gradient; the gradient holds NaN or Inf; ``logged`` is invalid; ``logged`` is None in
            all processes; or a parameter differs between processes and is no DTensor.

    >>> import math, torch, gradscope as gs
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model(torch.tensor([[3.0, 4.0]])).sum().backward()
    >>> logged = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)  # returns the norm and clips nothing
    >>> gs.check_norm(model, logged).verdict
    'global'

    A norm that was computed after clipping:

    >>> print(gs.check_norm(model, 1.0, max_norm=1.0))
    clipped: the logged norm 1 is 0.2 times the global norm 5.
    It is the norm after clipping to max_norm=1.
    Log the norm that clip_grad_norm_ returns: it is the one before clipping.
    """
    model, own = unwrap(model, sharded=True), _number(logged)
    scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else None
    gradient = gradient_of(model, 1.0 if scaler is None or scale is None or _unscaled(scaler) else scale)
    found = distributed.gathered((own, root(gradient.own.values())))
    numbers, parts = [number for number, _ in found], [part for _, part in found]
    first = next((number for number in numbers if number is not None), None)
    if first is None:
        raise ValueError("logged is None in every process: give the number in those that log it.")
    rounding = max((torch.finfo(p.grad.dtype).eps for p in model.parameters() if p.grad is not None), default=0.0)
    rtol = rtol or 32 * torch.finfo(torch.float32).eps + rounding

    def fits(guess: Guess) -> bool:
        pairs = zip(numbers, guess.values, strict=True)
        return all(number is None or math.isclose(number, value, rel_tol=rtol) for number, value in pairs)

    fitting = [guess for guess in guesses(model, gradient, parts, scale, max_norm, rtol) if fits(guess)]
    kinds = dict.fromkeys(guess.kind for guess in fitting)
    verdict = UNKNOWN if not kinds else UNDECIDED if len(kinds) > 1 else next(iter(kinds))
    if verdict == UNKNOWN:
        advice = _hint(numbers, gradient.norm, max_norm, scale, rtol)
    elif verdict == UNDECIDED:
        ways = dict.fromkeys(DECIDED_BY[kind] for kind in kinds if kind in DECIDED_BY)
        advice = f"Check again {' and '.join(ways)}." if GLOBAL in kinds else "Check again in another step."
    else:
        advice = WAYS_OUT[verdict]
    return NormCheck(verdict, first, gradient.norm, tuple(dict.fromkeys(g.text for g in fitting)), rtol, advice)


def _number(logged: Any) -> float | None:
    """The logged number of this process."""
    if logged is None:
        return None
    if isinstance(logged, Tensor):
        logged = (logged.full_tensor() if distributed.is_shard(logged) else logged).detach()  # type: ignore[attr-defined]
        logged = logged.item() if logged.numel() == 1 else logged
    try:
        number = float(logged) if isinstance(logged, SupportsFloat) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(
            f"logged must be the norm that this process logged, a finite number >= 0, or None; got {shown(logged)}."
        )
    return number


def _unscaled(scaler: GradScaler) -> bool:
    """Whether ``scaler.unscale_`` has been called since the last update; torch does not say so publicly."""
    return any(state["stage"].name != "READY" for state in scaler._per_optimizer_states.values())


def _hint(
    numbers: Sequence[float | None], norm: float, max_norm: float | None, scale: float | None, rtol: float
) -> str:
    """What may explain a number that nothing explains."""
    known = [number for number in numbers if number is not None]
    if max_norm is not None and math.isclose(norm, max_norm, rel_tol=1e-5):
        return "The gradient has the length max_norm, so it was clipped: call check_norm before clip_grad_norm_."
    if any(number != known[0] for number in known):
        return "The processes log different numbers, so not all of them are the global norm."
    rounding, hints = _rounding(known[0]), []
    if rounding > rtol and abs(known[0] - norm) <= 1.01 * rounding * known[0]:
        hints.append(f"If {known[0]!r} is a rounded number, give rtol={_rounded_up(rounding):g}.")
    lacking = [name for name, value in (("max_norm", max_norm), ("scaler", scale)) if value is None]
    if lacking:
        hints.append(f"Give {' and '.join(f'{name}=' for name in lacking)} if the training has one.")
    return " ".join(hints)


def _rounding(number: float) -> float:
    """Largest relative error of a number that was rounded to the digits with which Python prints it."""
    last = Decimal(repr(number).removesuffix(".0")).as_tuple().exponent
    return float(Decimal((0, (5,), int(last) - 1))) / number if number else 0.0


def _rounded_up(number: float) -> float:
    """The next larger number with one digit."""
    unit = Decimal((0, (1,), math.floor(math.log10(number))))
    return float(math.ceil(Decimal(number) / unit) * unit)
