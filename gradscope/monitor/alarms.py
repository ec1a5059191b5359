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

from gradscope.checks.levels import freedom, limit, nearest, scale
from gradscope.choices import listed, stacklevel

FloatArray = npt.NDArray[np.float64]

# Limits.  LOSS_JUMP: loss / median of the last RECENT losses, from FEWEST losses on.  WEIGHT_GROWTH: norm of a
# layer's weights / their norm at the start.  EXTREME_LOG10: |log10 GSC|.  DEAD: fraction of dead units in a layer.
LOSS_JUMP, RECENT, FEWEST = 5.0, 50, 5
WEIGHT_GROWTH = 10.0
EXTREME_LOG10 = 6.0
DEAD = 0.9
# LARGE_LOGIT, LOGIT_GROWTH: an attention logit that is also larger than in the last record, and this many times that of
# the first record.  ENTROPY, ENTROPY_BEFORE: relative entropy of a head now, and the largest one so far.
LARGE_LOGIT, LOGIT_GROWTH = 100.0, 2.0
ENTROPY, ENTROPY_BEFORE = 0.02, 0.2
# STEP_SIZE: factor between a layer's steps and those that STEP_NEIGHBORS similar layers lead to expect, in the mean of
# all records or in the first one.  After 5, 10, 20, ... records they are tested; each test has half of the remaining
# probability of an alarm.
STEP_SIZE, STEP_RECORDS, STEP_NEIGHBORS = 1.5, [5 * 2**k for k in range(30)], 6


class MonitorWarning(UserWarning):
    """Warning that something in training looks wrong; the message names the layer.

    >>> import gradscope as gs
    >>> issubclass(gs.MonitorWarning, UserWarning)
    True
    """


