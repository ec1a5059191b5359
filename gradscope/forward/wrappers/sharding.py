"""Sharded models: `unsharded(model)` makes FSDP2 and tensor-parallel models whole in every process, for a while.

A measurement pulls many cotangents through one graph.  So all parameters are gathered once, as plain tensors, and the
hooks by which torch gathers, frees and redistributes them are taken off.  What is measured is then the model of one
process: outputs of column-parallel layers, for example, have their global length.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gradscope.distributed import parallel
from gradscope.forward.interrupts import interruptible
from gradscope.forward.wrappers.refusals import HOOKS, has_sharding_hooks, held, is_fsdp, is_sharding, original

Function = TypeVar("Function", bound=Callable[..., Any])
_SOURCE = "_gathered_from"  # the attribute of a whole parameter that holds the sharded one

LOADING = "_load_state_dict_post_hooks"  # those of FSDP2 take the parameters of a module for shards
STATE = "__composable_api_state_key"  # how names begin under which torch keeps the state of FSDP2 in a module


def is_sharded(model: nn.Module) -> bool:
    """Whether a module inside holds a DTensor, or has hooks of FSDP2 or of tensor parallelism."""
    if not parallel():
        return False
    from torch.distributed.tensor import DTensor  # takes a second to import

    return any(has_sharding_hooks(m) or any(isinstance(t, DTensor) for t in held(m)) for m in model.modules())


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Context in which a sharded model is whole: every process holds all parameters, and runs the model by itself.

    `gsc`, `gsc_matrix`, `nlc`, `parameter_gsc`, `measure`, `first_nonfinite`, `repair` and `Monitor` enter this context
    themselves.  Other functions need ``with gs.unsharded(model): ...``.  A model that is not sharded is not changed.

    Inside the context, full tensors replace all parameters and buffers that are DTensors, as ``fully_shard`` and
    ``parallelize_module`` make them.  The full tensors have the dtype of the shards, even if a ``MixedPrecisionPolicy``
    would cast them.  Hooks of FSDP2 and tensor parallelism do not run.  Modules have the classes that they had before
    ``fully_shard``, so the model can be copied.  After the context, parameters, gradients, hooks, classes and the state
    of FSDP2 are as before.  Do not train inside, because the optimizer updates the shards.

    All processes must enter together, in the same order.

    Cost: one all-gather per parameter; memory for all parameters of the model in every process.

    >>> import torch, gradscope as gs
    >>> model = torch.nn.Linear(2, 2)
    >>> with gs.unsharded(model):  # here, as in one process
    ...     print(gs.capture(model, torch.ones(1, 2)).target.shape)
    (1, 2)
    """
    if not is_sharded(model):
        yield
        return
    with _Unsharded(model) as whole, whole:
        yield


def of_whole(function: Function) -> Function:
    """The function of a model, called inside of `unsharded`."""

    @wraps(function)
    def measured(model: Any, *args: Any, **kwargs: Any) -> Any:
        with unsharded(model) if isinstance(model, nn.Module) else contextlib.nullcontext():
            return function(model, *args, **kwargs)

    return measured  # type: ignore[return-value]


class _Unsharded(interruptible):
    """The context behind `unsharded`; it is entered twice, as every `interruptible`."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self.undo: list[Callable[[], object]] = []

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if isinstance(error, RuntimeError) and not self.done:  # such as a wrong shape
            error.add_note(
                "The sharded model was run whole, without its hooks of torch.distributed: its forward must not use "
                "sizes of one shard, such as the number of heads of one process. Write -1 for this size."
            )
        super().__exit__(kind, error)

    @torch.no_grad()
    def _change(self) -> None:
        from torch.distributed.tensor import DTensor

        for module in self.modules:
            self._reshard(module)
        full: dict[int, Tensor] = {}  # tied parameters stay tied
        for module in self.modules:
            for members in (vars(module)["_parameters"], vars(module)["_buffers"]):
                for name, tensor in members.items():
                    if isinstance(tensor, DTensor):
                        if id(tensor) not in full:
                            full[id(tensor)] = _full(tensor)
                        self.undo.append(partial(members.__setitem__, name, tensor))
                        members[name] = full[id(tensor)]
            for kind in (*HOOKS, LOADING):
                hooks = getattr(module, kind)
                if any(map(is_sharding, hooks.values())):
                    self.undo.append(partial(module.__dict__.__setitem__, kind, hooks))
                    module.__dict__[kind] = OrderedDict((k, h) for k, h in hooks.items() if not is_sharding(h))
            self._release(module)

    def _release(self, module: nn.Module) -> None:
        """Take the class and the state of FSDP2 off a module: with them, it has another type and cannot be copied."""
        if is_fsdp(module):
            kind, members = type(module), vars(module)
            self.undo.append(partial(setattr, module, "__class__", kind))
            module.__class__ = original(kind)
            for name in [name for name in members if name.startswith(STATE)]:
                self.undo.append(partial(members.__setitem__, name, members[name]))
                del members[name]
            for name, method in list(members.items()):  # of register_fsdp_forward_method
                function = getattr(method, "__func__", None)
                if function is not None and function.__globals__["__name__"].startswith("torch.distributed.fsdp"):
                    self.undo.append(partial(members.__setitem__, name, method))
                    members[name] = function.__wrapped__

    def _reshard(self, module: Any) -> None:
        """Let FSDP2 give a module its shards, if it holds whole parameters now (rounded, in mixed precision)."""
        if is_fsdp(module):
            before = list(module.parameters())
            module.reshard()
            if any(a is not b for a, b in zip(before, module.parameters(), strict=True)):
                self.undo.append(module.unshard)

    def _restore(self, kind: type[BaseException] | None) -> None:
        while self.undo:
            self.undo[-1]()
            self.undo.pop()


def stored(parameter: Tensor) -> Tensor:
    """The sharded parameter that this one was gathered from by `unsharded`; any other parameter itself."""
    return getattr(parameter, _SOURCE, parameter)


def reshard(model: nn.Module) -> None:
    """Let the next forward pass of FSDP2 gather parameters again, because their shards have changed."""
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()  # type: ignore[operator]


def _full(tensor: Any) -> Tensor:
    """All of a DTensor."""
    whole: Tensor = tensor.detach().full_tensor()
    if isinstance(tensor, nn.Parameter):
        whole = nn.Parameter(whole, tensor.requires_grad)
        setattr(whole, _SOURCE, tensor)
    return whole
