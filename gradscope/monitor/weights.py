"""Statistics of each layer's weights, of its gradient in ``.grad``, and of its updates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from gradscope import frames
from gradscope.distributed import alike, local, of_all_parts
from gradscope.forward.modules import Owned, owned_parameters
from gradscope.memory import Later, Workspace
from gradscope.norms import plain_norms

_JOINS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": torch.sum, "max": torch.amax, "norm": torch.linalg.vector_norm
}  # fmt: skip


class Weights:
    """Statistics of parameters, gradients and updates of every layer that holds trainable parameters.

    Let w be a layer's P parameters, g their gradients, and w' the parameters n steps earlier, at the previous record.
    ``weight_norm`` is |w|, ``gradient_norm`` |g|, ``gradient_rms`` |g| / sqrt(P), ``gradient_to_weight`` |g| / |w|,
    ``update_to_weight`` |w - w'| / (n |w|), and ``update_max`` the largest |entry| of (w - w') / n.
    ``gradient_zero_fraction`` is the fraction of zeros in g.  Sums are in float64.

    Layers may be frozen, unfrozen, added or replaced between two records.  If parameters are sharded, every process
    reads its own shards, and the statistics are those of the whole parameters.

    Cost: five passes over all parameters, a copy of them, and one synchronization with the device.  If parameters are
    sharded, also at most five sums over all processes per layer.
    """

    def __init__(self, model: nn.Module) -> None:
        owned_parameters(dict(model.named_modules()))  # raises if there is nothing to train
        self.model = model
        self._before: dict[Tensor, tuple[int, Tensor]] = {}
        self._known: dict[str, Sequence[Tensor]] = {}
        self._workspace = Workspace()

    def first_norms(self) -> dict[str, float]:
        """Return |w| of the layers that are new since the last call: unfrozen, added or replaced."""
        owners = self._owners()
        new = {name: own for name, own in owners.items() if not _same(own, self._known.get(name, ()))}
        self._known |= new
        return _numbers(new, Later(map(self._length, new.values())))

    def resolution(self) -> float:
        """Return the largest rounding unit of the trainable parameters: a smaller relative step is mostly rounding."""
        return max((torch.finfo(p.dtype).eps for own in self._owners().values() for p in own), default=0.0)

    def frame(self, step: int) -> pd.DataFrame:
        """Return a tidy frame, one row per statistic and layer; ``step`` counts the updates before this call.

        A layer has no update before its second record.  Rows with NaN are left out; `Monitor` reports non-finite
        numbers separately.
        """
        return self.begun(step)()

    def begun(self, step: int) -> Callable[[], pd.DataFrame]:
        """Compute the statistics on the device, without waiting for it; the result returns the frame."""
        owners = self._owners()
        lengths = Later(map(self._length, owners.values()))
        every = {name: [_dense(p.grad.detach()) for p in own if p.grad is not None] for name, own in owners.items()}
        gradients = {name: parts for name, parts in every.items() if parts}
        sizes = {name: sum(g.numel() for g in parts) for name, parts in gradients.items()}
        slopes = Later(map(self._length, gradients.values()))
        nonzero = Later(_all(parts, lambda g: g.count_nonzero(), "sum") for parts in gradients.values())
        periods, moved, largest = self._moved(owners, step)

        def finished() -> pd.DataFrame:
            columns: dict[str, dict[str, float]] = defaultdict(dict)
            weights = columns["weight_norm"] = _numbers(owners, lengths)
            for name, length in _numbers(gradients, slopes).items():
                columns["gradient_norm"][name] = length
                columns["gradient_rms"][name] = length / math.sqrt(sizes[name])
                columns["gradient_to_weight"][name] = _ratio(length, weights[name])
            for name, number in _numbers(gradients, nonzero).items():
                columns["gradient_zero_fraction"][name] = 1 - number / sizes[name]
            for name, length in _numbers(periods, moved).items():
                columns["update_to_weight"][name] = _ratio(length / periods[name], weights[name])
            for name, most in _numbers(periods, largest).items():
                columns["update_max"][name] = most / periods[name]
            return _tidy(columns, list(owners))

        return finished

    def _owners(self) -> Owned:
        """Return the parameters that are trainable now, by layer; none while the whole model is frozen."""
        trainable = any(p.requires_grad for p in self.model.parameters())
        return owned_parameters(dict(self.model.named_modules())) if trainable else {}

    def _moved(self, owners: Owned, step: int) -> tuple[dict[str, int], Later, Later]:
        """Statistics of w - w' for layers whose parameters were all recorded n > 0 steps ago; keep copies.

        Returns n, |w - w'| and the largest entry of |w - w'| of each of these layers.
        """
        before, self._before = self._before, {}
        periods, moved, largest = dict[str, int](), list[Tensor](), list[Tensor]()
        for name, own in owners.items():
            kept = [before[p] for p in own if p in before and _alike(before[p][1], p)]
            since = {at for at, _ in kept}
            if len(kept) == len(own) and len(since) == 1 and (period := step - min(since)) > 0:
                for (_, old), p in zip(kept, own, strict=True):
                    torch.sub(p.detach(), old, out=old)  # without another copy of all parameters
                periods[name] = period
                moved.append(self._length([old for _, old in kept]))
                largest.append(_all([old for _, old in kept], _largest, "max"))
            for p in own:
                old = before[p][1] if p in before and _alike(before[p][1], p) else torch.empty_like(p.detach())
                self._before[p] = step, old.copy_(p.detach())
        return periods, Later(moved), Later(largest)

    def _length(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the Euclidean norm of all tensors, taken together as one vector."""
        return _all(tensors, lambda t: plain_norms(t, 0, self._workspace.scratch(t)), "norm")


