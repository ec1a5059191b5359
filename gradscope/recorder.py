"""One forward pass, recorded: every module call becomes a layer with an edge of the autograd graph and its length.

Hooks are attached for one call and removed again; edges, not tensors, are stored, so in-place operations later in the
model cannot redirect a gradient (a stored tensor would silently become the later one).
"""

from __future__ import annotations

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from gradscope.inputs import Batch, Forward, LossFunction, check_devices, first_tensor
from gradscope.layers import INPUT, LOSS, OUTPUT, Layer, Origin
from gradscope.norms import sum_of_squares
from gradscope.trunk import Vertex, vertex

_active: ContextVar[_Recorder | None] = ContextVar("gradscope_recorder", default=None)


@dataclass(frozen=True)
class Recording:
    """What one forward pass left behind: layers in execution order, the graph's sources, and the target's edge.

    ``uncalled``: modules whose hooks did not fire.
    """

    layers: tuple[Layer, ...]
    sources: tuple[GradientEdge, ...]
    target: GradientEdge
    batch_size: int
    uncalled: tuple[str, ...]


def tap(tensor: Tensor, name: str) -> Tensor:
    """Mark a tensor inside a ``forward`` as a layer of its own, ``name``; returns the tensor itself.

    For functional code that no module computes.  Outside a measurement it does nothing, so it can stay in the model.
    """
    recorder = _active.get()
    if recorder is not None:
        recorder.add(tensor, name, Origin.MARKED)
    return tensor


def record(
    model: nn.Module, batch: Batch, *, forward: Forward | None = None, loss_fn: LossFunction | None = None
) -> Recording:
    """Run the model once and record it.  Afterwards the model is as it was, also after an exception.

    Buffers (running statistics) and the random state are put back; mode, ``.grad`` and ``requires_grad`` are not
    touched.  With ``loss_fn`` the target is the vector of per-sample losses, else the model's output.

    Raises:
        ValueError: Non-finite activations (the first layer is named), a loss that is not one number a sample, an
            output that does not depend on the input, BatchNorm on a batch of one, model and data on two devices.
    """
    if forward is None:  # which may move the batch itself
        check_devices(model, batch)
    recorder = _Recorder(model, batch.size)
    token = _active.set(recorder)
    try:
        with torch.inference_mode(False), torch.enable_grad(), state_restored(model), recorder.hooked():
            differentiable, sources = batch.differentiable()
            for number, source in enumerate(sources):
                recorder.add_source(source, f"{INPUT}[{number}]" if number else INPUT)
            target = first_tensor(differentiable.run(model, forward))
            recorder.add(target, OUTPUT, Origin.OUTPUT)
            recorder.check_finite()
            if loss_fn is not None:
                target = _per_sample_loss(loss_fn(target, batch.labels), batch.size)
                recorder.add(target, LOSS, Origin.MARKED)
                recorder.check_finite()
    finally:
        _active.reset(token)
    if not recorder.sources:
        raise ValueError(
            "x holds no floating-point tensor, and no module with trainable weights turned it into one (a frozen or a "
            "functional embedding?), so there is nothing to differentiate by: unfreeze the embedding with "
            "requires_grad_(), or embed first and measure the rest of the model."
        )
    if not target.requires_grad:
        raise ValueError(
            "The output does not depend on x: it carries no gradient. Look for .detach(), torch.no_grad(), "
            "integer or boolean steps, or a constant output in the model's forward."
        )
    return recorder.finish(get_gradient_edge(target))


