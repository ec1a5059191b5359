"""What the layers of a network should be: their activation, normalization and initialization."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from gradscope.checks.segments import Segment
from gradscope.checks.siblings import Deviation
from gradscope.measures.preactivations import NONLINEARITIES

ACTIVATION, NORMALIZATION, INITIALIZATION = KEYS = ("activation", "normalization", "initialization")
NORMALIZATIONS = (
    nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm,
)  # fmt: skip
KNOWN = {ACTIVATION: NONLINEARITIES, NORMALIZATION: NORMALIZATIONS}
NONE = ("none", "linear")


def unexpected(segments: Sequence[Segment], expected: Mapping[str, Any]) -> list[Deviation]:
    """Return the segments that do not run the expected activation or normalization.

    An expectation is a module class, or its name.  Upper case and underscores do not matter, as in "leaky_relu".
    "batch", "layer", "group", "instance" and "rms" stand for all normalizations whose names begin with this word.
    "none" forbids all activations or normalizations of torch.nn.  If no four layers are of one kind, the last layer is
    not compared.

    Raises:
        ValueError: An expectation is neither a class nor a name, or no layer runs a module that could fulfill it.
    """
    deviations = []
    for key, known in KNOWN.items():
        if key not in expected:
            continue
        wanted = expected[key]
        if not isinstance(wanted, (str, type)):
            raise ValueError(f"expected[{key!r}] must be a module class or its name, got {wanted!r}.")
        fits = [[leaf for leaf in s.leaves if _fits(leaf, wanted, key)] for s in segments]
        known_ones = [[leaf for leaf in s.leaves if issubclass(leaf, known)] for s in segments]
        forbidden, name = wanted in NONE, wanted if isinstance(wanted, str) else wanted.__name__
        if not forbidden and not any(fits) and not any(known_ones):
            raise ValueError(
                f"expected[{key!r}] is {name!r}, but no layer runs a module of torch.nn for it; functional calls such "
                "as F.relu are not seen. Leave the key out, or use modules."
            )
        for segment, right, others in zip(segments, fits, known_ones, strict=True):
            runs = " and ".join(dict.fromkeys(leaf.__name__ for leaf in others)) or "none"
            if bool(others) if forbidden else not right:
                text = f"{key}: expected {name}, but it runs {runs}"
                deviations.append(Deviation(segment.name, key, math.inf, text))
    return deviations


def _fits(leaf: type[nn.Module], wanted: str | type, key: str) -> bool:
    if isinstance(wanted, type):
        return issubclass(leaf, wanted)
    name, own = wanted.lower().replace("_", ""), leaf.__name__.lower()
    return own.startswith(name) if key == NORMALIZATION else own == name