class Alarms:
    """Gives each kind of warning at most once per layer.

    - ``first_lengths``: |w| of the weights w of every layer when it was first monitored.
    - ``resolution``: smallest relative change |w - w'| / |w| of weights that is not mostly rounding.
    - ``step_sizes``: by measure and layer, the logarithms of all steps so far: their number, the first one, their sum.
    - ``fired``: (kind, layer, step) of every warning.  The layer is "loss" for the kinds "loss jump" and "no loss",
      "network" for "zero output" and "no attention", and "loss", "gradient" or "probe batch" for "nonfinite".  Head 3
      of a layer is ``layer:3``.
    """

    def __init__(self, first_lengths: dict[str, float], resolution: float = 0.0) -> None:
        self.first_lengths, self.resolution = first_lengths, resolution
        self.losses: list[float] = []
        self.fired: list[tuple[str, str, int]] = []
        self.step_sizes: dict[str, dict[str, list[float]]] = {"gradient": {}, "length": {}, "largest": {}}
        self.gradients: dict[str, float] = {}
        self.logits: dict[str, tuple[float, float]] = {}  # of each head, at the first and at the last record
        self.entropies: dict[str, float] = {}  # the largest one so far

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
        heads = frame["head"].fillna(-1).astype(int).tolist() if "head" in frame else [-1] * len(frame)
        for quantity, layer, value, logarithm, head in zip(*rows, heads, strict=True):
            place = layer if head < 0 else f"{layer}:{head}"
            found.setdefault(quantity, {})[place] = logarithm if quantity == "gsc" else value
        self._extreme(found.get("gsc", {}), step)
        dead = {layer: value for layer, value in found.get("dead_fraction", {}).items() if value >= DEAD}
        self.together("dead units", dead, step, lambda value: f"{100 * value:.0f} % of its units pass no gradient")
        grown = {
            layer: length / first
            for layer, length in found.get("weight_norm", {}).items()
            if (first := self.first_lengths.get(layer, 0.0)) > 0 and length > WEIGHT_GROWTH * first
        }
        self.together("weight growth", grown, step, lambda n: f"its weights are {n:.3g} times as long as at the start")
        self._heads(found.get("largest_attention_logit", {}), found.get("relative_attention_entropy", {}), step)
        self._step_sizes(found, step)

    def together(
        self, kind: str, found: dict[str, float], step: int, words: Callable[[float], str], unit: str = "layer"
    ) -> None:
        """Give one warning for all layers that newly have this problem; it names the one with the largest |value|."""
        new = [layer for layer in sorted(found, key=lambda name: -abs(found[name])) if self._new(kind, layer, step)]
        if not new:
            return
        others = f"; the same holds for {len(new) - 1} other {unit}{'s' * (len(new) > 2)}" if len(new) > 1 else ""
        _warn(f"{kind} at {unit} {new[0]!r}, step {step}: {words(found[new[0]])}{others}.")

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
            "step_sizes": self.step_sizes, "gradients": self.gradients, "logits": self.logits,
            "entropies": self.entropies,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.first_lengths, self.losses = dict(state["first_lengths"]), list(state["losses"])
        self.fired = [(kind, layer, step) for kind, layer, step in state["fired"]]
        self.step_sizes, self.gradients = state["step_sizes"], dict(state["gradients"])
        self.logits = {head: (first, last) for head, (first, last) in state["logits"].items()}
        self.entropies = dict(state["entropies"])

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

    def _heads(self, logits: dict[str, float], entropies: dict[str, float], step: int) -> None:
        """Warn of heads whose largest logit is large and grows, and of heads that have come to attend to one key."""
        grown = {}
        for head, logit in logits.items():
            first, last = self.logits.get(head, (logit, logit))
            if logit > max(LARGE_LOGIT, LOGIT_GROWTH * first, last):
                grown[head] = logit
            self.logits[head] = first, logit
        self.together(
            "attention logit growth", grown, step, lambda logit: f"its largest logit has grown to {logit:.4g}", "head"
        )
        collapsed = {}
        for head, entropy in entropies.items():
            self.entropies[head] = most = max(entropy, self.entropies.get(head, entropy))
            if entropy < ENTROPY and most > ENTROPY_BEFORE:
                collapsed[head] = 1 - entropy
        self.together(
            "attention entropy collapse",
            collapsed,
            step,
            lambda lost: f"its relative entropy has fallen to {1 - lost:.2g}, so each query attends to one key",
            "head",
        )

    def _step_sizes(self, found: dict[str, dict[str, float]], step: int) -> None:
        """Warn of a layer whose steps are longer or shorter than those of similar layers.

        Let w' and g' be the weights and the gradient at the previous record, n updates earlier.  The mean step
        (w - w') / n has three measures: its length divided by |g'|, its length, and its largest entry.

        - In gradient descent with n = 1, the first measure is the learning rate, which is equal in all layers.  With
          momentum, this holds for the first update only.
        - In Adam, the second and the third measure are nearly equal in all layers.  This holds for the third measure
          also if many entries of g' are zero.

        Each measure gives two numbers per layer: its first value, and its geometric mean over all records.  Of these
        six numbers, one is tested: the one whose deviations from neighboring similar layers spread least over the
        layers.  Layers are similar if they have equally many parameters and their names differ only in parts that are
        numbers.
        """
        weights, gradients = found.get("weight_norm", {}), found.get("gradient_norm", {})
        largest = found.get("update_max", {})
        groups: dict[tuple[Any, ...], list[str]] = {}
        for layer, update in found.get("update_to_weight", {}).items():
            before, rms = self.gradients.get(layer, 0.0), found.get("gradient_rms", {}).get(layer, 0.0)
            if self.resolution < update < math.inf and before > 0 and rms > 0:
                length = update * weights[layer]
                for kind, size in {"gradient": length / before, "length": length, "largest": largest[layer]}.items():
                    log = math.log(size)
                    number, first, total = self.step_sizes[kind].get(layer, (0, log, 0.0))
                    self.step_sizes[kind][layer] = [number + 1, first, total + log]
                role = [part for part in layer.split(".") if not part.isdigit()]
                groups.setdefault((round((gradients[layer] / rms) ** 2), *role), []).append(layer)
        self.gradients = gradients
        records = {layer: int(number) for layer, (number, *_) in self.step_sizes["length"].items()}
        most = max(records.values(), default=0)
        complete = [[layer for layer in group if records[layer] == most] for group in groups.values()]
        compared = [group for group in complete if len(group) > STEP_NEIGHBORS]
        if most in STEP_RECORDS:
            measures = 2 * len(self.step_sizes)  # one is chosen by its spread, so any of them may give the alarm
            tests = measures * 2 ** (STEP_RECORDS.index(most) + 1) * sum(map(len, compared))
            for group in compared:
                self._unequal(group, limit(tests, freedom(len(group))), step)

    def _unequal(self, layers: list[str], beyond: float, step: int) -> None:
        """Warn of the layers among these whose mean step differs from what their neighbors lead to expect."""
        error = np.array([_expected(np.zeros(len(layers)), place)[1] for place in range(len(layers))])

        def odd(z: FloatArray) -> npt.NDArray[np.bool_]:
            return (np.abs(z) > beyond * scale(z)) & (np.abs(z) * error > math.log(STEP_SIZE))

        measures = []  # the measure itself, and the ratio of the first two measures
        numbers = np.array([[steps[layer] for layer in layers] for steps in self.step_sizes.values()])
        for means in (numbers[..., 2] / numbers[..., 0], numbers[..., 1]):
            z = [(mean - [_expected(mean, place)[0] for place in range(len(mean))]) / error for mean in means]
            measures += [(each, z[1] - z[0]) for each in z]
        z, gradient = min(measures, key=lambda pair: scale(pair[0]))
        # A larger learning rate changes all measures alike.  If they differ, the gradient itself is odd.
        factors = {layers[n]: z[n] * error[n] for n in np.flatnonzero(odd(z) & ~odd(gradient))}
        self.together(
            "step size",
            factors,
            step,
            lambda m: f"its steps are {math.exp(m):.3g} times as long as those of similar layers",
        )

    def _new(self, kind: str, name: str, step: int) -> bool:
        new = not self.known(kind, name)
        if new:
            self.fired.append((kind, name, step))
        return new


def _expected(values: FloatArray, place: int) -> tuple[float, float]:
    """Return the value at ``place`` of a robust line (Theil, Sen) through the nearest `STEP_NEIGHBORS` others.

    Also return the standard deviation of the difference from it, in units of that of a value, for least squares.
    """
    near = np.array(nearest(place, len(values))[1 : STEP_NEIGHBORS + 1])
    slope = np.median([(values[p] - values[q]) / (p - q) for p, q in itertools.combinations(near, 2)])
    distance, spread = place - near.mean(), float(np.square(near - near.mean()).sum())
    expected = np.median(values[near] + slope * (place - near))
    return float(expected), math.sqrt(1 + 1 / len(near) + distance**2 / spread)


def _warn(message: str) -> None:
    warnings.warn(message, MonitorWarning, stacklevel=stacklevel())


def check_state(state: dict[str, Any], usual: dict[str, Any]) -> None:
    """ValueError that names what a state, or a part of it, lacks of a usual one."""
    pairs = [(state, usual), *((state.get(name), part) for name, part in usual.items() if isinstance(part, dict))]
    if lacking := [name for found, part in pairs for name in part if not isinstance(found, dict) or name not in found]:
        raise ValueError(f"state must be what state_dict() returned, but it lacks {listed(lacking)}.")