def unwrap(model: nn.Module) -> nn.Module:
    """The eager module inside ``torch.compile`` and data-parallel wrappers, where hooks fire once a call.

    Raises:
        TypeError: Not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
        warnings.warn("The model is compiled; its eager original is measured, on the same weights.", stacklevel=3)
        return unwrap(original)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(model.module)
    return model


class _Recorder:
    """Collects layers while the hooks of one forward pass fire."""

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        self.batch_size = batch_size
        self.modules = dict(model.named_modules())
        self.calls: dict[str, int] = defaultdict(int)
        self.entries: dict[Vertex, dict[str, Any]] = {}
        self.sources: list[GradientEdge] = []
        self.running: list[tuple[str, set[Vertex], int]] = []

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Attach two hooks to every module; whatever happens, they are gone afterwards."""
        handles = []
        try:
            for name, module in self.modules.items():
                handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
                handles.append(module.register_forward_hook(self._after(name), with_kwargs=True))
            yield
        except Exception as error:
            where = self.running[-1][0] if self.running else ""
            if "Expected more than 1 value per channel" in str(error):
                raise ValueError(
                    f"{where!r} normalizes over the batch, and a batch of one has no variance: "
                    "give at least two samples, or model.eval() to use running statistics."
                ) from error
            if where:
                error.add_note(f"Raised inside layer {where!r} during the recorded forward pass.")
            raise
        finally:
            for handle in handles:
                handle.remove()

    def add(self, tensor: Tensor, name: str, origin: Origin, call: int = 1) -> None:
        """Record a tensor under a name; a tensor that is known already only gains the name."""
        if not tensor.is_floating_point() or not tensor.requires_grad:
            return
        if origin is not Origin.MADE and origin is not Origin.PASSED_ON and name in self.modules:
            name = f"({name})"  # a module owns the plain word
        edge = get_gradient_edge(tensor)
        if vertex(edge) in self.entries:
            self.entries[vertex(edge)]["origins"].setdefault(name, origin)
            return
        per_sample = tensor.ndim > 0 and tensor.shape[0] == self.batch_size
        squares, exponent = sum_of_squares(tensor, start_dim=1 if per_sample else 0)
        self.entries[vertex(edge)] = {
            "name": name,
            "call": call,
            "shape": tuple(tensor.shape),
            "dtype": tensor.dtype,
            "device": tensor.device,
            "origins": {name: origin},
            "edge": edge,
            "squares": squares.reshape(-1),
            "exponent": exponent,
        }

    def add_source(self, tensor: Tensor, name: str) -> None:
        """Record a tensor at which differentiation starts."""
        self.add(tensor, name, Origin.MARKED)
        self.sources.append(get_gradient_edge(tensor))

    def check_finite(self) -> None:
        """Raise ValueError naming the first layer, in execution order, with a NaN or Inf.  One device sync."""
        entries = list(self.entries.values())
        if not entries:
            return
        finite = torch.stack([torch.isfinite(entry["squares"]).all() for entry in entries]).tolist()
        if not all(finite):
            entry = entries[finite.index(False)]
            raise ValueError(
                f"Layer {entry['name']!r} is the first with NaN or Inf in its output (shape {entry['shape']}): "
                "the forward pass overflowed or divided by zero there. Measure at a smaller input or weight scale, "
                "or in float64."
            )

    def finish(self, target: GradientEdge) -> Recording:
        """The layers in the order in which they were computed."""
        layers = tuple(Layer(index=index, **entry) for index, entry in enumerate(self.entries.values()))
        uncalled = tuple(name for name in self.modules if name and name not in self.calls)
        return Recording(layers, tuple(self.sources), target, self.batch_size, uncalled)

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            received = {vertex(get_gradient_edge(t)) for t in _tensors((args, kwargs)) if t.requires_grad}
            self.running.append((name, received, len(self.sources)))

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            _, received, known = self.running.pop()
            self.calls[name] += 1
            call = self.calls[name]
            label = (name or OUTPUT) + (f"#{call}" if call > 1 else "")
            outputs = [t for t in _tensors(output) if t.is_floating_point() and t.requires_grad]
            for number, tensor in enumerate(outputs):
                passed_on = vertex(get_gradient_edge(tensor)) in received
                origin = Origin.OUTPUT if not name else Origin.PASSED_ON if passed_on else Origin.MADE
                self.add(tensor, f"{label}[{number}]" if number else label, origin, call)
                integers = any(not t.is_floating_point() for t in _tensors((args, kwargs)))
                if name and integers and not received and len(self.sources) == known:
                    # An embedding: integers have no gradient, so differentiation starts at its output.
                    self.sources.append(get_gradient_edge(tensor))

        return hook


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _per_sample_loss(loss: Tensor, batch_size: int) -> Tensor:
    if tuple(loss.shape) != (batch_size,):
        raise ValueError(
            f"loss_fn must return one loss a sample, shape ({batch_size},); got {tuple(loss.shape)}. "
            'A mean would put a factor 1/B into every value: use reduction="none".'
        )
    return loss


@contextlib.contextmanager
def state_restored(model: nn.Module) -> Iterator[None]:
    """Let a forward pass work on clones of all buffers, then put back the originals and the random state."""
    tensors = (*model.parameters(), *model.buffers())
    cuda = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
    originals = {module: dict(module._buffers) for module in model.modules()}
    clones: dict[int, Tensor] = {}
    for module, buffers in originals.items():
        for name, buffer in buffers.items():
            if buffer is not None:
                # One clone for each original, so that buffers shared between modules stay shared.
                if id(buffer) not in clones:
                    clones[id(buffer)] = buffer.clone()
                module._buffers[name] = clones[id(buffer)]
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        for module, buffers in originals.items():
            module._buffers.clear()
            module._buffers.update(buffers)
