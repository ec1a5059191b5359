"""Tools for a forward pass of a user's module: unwrap it, and report its calls and marked tensors."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from itertools import count
from operator import attrgetter
from threading import get_ident
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradscope.choices import checked, stacklevel
from gradscope.forward.layers import OUTPUT
from gradscope.forward.outputs import leaf_tensors
from gradscope.forward.wrappers.refusals import class_name, doubtful, held, refusal

Modules = Mapping[str, nn.Module]
Owned = Mapping[str, Sequence[Tensor]]
Hook = Callable[..., Any]

# Numbers of hooks, one per call of `attach`.  Those of torch begin at 0 and are counted by `hooks_so_far`.
_NUMBERS = count(-1, -1)

transform_level = torch._C._functorch.maybe_current_level
_hooks_of = attrgetter(*(f"_forward_{kind}hooks{more}" for kind in ("", "pre_") for more in ("", "_with_kwargs")))


class CallListener(Protocol):
    """Receives every module call."""

    def before(self, args: Any, kwargs: Any) -> Any:
        """Called with the arguments of the module.  The value returned is passed to ``after`` as ``token``."""

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


@checked
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
    return transform_level() is not None


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
    owner = get_ident()

    def guard(name: str) -> None:
        # A thread of the autograd engine may run checkpointed layers again.
        if get_ident() != owner and torch._C._current_graph_task_id() == -1:
            raise RuntimeError(
                f"Layer {name or OUTPUT!r} was called while another thread measures this model: call the model and "
                "measure it one after the other, or measure a copy (copy.deepcopy(model))."
            )

    return guard


def unwrap(model: nn.Module, *, sharded: bool = False) -> nn.Module:
    """The eager module inside ``torch.compile`` and data-parallel wrappers; it may be sharded only if ``sharded``."""
    return listed(model, sharded=sharded)[""]


def listed(model: nn.Module, *, sharded: bool = False) -> dict[str, nn.Module]:
    """Every module of the eager model by its name; that of the model itself is empty.  Raises like `unwrap`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    modules = _named(model)
    holders = [module for module in modules.values() if module._parameters or module._buffers]
    kinds = {*map(type, modules.values()), *(type(t) for m in holders for t in held(m))}
    for name, module in modules.items() if any(map(doubtful, kinds)) else ():
        if reason := refusal(module, sharded=sharded):
            raise ValueError(f"{repr(name) if name else 'The model'}{reason}")
    if isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
        warnings.warn(
            "The model is compiled; its eager original is measured, with the same weights.", stacklevel=stacklevel()
        )
        return listed(original, sharded=sharded)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return listed(model.module, sharded=sharded)
    check_parameters(modules)
    return modules


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """``dict(model.named_modules())``, several times faster; by identity, because some modules change their hash."""
    found: dict[str, nn.Module] = {}
    known: dict[int, str] = {}
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        if (key := id(module)) not in known:
            known[key], found[name] = name, module
            if children := module._modules:
                inside = [(f"{name}.{own}" if name else own, m) for own, m in children.items() if m is not None]
                stack += inside[::-1]
    return found


def check_parameters(modules: Modules) -> None:
    """Raise ValueError if a parameter was made under ``torch.inference_mode()``."""
    for prefix, module in modules.items():
        for own, parameter in module._parameters.items() if module._parameters else ():
            if parameter is not None and parameter.is_inference():
                name = f"{prefix}.{own}".lstrip(".")
                raise ValueError(
                    f"Parameter {name!r} was made under torch.inference_mode(), so torch cannot differentiate through "
                    "it: build or load the model outside, or load its state_dict into a model that was built outside."
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
    compiled = [m for m in modules.values() if "_orig_mod" in m._modules or m._compiled_call_impl is not None]
    # The first use of set_stance imports the compiler, which takes seconds.
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def hooked(modules: Modules, listener: CallListener) -> Iterator[dict[str, int]]:
    """Report calls of the modules to ``listener``; yields the number of calls by name.  Errors get the layer's name."""
    calls: dict[str, int] = dict.fromkeys(modules, 0)
    running: list[tuple[str, Any]] = []
    guard, owner = own_thread(), get_ident()
    enter, leave = listener.before, listener.after

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if transform_level() is not None:
            return
        if get_ident() != owner:
            guard(name)
        running.append((name, enter(args, kwargs)))

    def after(own: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if transform_level() is not None:
            return None
        if get_ident() != owner:
            guard(own)
        name, token = running.pop()
        while name != own:  # a call inside this one raised, but the model caught the error
            name, token = running.pop()
        calls[name] = call = calls[name] + 1
        label = name or OUTPUT
        return leave(name, call, f"{label}#{call}" if call > 1 else label, args, kwargs, output, token)

    remove = attach(modules, before, after)
    try:
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
        remove()


def attach(modules: Modules, before: Hook, after: Hook = lambda *_: None) -> Callable[[], None]:
    """Call functions at the beginning and the end of every module call, with its name and arguments.

    The same as ``module.register_forward_hook(..., with_kwargs=True)``, at a tenth of its time.  Returns a function
    that removes them.
    """
    key = next(_NUMBERS)
    for name, module in modules.items():
        module._forward_pre_hooks[key], module._forward_hooks[key] = partial(before, name), partial(after, name)
        module._forward_pre_hooks_with_kwargs[key] = module._forward_hooks_with_kwargs[key] = True

    def remove() -> None:
        for module in modules.values():
            for hooks in _hooks_of(module):
                if key in hooks:
                    del hooks[key]

    return remove


def tensors(args: Any, kwargs: Any) -> Sequence[Tensor]:
    """All tensors in the arguments or outputs of a module."""
    if not kwargs and type(args) is tuple and args and not args[1:] and type(args[0]) is Tensor:
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
            owners[name or class_name(module)] = own
    if not owners:
        raise ValueError(
            "No parameter of the model requires a gradient, so there is nothing to measure: unfreeze some "
            "parameters with requires_grad_()."
        )
    return owners
