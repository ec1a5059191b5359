"""Record one forward pass: the output of every module call becomes a layer with its autograd edge and its length.

Edges and lengths are recorded immediately, because a later in-place operation would change a stored tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.dropout import _DropoutNd

from gradscope.forward.inputs import Batch, Forward, LossFunction, check_devices, continuous
from gradscope.forward.layers import INPUT, LOSS, OUTPUT, Layer, Origin, numbered
from gradscope.forward.lengths import Lengths, Ruler
from gradscope.forward.modules import Modules, eager, hooked, recording_gradients, tapped, tensors
from gradscope.forward.outputs import first_tensor, picked
from gradscope.forward.replay import Replay
from gradscope.forward.state import alone, state_restored
from gradscope.forward.trunk import Vertex, hooks_so_far, vertex

Received = tuple[Collection[Vertex], int]

_CUSTOM: Any = torch._C._FunctionBase  # nodes of custom functions

FROZEN = "an embedding of the data with frozen weights, so its output carries no gradient"


class NonFiniteLayerError(ValueError, FloatingPointError):
    """Raised if a layer's output is NaN or Inf, so that it has no length."""


@dataclass(frozen=True)
class Recording:
    """One recorded forward pass: tensors in execution order, the graph's sources, and the target's edge ``end``.

    ``source_names``: names of the sources, in the same order.  ``uncalled``: modules whose hooks did not fire.
    ``left_out``: module calls and marked tensors that were not recorded, each with the reason.
    ``dropout``: dropout modules that were active.  ``random``: whether the pass drew random numbers.
    ``picked``: remark that names the measured part of a structured output and the inputs held fixed; None if the
    whole output is measured and no input is held fixed.
    ``lengths``: squared lengths of all recorded tensors.  ``hooks``: number of hooks that Python code had registered
    before the pass, of whatever kind.
    """

    tensors: tuple[Layer, ...]
    sources: tuple[GradientEdge, ...]
    source_names: tuple[str, ...]
    end: GradientEdge
    batch_size: int
    uncalled: tuple[str, ...]
    left_out: dict[str, str]
    dropout: tuple[str, ...]
    random: bool
    picked: str | None
    replay: Replay = field(repr=False)
    lengths: Lengths = field(repr=False)
    hooks: int = field(repr=False)


def record(
    modules: Modules,
    batch: Batch,
    *,
    forward: Forward | None = None,
    loss_fn: LossFunction | None = None,
) -> Recording:
    """Run the model once and record it.  The model is left unchanged, also after an exception.

    Buffers (running statistics) and the random state are restored; mode, ``.grad`` and ``requires_grad`` are not
    touched.  ValueError says why recording is impossible.  When the lengths are first needed, `check_finite` is called.
    """
    if forward is None:  # a user's function may move the batch to the model
        check_devices(modules, batch)
    recorder = _Recorder(modules, Ruler(batch.size))
    with (
        alone,
        state_restored(modules) as guard,
        guard,
        recording_gradients(),
        tapped(recorder),
        eager(modules),
        hooked(modules, recorder) as calls,
    ):
        hooks = hooks_so_far()
        differentiable, sources = batch.differentiable()
        recorder.data = _pointers(differentiable.tensors)
        for number, source in enumerate(sources):
            recorder.add_source(source, numbered(INPUT, number))
        output = differentiable.run(modules[""], forward)
        target = first_tensor(output)
        recorder.add(target, OUTPUT, Origin.OUTPUT)
        if loss_fn is not None:
            try:
                target = _per_sample_loss(loss_fn(target, differentiable.labels), batch.size)
            except Exception:
                check_finite(recorder.layers, recorder.ruler.lengths(), batch)  # may be the reason
                raise
            recorder.add(target, LOSS, Origin.MARKED)
        drew = guard.kept.drew()
    recorder.compare_versions()
    recorder.embed()
    lengths = recorder.ruler.lengths()
    lengths.later.then(partial(check_finite, recorder.layers, lengths, batch))
    if not recorder.sources:
        raise ValueError(
            "There is nothing to differentiate with respect to: x holds no real or complex tensor, and no module with "
            "trainable weights turned x into one. If x holds images, give x.float(). If an embedding is frozen or "
            "functional, unfreeze the embedding with requires_grad_(), or embed x first and measure the rest."
        )
    if not target.requires_grad:
        raise ValueError(
            "The output does not depend on x: the output carries no gradient. Look for .detach(), torch.no_grad(), "
            "integer or boolean operations, or a constant output in the model's forward."
        )
    if target.layout is not torch.strided:
        raise ValueError(
            "The output is a sparse or nested tensor, which has no coefficient: give forward=, a function "
            "(model, batch) -> tensor, that returns a dense one, for example model(batch).to_dense()."
        )
    return Recording(
        tensors=tuple(recorder.layers.values()),
        sources=tuple(edge for _, edge in recorder.sources),
        source_names=(source_names := tuple(name for name, _ in recorder.sources)),
        end=get_gradient_edge(target),
        batch_size=batch.size,
        uncalled=tuple([name for name in modules if name and not calls[name]]),
        left_out=recorder.left_out,
        dropout=tuple([n for n, m in modules.items() if "p" in m.__dict__ and calls[n] and _drops(m)]),
        random=drew,
        picked=" ".join(filter(None, (picked(output), batch.held))) or None,
        replay=Replay(modules, batch, forward, loss_fn, source_names, guard.kept),
        lengths=lengths,
        hooks=hooks,
    )


