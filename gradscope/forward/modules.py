"""Tools for a forward pass of a user's module: unwrap it, and report its calls and marked tensors."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradscope.forward.inputs import leaf_tensors
from gradscope.forward.layers import OUTPUT

Modules = Mapping[str, nn.Module]
Owned = Mapping[str, Sequence[Tensor]]

_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}


class CallListener(Protocol):
    """Receives every module call."""

    def before(self, args: Any, kwargs: Any) -> Any:
        """Called with the arguments of the module.  The value returned here is passed to ``after`` as ``token``."""

    def after(self, name: str, call: int, label: str, args: Any, kwargs: Any, output: Any, token: Any) -> Any:
        """Called with the output of the module.  A value returned here replaces the output, unless it is None.

        ``name`` is empty for the root, ``call`` counts the calls of this module from 1, and ``label`` is the name of
        the layer: the module's name, with ``#2``, ``#3`` for its further calls, or "output" for the root.
        """


class Listener(CallListener, Protocol):
    """Receives every module call and every tensor marked with `tap`."""

    def tap(self, tensor: Tensor, name: str) -> Tensor:
        """Called with a marked tensor; the return value replaces the tensor."""


listening: ContextVar[tuple[Listener, Counter[str]] | None] = ContextVar("gradscope_tap_listener", default=None)


def tap(tensor: Tensor, name: str) -> Tensor:
    """Mark a tensor inside a ``forward`` as a layer called ``name``; returns the tensor itself.

    Use `tap` for functional code outside modules.  Further tensors with the same name in one forward pass are called
    ``name#2``, ``name#3``.  Outside a measurement `tap` does nothing, so the call can stay in the model.

    >>> import torch, gradscope as gs
    >>> class Square(torch.nn.Module):
    ...     def forward(self, x):
    ...         return gs.tap(x * x, "square").sum(1)
    >>> [layer.name for layer in gs.capture(Square(), torch.ones(2, 3)).layers]
    ['input', 'square', 'output']
    """
    current = listening.get()
    if current is None or transforming():
        return tensor
    listener, calls = current
    calls[name] += 1
    return listener.tap(tensor, name if calls[name] == 1 else f"{name}#{calls[name]}")


def transforming() -> bool:
    """Whether a transform of `torch.func` is running: the tensors inside belong to it, and must not leave it."""
    return torch._C._functorch.maybe_current_level() is not None


@contextlib.contextmanager
def tapped(listener: Listener) -> Iterator[None]:
    """Report every marked tensor to ``listener``."""
    token = listening.set((listener, Counter()))
    try:
        yield
    finally:
        listening.reset(token)


def own_thread() -> Callable[[str], None]:
    """A function of a layer's name that raises RuntimeError if it is called in another thread than this one."""
    owner = threading.get_ident()

    def guard(name: str) -> None:
        # A thread of the autograd engine may run checkpointed layers again.
        if threading.get_ident() != owner and torch._C._current_graph_task_id() == -1:
            raise RuntimeError(
                f"Layer {name or OUTPUT!r} was called while another thread measures this model: call the model and "
                "measure it one after the other, or measure a copy (copy.deepcopy(model))."
            )

    return guard


def unwrap(model: nn.Module) -> nn.Module:
    """The eager module inside ``torch.compile`` and data-parallel wrappers; an error if the model is sharded."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    for name, module in model.named_modules():
        label = f"{name or 'The model'!r} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{label} is TorchScript, whose layers cannot be observed: measure the original module, before "
                "torch.jit.script or torch.jit.trace."
            )
        if any(map(is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            raise ValueError(
                f"{label} is not initialized: call the model once, model(x), before you measure it. Its weights are "
                "drawn at random in this call, and a measurement must not draw them."
            )
        if any(base.__name__ in _SHARDED for base in type(module).__mro__):
            raise ValueError(
                f"{name or 'The model'!r} is sharded (FSDP), so no process holds all parameters. Measure the model "
                "before you wrap it, or load the full state dict into a copy without FSDP."
            )
    if isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
        warnings.warn("The model is compiled; its eager original is measured, with the same weights.", stacklevel=3)
        return unwrap(original)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(model.module)
    check_parameters(model)
    return model


def check_parameters(model: nn.Module) -> None:
    """Raise ValueError if a parameter was made under ``torch.inference_mode()``."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"Parameter {name!r} was made under torch.inference_mode(), so torch cannot differentiate through it: "
                "build or load the model outside, or load its state_dict into a model that was built outside."
            )


@contextlib.contextmanager
def recording_gradients() -> Iterator[None]:
    """The modes of every forward pass of a measurement, whatever the modes of the caller.

    Without gradients, torch runs other code for some modules (nested tensors in a TransformerEncoder with a padding
    mask), so such a pass would show another network than the one that is differentiated.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextlib.contextmanager
def eager(modules: Modules) -> Iterator[None]:
    """Run compiled parts of the model in eager mode, because hooks would make torch compile them again."""
    compiled = any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in modules.values())
    # The first use of set_stance imports the compiler, which takes seconds.
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def hooked(modules: Modules, listener: CallListener) -> Iterator[dict[str, int]]:
    """Report calls of the modules to ``listener``; yields the number of calls by name.  Errors get the layer's name."""
    names = {id(module): name for name, module in modules.items()}  # the hash of a metric changes with its state
    calls: dict[str, int] = defaultdict(int)
    running: list[tuple[str, Any]] = []
    guard = own_thread()

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if transforming():
            return
        guard(names[id(module)])
        running.append((names[id(module)], listener.before(args, kwargs)))

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if transforming():
            return None
        guard(names[id(module)])
        name, token = running.pop()
        while name != names[id(module)]:  # a call inside this one raised, but the model caught the error
            name, token = running.pop()
        calls[name] = call = calls[name] + 1
        label = name or OUTPUT
        return listener.after(name, call, f"{label}#{call}" if call > 1 else label, args, kwargs, output, token)

    handles = []
    try:
        for module in modules.values():
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        yield calls
    except Exception as error:
        where = running[-1][0] if running else ""
        if "Expected more than 1 value per channel" in str(error):
            raise ValueError(
                f"{where!r} normalizes over the batch, and a batch of one has no variance: "
                "give at least two samples, or call model.eval() to use running statistics."
            ) from error
        if where:
            error.add_note(f"Raised inside layer {where!r} during the recorded forward pass.")
        raise
    finally:
        for handle in handles:
            handle.remove()


def tensors(args: Any, kwargs: Any) -> Sequence[Tensor]:
    """All tensors in the arguments or outputs of a module."""
    if not kwargs and type(args) is tuple and len(args) == 1 and type(args[0]) is Tensor:
        return args  # the usual case: the general code below takes longer than a small layer
    return list(leaf_tensors((args, kwargs)))


def owned_parameters(modules: Modules) -> dict[str, list[Tensor]]:
    """Trainable parameters by module name, without empty ones; one that several modules hold belongs to the first."""
    known: set[int] = set()
    owners: dict[str, list[Tensor]] = {}
    for name, module in modules.items():
        own: list[Tensor] = [
            p
            for p in module._parameters.values()
            if p is not None and p.requires_grad and p.numel() and id(p) not in known
        ]
        known |= {id(p) for p in own}
        if own:
            owners[name or type(module).__name__] = own
    if not owners:
        raise ValueError(
            "No parameter of the model requires a gradient, so there is nothing to measure: unfreeze some "
            "parameters with requires_grad_()."
        )
    return owners
