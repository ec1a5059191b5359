"""Which layer of one model corresponds to which layer of another: by name, else by order and structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import NamedTuple

# What torch puts into the names of modules: data parallelism, the compiler, checkpointing, sharding.
WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


class Structure(NamedTuple):
    """The shapes of what a layer returned, and of all parameters of its module."""

    returned: tuple[tuple[int, ...], ...]
    parameters: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Matching:
    """Which layers of two models are partners.

    ``partner``: dict from names in the second model to names in the first, in execution order.  ``renamed``: pairs of
    names that differ.  ``only_first``, ``only_second``: names without a partner.
    """

    partner: Mapping[str, str]
    renamed: tuple[tuple[str, str], ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def bare(name: str) -> str:
    """The name of a layer without the parts that wrappers add.

    >>> bare("module.layers.0._orig_mod.linear#2")
    'layers.0.linear#2'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def matched(first: Mapping[str, Structure], second: Mapping[str, Structure]) -> Matching:
    """Match the layers of two models; each argument maps names to structures, in execution order.

    Partners are, in this order: layers with equal names (without wrappers) and structures; layers with equal structures
    at the same place between those (the longest blocks that both sequences share, `difflib.SequenceMatcher`); layers
    with equal names that return equal shapes.

    >>> wide, narrow = Structure(((4, 8),)), Structure(((4, 2),))
    >>> found = matched({"fc1": wide, "act": wide, "fc2": narrow}, {"module.fc1": wide, "head": narrow})
    >>> dict(found.partner), found.renamed, found.only_first
    ({'module.fc1': 'fc1', 'head': 'fc2'}, (('fc2', 'head'),), ('act',))
    """
    partner: dict[str, str] = {}

    def by_name(alike: Callable[[Structure, Structure], bool]) -> None:
        taken = set(partner.values())
        free = {bare(name): name for name in reversed(list(first)) if name not in taken}
        for name, structure in second.items():
            own = free.get(bare(name))
            if name not in partner and own is not None and alike(first[own], structure):
                partner[name] = free.pop(bare(name))

    by_name(lambda a, b: a == b)
    known = set(partner.values())
    # A pair of equal names is a symbol of its own, so that a block of other layers does not reach across it.
    left = [name if name in known else structure for name, structure in first.items()]
    right = [partner.get(name, structure) for name, structure in second.items()]
    firsts, seconds = list(first), list(second)
    for a, b, size in SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks():
        partner |= dict(zip(seconds[b : b + size], firsts[a : a + size], strict=True))
    by_name(lambda a, b: a.returned == b.returned)
    taken = set(partner.values())
    return Matching(
        partner={name: partner[name] for name in second if name in partner},
        renamed=tuple((partner[name], name) for name in second if bare(name) != bare(partner.get(name, name))),
        only_first=tuple(name for name in first if name not in taken),
        only_second=tuple(name for name in second if name not in partner and bare(name)),  # not a wrapper's own call
    )