class _Recorder:
    """Collects tensors while the modules of one forward pass are called."""

    def __init__(self, modules: Modules, ruler: Ruler) -> None:
        self.modules, self.ruler = modules, ruler
        self.layers: dict[Vertex, Layer] = {}
        self.sources: list[tuple[str, GradientEdge]] = []
        self.data: set[int] = set()  # where the data lie in memory
        self.embeddings: list[tuple[bool, list[tuple[str, GradientEdge]]]] = []
        self.num_embeddings = 0
        self.versions: dict[Vertex, tuple[Tensor, int]] = {}
        self.left_out: dict[str, str] = {}

    def before(self, args: Any, kwargs: Any) -> Received:
        """Vertices of tensors that a module receives (and may overwrite), and the number of embeddings so far."""
        known = self.num_embeddings
        if not kwargs and args and not args[1:] and type(tensor := args[0]) is Tensor:  # the usual case
            node = tensor.grad_fn
            if node is not None:
                return ((node, tensor.output_nr),), known
        return [_vertex(t) for t in tensors(args, kwargs) if t.requires_grad], known

    def after(self, name: str, call: int, label: str, args: Any, kwargs: Any, output: Any, token: Received) -> None:
        """Record the outputs of a module call."""
        received, known = token
        if type(output) is Tensor and output.requires_grad and name and received:  # the usual case, in one step
            if not self.add(output, label, Origin.MADE, call, received):
                self.left_out[label] = _why_not([output], output)
            return
        returned = tensors((output,), {})
        outputs = [t for t in returned if t.requires_grad]
        origin = Origin.MADE if name else Origin.OUTPUT
        kept = [self.add(tensor, numbered(label, n), origin, call, received) for n, tensor in enumerate(outputs)]
        integers, reads_data = list[Tensor](), False
        if name and not received and self.num_embeddings == known:
            integers = [t for t in tensors(args, kwargs) if not continuous(t) and t.layout is torch.strided]
            reads_data = not self.data.isdisjoint(_pointers(integers))
        if name and not any(kept):
            frozen = reads_data and any(map(continuous, returned)) and bool(self.modules[name]._parameters)
            self.left_out[label] = FROZEN if frozen else _why_not(returned, output)
        if outputs and integers:
            edges = [(numbered(label, n), get_gradient_edge(tensor)) for n, tensor in enumerate(outputs)]
            self.embeddings.append((reads_data, edges))
            self.num_embeddings += 1

    def embed(self) -> None:
        """Add embeddings to the sources: those that read the data, or all embeddings if there is no other source."""
        reading = [edges for reads_data, edges in self.embeddings if reads_data]
        if not self.sources and not reading:
            reading = [edges for _, edges in self.embeddings]
        self.sources += [source for edges in reading for source in edges]

    def add(self, tensor: Tensor, name: str, origin: Origin, call: int = 1, received: Collection[Vertex] = ()) -> bool:
        """Record a tensor under a name; a tensor that is already recorded only gets another name.

        False if the tensor cannot be recorded: it is empty, carries no gradient, or is sparse.
        """
        shape = tensor.shape
        if not tensor.requires_grad or 0 in shape or tensor.layout is not torch.strided:
            return False
        node = tensor.grad_fn
        key = _vertex(tensor) if node is None else (node, tensor.output_nr)
        if origin is Origin.MADE:
            origin = Origin.PASSED_ON if key in received else origin
        elif name in self.modules:
            name = f"({name})"  # a module already has this name
        if key in self.layers:
            self.layers[key].origins.setdefault(name, origin)
            return True
        custom = issubclass(type(key[0]), _CUSTOM)  # such an edge keeps what a custom function needs
        edge = get_gradient_edge(tensor) if custom else GradientEdge(*key)
        dtype, device, origins = tensor.dtype, tensor.device, {name: origin}
        self.layers[key] = Layer(name, call, -1, tuple(shape), dtype, device, origins, edge, tensor.nbytes)
        self.ruler.measure(key, tensor)
        self.versions[key] = tensor, tensor._version
        return True

    def compare_versions(self) -> None:
        """Mark the layers whose tensors were overwritten later."""
        for key, (tensor, version) in self.versions.items():
            if tensor._version != version:
                self.layers[key] = replace(self.layers[key], modified=True)

    def tap(self, tensor: Tensor, name: str) -> Tensor:
        """Record a marked tensor."""
        if not self.add(tensor, name, Origin.MARKED):
            self.left_out[name] = _why_not([tensor], tensor)
        return tensor

    def add_source(self, tensor: Tensor, name: str) -> None:
        """Record a tensor at which differentiation starts."""
        self.add(tensor, name, Origin.MARKED)
        self.sources.append((name, get_gradient_edge(tensor)))


