"""Deliver values to sinks.  A sink that fails causes one warning and never stops a training."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import pandas as pd

from gradscope.choices import checked, require, shown, stacklevel

Values = Mapping[str, float]

FORBIDDEN = re.compile(r"[^/\w.\- ]")  # not allowed in names of MLflow metrics, such as the # of "layer#2"
MOST_SINKS = 1000
MOST_FAILURES = 3  # in a row; then a sink is given up, because each attempt may wait for a server


class SinkWarning(UserWarning):
    """Warning that records do not reach a sink; the message names the sink.

    >>> import gradscope as gs
    >>> issubclass(gs.sinks.SinkWarning, UserWarning)
    True
    """


def allowed(values: Values) -> dict[str, float]:
    """The values under names that MLflow allows."""
    return {FORBIDDEN.sub("-", name): value for name, value in values.items()}


def _scalars(target: Any, step: int, values: Values) -> None:
    for name, value in values.items():
        target.add_scalar(name, value, step)
    target.flush()


# How to write to an object whose method of this name takes these arguments; the first such method counts.
WAYS: dict[str, Callable[[Any, int, Values], object]] = {
    "write": lambda target, step, values: target.write(step, values),
    "log_metrics": lambda target, step, values: target.log_metrics(allowed(values), step=step),
    "log": lambda target, step, values: target.log(dict(values), step=step),
    "add_scalar": _scalars,
}


STEP: dict[str, Any] = {"step": 0}
CALLED: dict[str, tuple[Sequence[Any], dict[str, Any]]] = {
    "write": ((0, {}), {}), "log_metrics": (({},), STEP), "log": (({},), STEP), "add_scalar": (("", 0.0, 0), {}),
}  # fmt: skip


def _takes(target: Any, name: str) -> bool:
    """Whether a target has this method with these arguments: tensors and ``math`` have another ``log``."""
    args, kwargs = CALLED[name]
    try:
        return bool(inspect.signature(getattr(target, name)).bind(*args, **kwargs))
    except (AttributeError, TypeError, ValueError):  # functions written in C need not have a signature
        return False


@dataclass
class _Outlet:
    """One sink, its way of writing, and how often it failed in a row."""

    target: Any
    send: Callable[[Any, int, Values], object]
    failures: int = 0
    reported: bool = False

    def attempt(self, action: Callable[[], object]) -> None:
        """Run the action; an error causes a warning, unless this sink caused one before."""
        try:
            action()
            self.failures = 0
        except Exception as error:
            self.failures += 1
            if not self.reported:
                self.reported = True
                kind = type(self.target)
                name = getattr(self.target, "__name__", f"{kind.__module__.split('.')[0]}.{kind.__name__}")
                warnings.warn(
                    f"Sink {name} failed: {type(error).__name__}: {str(error)[:200]}. Training continues. Later "
                    f"records are still sent, until {MOST_FAILURES} in a row fail; no further warning follows.",
                    SinkWarning,
                    stacklevel=stacklevel(),
                )


@checked
class Sinks:
    """Sends named values to all sinks (trackers or files) of a run; a sink that fails never stops the training.

    Arguments:
        targets: A list of sinks.  A sink is one of `gradscope.sinks`, a ``SummaryWriter``, a run of wandb or trackio, a
            logger of Lightning, or the module mlflow (with an active run).  An object of your own class needs a method
            ``write(step, values)``, and may have a method ``close(error)``.  Instead of ``write``, it can have
            ``log(values, step=)`` or ``log_metrics(values, step=)``.

    An exception in a sink causes one `SinkWarning`.  After three failures in a row the sink is given up.  Only sinks
    with ``write`` are closed by `close`; the caller closes other objects.

    Raises:
        TypeError: A target has none of these methods.

    >>> import gradscope as gs
    >>> class Print:
    ...     def log(self, values, step):
    ...         print(step, values)
    >>> gs.sinks.Sinks([Print()]).write(3, {"loss": 0.5})
    3 {'loss': 0.5}
    """

    def __init__(self, targets: Any = ()) -> None:
        self._outlets: list[_Outlet] = []
        several = isinstance(targets, Iterable) and not isinstance(targets, str) and getattr(targets, "ndim", None) != 0
        for target in islice(targets, MOST_SINKS) if several else [targets]:
            way = next((name for name in WAYS if _takes(target, name)), None)
            if way is None:
                raise TypeError(
                    f"sinks must be a list of objects with write(step, values), log(values, step=), log_metrics or "
                    f"add_scalar, such as gs.sinks.TensorBoard(folder) or a run of wandb; got {shown(target)}."
                )
            self._outlets.append(_Outlet(target, WAYS[way]))

    def __bool__(self) -> bool:
        return bool(self._outlets)

    def write(self, step: int, values: Values) -> None:
        """Send the values of a step to every sink."""
        for outlet in self._outlets:
            outlet.attempt(partial(outlet.send, outlet.target, step, values))
        self._outlets = [outlet for outlet in self._outlets if outlet.failures < MOST_FAILURES]

    def close(self, error: BaseException | None = None) -> None:
        """Close the sinks that have ``write`` and ``close``; ``error`` is the exception that ended the run, if any."""
        outlets, self._outlets = self._outlets, []
        for outlet in outlets:
            if outlet.send is WAYS["write"] and callable(end := getattr(outlet.target, "close", None)):
                outlet.attempt(partial(end, error))


@checked
def values_of(frame: pd.DataFrame) -> dict[str, float]:
    """Return a dict of the numbers in a monitor record, with names ``log10_gsc/layer`` and ``quantity/layer``.

    If a quantity has one value per attention head, there is one number per layer: the largest value of its heads, or
    for ``relative_attention_entropy`` the smallest.

    >>> import gradscope as gs
    >>> gs.sinks.values_of(gs.frames.observed("gradient_norm", 0.5, layer="conv1"))
    {'gradient_norm/conv1': 0.5}
    """
    require(frame, ["quantity", "layer", "value", "log10_value"], "gradscope.Monitor(...).to_frame()")
    if (frame["quantity"].eq("gsc") & frame["log10_value"].isna()).any():
        raise ValueError("Column 'log10_value' of the frame must not hold nulls for the quantity 'gsc'.")
    rows = frame[["quantity", "layer", "value", "log10_value"]].itertuples(index=False)
    values: dict[str, float] = {}
    for quantity, layer, value, log10_value in rows:
        name, number = (f"log10_gsc/{layer}", log10_value) if quantity == "gsc" else (f"{quantity}/{layer}", value)
        extreme = min if quantity == "relative_attention_entropy" else max
        values[name] = extreme(values[name], number) if name in values and "head" in frame else number
    return values
