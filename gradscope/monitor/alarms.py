"""Warnings during training, each kind at most once per layer."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

# Limits.  LOSS_JUMP: loss / median of the last RECENT losses, from FEWEST losses on.  WEIGHT_GROWTH: norm of a
# layer's weights / their norm at the start.  EXTREME_LOG10: |log10 GSC|.  DEAD: fraction of dead units in a layer.
LOSS_JUMP, RECENT, FEWEST = 5.0, 50, 5
WEIGHT_GROWTH = 10.0
EXTREME_LOG10 = 6.0
DEAD = 0.9
# STEP_SIZE: factor between a layer's steps and those that STEP_NEIGHBORS layers with as many parameters lead to expect;
# at least STEP_SPREADS robust standard deviations, in the mean of at least STEP_RECORDS records.
STEP_SIZE, STEP_SPREADS, STEP_RECORDS, STEP_NEIGHBORS = 1.5, 8.0, 5, 6


class MonitorWarning(UserWarning):
    """Warning that something in training looks wrong; the message names the layer.

    >>> import gradscope as gs
    >>> issubclass(gs.MonitorWarning, UserWarning)
    True
    """


class Alarms:
    """Gives each kind of warning at most once per layer.

    ``first_lengths``: |w| of every layer when it was first monitored.  ``fired``: (kind, layer, step) of every warning.
    ``steps``: logarithms of step sizes.
    In place of a layer's name, warnings of the kinds "loss jump" and "no loss" have "loss", those of the kind "zero
    output" have "network", and those of the kind "nonfinite" have "loss", "gradient" or "probe batch".
    """

    def __init__(self, first_lengths: dict[str, float]) -> None:
        self.first_lengths = first_lengths
        self.losses: list[float] = []
        self.fired: list[tuple[str, str, int]] = []
        self.steps: dict[str, dict[str, list[float]]] = {"gradient": {}, "length": {}}
        self.gradients: dict[str, float] = {}

    def __str__(self) -> str:
        """Return one line per warning, such as ``Warning at step 3: dead units, 0.relu.``"""
        return "\n".join(f"Warning at step {step}: {kind}, {layer}." for kind, layer, step in self.fired)

    def loss(self, value: float, step: int) -> None:
        """Warn if a finite loss is far above recent losses; if one of those is negative, ratios have no meaning."""
        recent = self.losses
        if len(recent) >= FEWEST and min(recent) >= 0 and value > LOSS_JUMP * max(float(np.median(recent)), 1e-12):
            words = f"{value:.4g} after a median of {np.median(recent):.4g} in recent steps"
            self.once("loss jump", "loss", step, f"loss jump at step {step}: {words}.")
        self.losses = [*recent[1 - RECENT :], value]

    def record(self, frame: pd.DataFrame, step: int) -> None:
        """Check a record of the monitor, in which the rows of each quantity are in execution order."""
        found: dict[str, dict[str, float]] = {}
        # Plain lists: selecting rows of the frame per quantity is slower than measuring a small network.
        rows = (frame[name].tolist() for name in ("quantity", "layer", "value", "log10_value"))
        for quantity, layer, value, logarithm in zip(*rows, strict=True):
            found.setdefault(quantity, {})[layer] = logarithm if quantity == "gsc" else value
        self._extreme(found.get("gsc", {}), step)
        dead = {layer: value for layer, value in found.get("dead_fraction", {}).items() if value >= DEAD}
        self.together("dead units", dead, step, lambda value: f"{100 * value:.0f} % of its units pass no gradient")
        grown = {
            layer: length / first
            for layer, length in found.get("weight_norm", {}).items()
            if (first := self.first_lengths.get(layer, 0.0)) > 0 and length > WEIGHT_GROWTH * first
        }
        self.together("weight growth", grown, step, lambda n: f"its weights are {n:.3g} times as long as at the start")
        self._step_sizes(found, step)

    def together(self, kind: str, found: dict[str, float], step: int, words: Callable[[float], str]) -> None:
        """Give one warning for all layers that newly have this problem; the message names the worst layer."""
        new = {layer: value for layer, value in found.items() if self._new(kind, layer, step)}
        if not new:
            return
        worst = max(new, key=lambda layer: new[layer])
        others = f"; the same holds for {len(new) - 1} other layer{'s' * (len(new) > 2)}" if len(new) > 1 else ""
        _warn(f"{kind} at layer {worst!r}, step {step}: {words(new[worst])}{others}.")

    def once(self, kind: str, name: str, step: int, message: str) -> None:
        """Give the warning, unless one of this kind was given for ``name`` before."""
        if self._new(kind, name, step):
            _warn(message)

    def known(self, kind: str, name: str) -> bool:
        """Whether a warning of this kind was given for ``name`` before."""
        return any((kind, name) == fired[:2] for fired in self.fired)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {
            "first_lengths": self.first_lengths, "losses": self.losses, "fired": [list(f) for f in self.fired],
            "steps": self.steps, "gradients": self.gradients,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.first_lengths, self.losses = dict(state["first_lengths"]), list(state["losses"])
        self.fired = [(kind, layer, step) for kind, layer, step in state["fired"]]
        self.steps, self.gradients = state["steps"], dict(state["gradients"])

    def _extreme(self, log10_gsc: dict[str, float], step: int) -> None:
        """Warn of the most extreme layer only: exploding or vanishing gradients affect many layers at once."""
        for kind, sign in (("vanishing", -1), ("exploding", 1)):
            if not log10_gsc or any(kind == known for known, *_ in self.fired):
                continue
            # All layers below one that passes no gradient have equal values: name the one nearest to the output.
            layer = max(reversed(log10_gsc), key=lambda name: sign * log10_gsc[name])
            if sign * log10_gsc[layer] > EXTREME_LOG10:
                size = "0" if log10_gsc[layer] == -math.inf else f"10^{log10_gsc[layer]:.1f}"
                words = f"its GSC is {size}, the most extreme of all layers"
                self.once(kind, layer, step, f"{kind} at layer {layer!r}, step {step}: {words}.")

    def _step_sizes(self, found: dict[str, dict[str, float]], step: int) -> None:
        """Warn of a layer whose steps are longer or shorter than those of layers with as many parameters.

        A step is measured by |w - w'|, and by |w - w'| / |g'| with g' the gradient at the previous record.  In plain
        gradient descent the second is equal in all layers, in Adam nearly the first.  The one that varies less counts.
        """
        weights, gradients = found.get("weight_norm", {}), found.get("gradient_norm", {})
        sizes: dict[int, list[str]] = {}
        for layer, update in found.get("update_to_weight", {}).items():
            length, before = update * weights[layer], self.gradients.get(layer, 0.0)
            rms = found.get("gradient_rms", {}).get(layer, 0.0)
            if 0 < length < math.inf and before > 0 and rms > 0:
                self.steps["gradient"].setdefault(layer, []).append(math.log(length / before))
                self.steps["length"].setdefault(layer, []).append(math.log(length))
                sizes.setdefault(round((gradients[layer] / rms) ** 2), []).append(layer)
        self.gradients = gradients
        for layers in sizes.values():
            records = [len(self.steps["length"][layer]) for layer in layers]
            if len(layers) > STEP_NEIGHBORS and min(records) == max(records) >= STEP_RECORDS:
                self._unequal(layers, step)

    def _unequal(self, layers: list[str], step: int) -> None:
        """Warn of the layers among these whose mean step differs from what their neighbors lead to expect."""
        choices = []
        for steps in self.steps.values():
            mean = np.array([steps[layer] for layer in layers]).mean(1)
            off = np.array([mean[place] - _expected(mean, place) for place in range(len(mean))])
            choices.append((1.4826 * float(np.median(np.abs(off))), off))
        spread, off = min(choices, key=lambda choice: choice[0])
        limit = max(math.log(STEP_SIZE), STEP_SPREADS * spread)
        odd = {layer: math.exp(m) for layer, m in zip(layers, off, strict=True) if abs(m) > limit}
        self.together(
            "step size",
            odd,
            step,
            lambda factor: f"its steps are {factor:.3g} times as long as those of similar layers",
        )

    def _new(self, kind: str, name: str, step: int) -> bool:
        new = not self.known(kind, name)
        if new:
            self.fired.append((kind, name, step))
        return new


def _expected(values: npt.NDArray[np.float64], place: int) -> float:
    """Return the value at ``place`` of a robust line (Theil, Sen) through the nearest `STEP_NEIGHBORS` others."""
    near = sorted((p for p in range(len(values)) if p != place), key=lambda p: abs(p - place))[:STEP_NEIGHBORS]
    slope = np.median([(values[p] - values[q]) / (p - q) for p, q in itertools.combinations(near, 2)])
    return float(np.median([values[p] + slope * (place - p) for p in near]))


def _warn(message: str) -> None:
    warnings.warn(message, MonitorWarning, stacklevel=3)