def check_finite(layers: Mapping[Vertex, Layer], lengths: Lengths, batch: Batch) -> None:
    """Raise ValueError that names where the data, or the first layer in execution order, hold NaN or Inf."""
    if lengths.finite:
        return
    batch.check_finite()
    layer = next(layer for key, layer in layers.items() if not np.isfinite(lengths[key].squares).all())
    raise NonFiniteLayerError(
        f"Layer {layer.name!r} is the first with NaN or Inf in its output (shape {layer.shape}): "
        "the forward pass overflowed or divided by zero there. Measure at a smaller input or weight scale, "
        "or in float64."
    )


def _vertex(tensor: Tensor) -> Vertex:
    """What `vertex` returns for the tensor's edge, but several times faster, because no edge object is created."""
    node = tensor.grad_fn
    return vertex(get_gradient_edge(tensor)) if node is None else (node, tensor.output_nr)


def _drops(module: nn.Module) -> bool:
    return isinstance(module, _DropoutNd) and module.training and module.p > 0


def _pointers(data: Sequence[Tensor]) -> set[int]:
    """Where the memory of dense tensors begins."""
    return {tensor.untyped_storage().data_ptr() for tensor in data if tensor.layout is torch.strided}


def _why_not(returned: Sequence[Tensor], output: Any) -> str:
    """Why nothing of a module's output was recorded."""
    if not returned:
        return f"returned {type(output).__name__}, in which torch's pytree finds no tensor"
    if not any(tensor.numel() for tensor in returned):
        return "returned only empty tensors"
    if not any(continuous(tensor) for tensor in returned):
        return "returned no floating-point or complex numbers"
    if all(tensor.layout is not torch.strided for tensor in returned):
        return "returned only sparse or nested tensors"
    return "its output carries no gradient: detached, made under torch.no_grad(), or dependent on no input or parameter"


def _per_sample_loss(loss: Tensor, batch_size: int) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor of losses, shape ({batch_size},); got {type(loss).__name__}.")
    if loss.is_complex():
        raise ValueError("loss_fn must return real losses; got complex ones: take .real or .abs() of them.")
    if tuple(loss.shape) != (batch_size,):
        raise ValueError(
            f"loss_fn must return one loss per sample, shape ({batch_size},); got {tuple(loss.shape)}. "
            'A mean would put a factor 1/B into every value: use reduction="none".'
        )
    return loss
