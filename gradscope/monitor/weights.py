"""Statistics of each layer's weights, of its gradient in ``.grad``, and of its updates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gradscope import frames
from gradscope.forward.modules import Owned, owned_parameters
from gradscope.memory import Workspace
from gradscope.norms import plain_norms


class Weights:
    """Statistics of parameters, gradients and updates of every layer that holds trainable parameters.

    Let w be a layer's P parameters, g their gradients, and w' the parameters n steps earlier, at the previous record.
    ``weight_norm`` is |w|, ``gradient_norm`` |g|, ``gradient_rms`` |g| / sqrt(P), ``gradient_to_weight`` |g| / |w|, and
    ``update_to_weight`` |w - w'| / (n |w|); ``gradient_zero_fraction`` counts zeros in g.  Sums are in float64.

    Cost: four passes over all parameters, a copy of them, and four synchronizations with the device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.owners: Owned = owned_parameters(dict(model.named_modules()))
        self._before: tuple[int, list[Tensor]] | None = None
        self._workspace = Workspace()

    def norms(self) -> dict[str, float]:
        """Return |w| of every layer."""
        return dict(zip(self.owners, _together(self._length(ps) for ps in self.owners.values()), strict=True))

    def frame(self, step: int) -> pd.DataFrame:
        """Return a tidy frame, one row per statistic and layer; ``step`` counts the updates before this call.

        Rows with NaN are left out; `Monitor` reports non-finite numbers separately.
        """
        weights = self.norms()
        columns: dict[str, dict[str, float]] = defaultdict(dict, weight_norm=weights)
        gradients = {
            name: [_dense(p.grad.detach()) for p in own if p.grad is not None] for name, own in self.owners.items()
        }
        gradients = {name: parts for name, parts in gradients.items() if parts}
        if gradients:
            lengths = _together(map(self._length, gradients.values()))
            others = _together(torch.stack([g.count_nonzero() for g in parts]).sum() for parts in gradients.values())
            for (name, parts), length, nonzero in zip(gradients.items(), lengths, others, strict=True):
                size = sum(g.numel() for g in parts)
                columns["gradient_norm"][name] = length
                columns["gradient_rms"][name] = length / math.sqrt(size)
                columns["gradient_zero_fraction"][name] = 1 - nonzero / size
                columns["gradient_to_weight"][name] = _ratio(length, weights[name])
        current = [p.detach() for parameters in self.owners.values() for p in parameters]
        if self._before is None:
            self._before = step, [p.clone() for p in current]
        since, before = self._before
        if since < step:
            for old, p in zip(before, current, strict=True):
                torch.sub(p, old, out=old)  # without another copy of all parameters
            changes = iter(before)
            moved = _together(self._length([next(changes) for _ in own]) for own in self.owners.values())
            for name, length in zip(self.owners, moved, strict=True):
                columns["update_to_weight"][name] = _ratio(length / (step - since), weights[name])
            for old, p in zip(before, current, strict=True):
                old.copy_(p)
            self._before = step, before
        order = {layer: index for index, layer in enumerate(self.owners, start=1)}
        rows = [
            (layer, order[layer], quantity, value)
            for quantity, values in columns.items()
            for layer, value in values.items()
            if not math.isnan(value)
        ]
        layers, index, quantities, values = zip(*rows, strict=True) if rows else ((), (), (), ())
        with np.errstate(divide="ignore"):
            logs = np.log10(np.array(values))
        place = {"layer": layers, "index": index, "depth_from_output": len(order) - np.array(index, dtype=int)}
        about = {"quantity": quantities, "log10_value": logs, "log10_stderr_probe": 0.0, "num_samples": 1}
        return frames.tidy(place | about)

    def _length(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the Euclidean norm of all tensors, taken together as one vector."""
        lengths = [plain_norms(t.detach(), 0, self._workspace.scratch(t)) for t in tensors]
        return torch.linalg.vector_norm(torch.stack(lengths))


def _dense(gradient: Tensor) -> Tensor:
    """Return the gradient with its zeros, which a sparse gradient (of an embedding) leaves out."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def _together(values: Iterable[Tensor]) -> list[float]:
    """Read all numbers from the device in one transfer."""
    return torch.stack([value.double() for value in values]).tolist()


def _ratio(part: float, whole: float) -> float:
    """Return part / whole, or inf if the whole is 0."""
    return part / whole if whole else math.inf
