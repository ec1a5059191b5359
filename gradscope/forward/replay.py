"""Run a recorded forward pass again, to read the values of layers or to shift the sources slightly."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from gradscope.forward.inputs import Batch, Forward, LossFunction
from gradscope.forward.interrupts import interruptible
from gradscope.forward.layers import LOSS, OUTPUT, numbered
from gradscope.forward.modules import Listener, Modules, eager, hooked, recording_gradients, tapped, tensors
from gradscope.forward.outputs import first_tensor
from gradscope.forward.snapshot import Snapshot
from gradscope.forward.state import alone, state_restored


@dataclass(frozen=True)
class Replay:
    """All that is needed to run a recorded forward pass again, with the same buffers and dropout masks.

    ``snapshot``: what the modules held before the recorded pass, if nothing but a measurement has run since.
    """

    modules: Modules
    batch: Batch
    forward: Forward | None
    loss_fn: LossFunction | None
    source_names: tuple[str, ...]
    snapshot: Snapshot | None = None

    def guard(self) -> state_restored:
        """Context in which passes may change anything in the modules."""
        return state_restored(self.modules, self.snapshot)

    @property
    def model(self) -> nn.Module:
        """The module that contains all others."""
        return self.modules[""]

    def outputs(self, wanted: Collection[str], shifts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ``wanted`` tensors from one forward pass like the recorded one, with ``shifts`` added to the sources."""
        listener = _Listener(set(wanted), shifts)
        names = self.source_names[: len(self.batch.floats)]
        with interruptible() as whole, whole, recording_gradients():
            batch, sources = self.batch.differentiable([shifts.get(name, 0.0) for name in names])
            for name, tensor in zip(names, sources, strict=True):
                listener.keep(name, tensor)
            output = self.output(batch, listener)
            listener.keep(OUTPUT, output)
            if self.loss_fn is not None:
                listener.keep(LOSS, self.loss_fn(output, batch.labels))
        return listener.kept

    def output(self, batch: Batch, listener: Listener, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The output for a batch of the same structure; ``parameters``, if given, replace those of the model."""
        with (
            alone,
            self.guard() as state,
            state,
            eager(self.modules),
            tapped(listener),
            hooked(self.modules, listener),
        ):
            if parameters is None:
                return first_tensor(batch.run(self.model, self.forward))
            call = _Call(self.model, batch, self.forward)
            return first_tensor(functional_call(call, self._places(parameters), (), tie_weights=False))

    def _places(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters under every name: a parameter that several modules hold has one name for each of them.

        torch's own ``tie_weights=True`` does not restore a module that is used in two places.
        """
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {
            ".".join(filter(None, ("model", prefix, own))): parameters[names[id(parameter)]]
            for prefix, module in self.modules.items()
            for own, parameter in module._parameters.items()
            if parameter is not None
        }


class _Call(nn.Module):
    """A module without arguments that runs a batch through a model, for `torch.func.functional_call`."""

    def __init__(self, model: nn.Module, batch: Batch, forward: Forward | None) -> None:
        super().__init__()
        self.model, self.batch, self.run = model, batch, forward

    def forward(self) -> Any:
        """The output of the model."""
        return self.batch.run(self.model, self.run)


class Passive:
    """A `Listener` that changes nothing."""

    def before(self, args: Any, kwargs: Any) -> None:
        """Does nothing."""

    def after(self, name: str, call: int, label: str, args: Any, kwargs: Any, output: Any, token: None) -> Any:
        """Does nothing; the output is not replaced."""

    def tap(self, tensor: Tensor, name: str) -> Tensor:
        """The tensor itself."""
        return tensor


class _Listener(Passive):
    """Keeps the module outputs whose names are wanted, and adds ``shifts`` to the outputs of embeddings."""

    def __init__(self, wanted: set[str], shifts: Mapping[str, Tensor]) -> None:
        self.wanted, self.shifts = wanted, shifts
        self.kept: dict[str, Tensor] = {}

    def after(self, name: str, call: int, label: str, args: Any, kwargs: Any, output: Any, token: None) -> Any:
        shifted = None
        if label in self.shifts and isinstance(output, Tensor):
            shifted = output = output + self.shifts[label]
        if name:
            for number, tensor in enumerate(t for t in tensors((output,), {}) if t.requires_grad):
                self.keep(numbered(label, number), tensor)
        return shifted

    def tap(self, tensor: Tensor, name: str) -> Tensor:
        self.keep(name, tensor)
        return tensor

    def keep(self, name: str, tensor: Tensor) -> None:
        if name in self.wanted and name not in self.kept:
            self.kept[name] = tensor.detach().clone()  # a later operation may overwrite it
