"""Layers (recorded tensors of the forward pass) and how to select them: by name, glob or callable."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from fnmatch import fnmatchcase

import torch
from torch.autograd.graph import GradientEdge

INPUT, OUTPUT, LOSS = "input", "output", "loss"


class Origin(Enum):
    """Where a name of a tensor comes from."""

    MADE = "made"  # the module call computed it
    PASSED_ON = "passed on"  # the module call returned its input, as an Identity does
    MARKED = "marked"  # the input, the loss, or a tensor marked with tap()
    OUTPUT = "output"  # the root module returned it


@dataclass(frozen=True, init=False)
class Layer:
    """One tensor of the forward pass, named after the module call that made it.

    - ``name``: the module's name, with ``#2``, ``#3`` for further calls and ``[1]``, ``[2]`` for further outputs.
    - ``origins``: a dict from every name of the tensor to the reason for this name, such as "made": the module call
      with this name computed the tensor.
    - ``call``: which call of the module made the tensor, counted from 1.
    - ``index``: place of the tensor in execution order; the input is 0.
    - ``shape``: shape for the whole batch, samples first.
    - ``bytes``: memory of the tensor.
    - ``modified``: whether an in-place operation overwrote the tensor later.  The layer describes the old values.
    - ``on_trunk``: whether every path from the input to the target passes through the tensor.

    >>> import torch, gradscope as gs
    >>> layer = gs.capture(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()), torch.ones(2, 3)).layers[1]
    >>> layer.name, layer.index, layer.shape, layer.on_trunk
    ('0', 1, (2, 4), True)
    """

    name: str
    call: int
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    origins: dict[str, Origin] = field(repr=False)
    edge: GradientEdge = field(repr=False)
    bytes: int = field(repr=False)
    modified: bool = False
    on_trunk: bool = False

    def __init__(
        self,
        name: str,
        call: int,
        index: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        origins: dict[str, Origin],
        edge: GradientEdge,
        bytes: int,
        modified: bool = False,
        on_trunk: bool = False,
    ) -> None:
        own = vars(self)  # a pass makes hundreds of layers, and a frozen dataclass would set each field by a call
        own["name"], own["call"], own["index"], own["shape"], own["dtype"] = name, call, index, shape, dtype
        own["device"], own["origins"], own["edge"], own["bytes"] = device, origins, edge, bytes
        own["modified"], own["on_trunk"] = modified, on_trunk

    @property
    def names(self) -> tuple[str, ...]:
        """Every name of this tensor; one tensor can be the output of several modules."""
        return tuple(self.origins)

    @property
    def size(self) -> int:
        """Number of real numbers in the tensor for the whole batch; a complex number counts as two."""
        return torch.Size(self.shape).numel() * (2 if self.dtype.is_complex else 1)

    @property
    def real_dtype(self) -> torch.dtype:
        """The dtype of the real numbers in the tensor, for example float32 for complex64."""
        return self.dtype.to_real()

    def called(self, name: str) -> Layer:
        """Return the same layer under another one of its ``names``."""
        return self if name == self.name else Layer(**(vars(self) | {"name": name}))


LayerFilter = str | Sequence[str] | Callable[[Layer], bool]


def _accepts(wanted: Callable[[Layer], bool], layer: Layer) -> bool:
    answer = wanted(layer)
    try:
        return bool(answer)
    except (ValueError, RuntimeError) as error:  # of a whole tensor or array
        raise TypeError(
            f"The callable given as layers= must return True or False for a layer; for {layer.name!r} it returned a "
            f"{type(answer).__name__} that is neither."
        ) from error


def select(layers: Sequence[Layer], wanted: LayerFilter, elsewhere: Collection[str] = ()) -> list[Layer]:
    """Layers that a glob, a list of globs over names, or a callable chooses, in execution order.

    Raises ValueError, with the nearest names, if a pattern or the callable matches no layer.  ``elsewhere`` names the
    recorded layers on which the target does not depend; such a layer does not count as a match.
    """
    if not isinstance(wanted, str) and callable(wanted):
        chosen = [layer for layer in layers if _accepts(wanted, layer)]
        if not chosen:
            raise ValueError("The callable given as layers= accepted none of the recorded layers. " + _listed(layers))
        return chosen
    names: dict[int, str] = {}
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        matches = {layer.index: name for layer in layers for name in layer.names if _matches(name, pattern)}
        if not matches:
            raise ValueError(_missing(pattern, layers, elsewhere))
        names = matches | names
    if not names:
        raise ValueError("layers= is an empty list; leave it out to measure every unit. " + _listed(layers))
    return [layer.called(names[layer.index]) for layer in layers if layer.index in names]


def find(layers: Sequence[Layer], name: str, elsewhere: Collection[str] = ()) -> Layer:
    """The layer of that name, returned under this name; ValueError with the nearest names if there is none."""
    return lookup(layers, name, elsewhere).called(name)


def lookup(layers: Sequence[Layer], name: str, elsewhere: Collection[str] = ()) -> Layer:
    """The layer that has ``name`` among its names; raises like `find`."""
    for layer in layers:
        if name in layer.names:
            return layer
    raise ValueError(_missing(name, layers, elsewhere))


def numbered(label: str, number: int) -> str:
    """Name of output ``number``, counted from 0, of the module call ``label``."""
    return f"{label}[{number}]" if number else label


def module_name(name: str) -> str:
    """A layer's name without the numbers of call and output."""
    return name.partition("#")[0].partition("[")[0]


def _missing(pattern: str, layers: Sequence[Layer], elsewhere: Collection[str]) -> str:
    if any(_matches(name, pattern) for name in elsewhere):
        return f"Layer {pattern!r} was recorded, but the target does not depend on it, so the layer has no coefficient."
    close = get_close_matches(pattern, [name for layer in layers for name in layer.names], n=5, cutoff=0.3)
    offer = f"Nearest names: {', '.join(map(repr, close))}." if close else _listed(layers)
    wild = " In a pattern, only * and ? are wildcards." if "[" in pattern else ""  # lstm[1] is the name of an output
    return f"No layer is called {pattern!r}.{wild} {offer}"


def _listed(layers: Sequence[Layer]) -> str:
    names = [layer.name for layer in layers]
    return f"Recorded: {', '.join(map(repr, names[:12]))}" + (f" and {len(names) - 12} more." if names[12:] else ".")


def _matches(name: str, pattern: str) -> bool:
    # "[1]" in a layer's name is an output number, not a glob's character class.
    return name == pattern or fnmatchcase(name, pattern.replace("[", "[[]"))