def _all(tensors: Sequence[Tensor], read: Callable[[Tensor], Tensor], how: str) -> Tensor:
    """The "sum", "max" or "norm" of what ``read`` finds in every tensor, also in the shards of other processes."""
    found = []
    for group in alike(tensors):
        number = _JOINS[how](torch.stack([read(local(t.detach())) for t in group]))
        found.append(of_all_parts(number, group[0], how))
    return _JOINS[how](torch.stack(found)) if found[1:] else found[0]


def _largest(tensor: Tensor) -> Tensor:
    return tensor.abs().amax() if tensor.numel() else tensor.new_zeros(())  # a shard may be empty


def _dense(gradient: Tensor) -> Tensor:
    """Return the gradient with its zeros, which a sparse gradient (of an embedding) leaves out."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def _numbers(names: Iterable[str], later: Later) -> dict[str, float]:
    """The numbers of the layers."""
    return dict(zip(names, map(float, later.arrays), strict=True))


def _tidy(columns: dict[str, dict[str, float]], layers: Sequence[str]) -> pd.DataFrame:
    """A tidy frame of numbers by statistic and layer, without NaN; the layers are in execution order."""
    order = {layer: index for index, layer in enumerate(layers, start=1)}
    rows = [
        (layer, order[layer], quantity, value)
        for quantity, values in columns.items()
        for layer, value in values.items()
        if not math.isnan(value)
    ]
    names, index, quantities, values = zip(*rows, strict=True) if rows else ((), (), (), ())
    with np.errstate(divide="ignore"):
        logs = np.log10(np.array(values))
    place = {"layer": names, "index": index, "depth_from_output": len(order) - np.array(index, dtype=int)}
    about = {"quantity": quantities, "log10_value": logs, "log10_stderr_probe": 0.0, "num_samples": 1}
    return frames.tidy(place | about)


def _ratio(part: float, whole: float) -> float:
    """Return part / whole, or inf if the whole is 0."""
    return part / whole if whole else math.inf


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether these are the same tensors, not only equal ones."""
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _alike(old: Tensor, p: Tensor) -> bool:
    """Whether a copy still fits its parameter."""
    return (old.shape, old.dtype, old.device) == (p.shape, p.dtype, p.device)
