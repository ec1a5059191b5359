"""Which layers of networks of different sizes belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gradscope.choices import listed
from gradscope.comparing.coordinates.measurement import Network

Names = dict[str, str]  # name in one network -> common name
FIRST, MIDDLE, LAST = "first", "middle", "last"


def by_name(networks: Mapping[int, Network]) -> dict[int, Names]:
    """The layers of each width under their own names, which must be the same for all widths.

    Raises:
        ValueError: The names differ, or no shape depends on the width.
    """
    (first, known), *others = networks.items()
    for width, network in others:
        if differing := sorted(known.shapes.keys() ^ network.shapes.keys()):
            raise ValueError(
                f"factory makes other layers at width {width} than at width {first}: {listed(differing)} exist at one "
                "of them only. Choose layers= that exist at every width."
            )
        if network.shapes == known.shapes:
            raise ValueError(
                f"factory ignores the width: all layers of widths {first} and {width} have equal shapes. Build the "
                "model from the argument of factory."
            )
    return {width: {name: name for name in network.shapes} for width, network in networks.items()}


def by_place(networks: Mapping[int, Network]) -> dict[int, Names]:
    """The layers of each depth under common names; of containers that grow with depth, three items are kept.

    The first, the middle and the last item are called ``blocks.first``, ``blocks.middle`` and ``blocks.last``.

    Raises:
        ValueError: No container grows with depth.
    """
    lengths = {depth: _lengths(list(network.shapes)) for depth, network in networks.items()}
    growing = {c for own in lengths.values() for c in own if len({other.get(c, 0) for other in lengths.values()}) > 1}
    if not growing:
        raise ValueError(
            f"factory ignores the depth: the layers of depths {listed(networks)} have equal names. Build the model "
            "from the argument depth."
        )
    found = {depth: _placed(list(network.shapes), lengths[depth], growing) for depth, network in networks.items()}
    common = set.intersection(*(set(names.values()) for names in found.values()))
    return {depth: {name: place for name, place in names.items() if place in common} for depth, names in found.items()}


def _lengths(names: Sequence[str]) -> dict[str, int]:
    """The number of items of each container, from the numbers in names of layers."""
    found: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        for place, part in enumerate(parts):
            if part.isdigit():
                container = ".".join(parts[:place])
                found[container] = max(found.get(container, 0), int(part) + 1)
    return found


def _placed(names: Sequence[str], lengths: Mapping[str, int], growing: set[str]) -> Names:
    found = {}
    for name in names:
        parts, own = name.split("."), []
        for place, part in enumerate(parts):
            length = lengths.get(".".join(parts[:place]), 0)
            if part.isdigit() and ".".join(parts[:place]) in growing:
                part = {length // 2: MIDDLE, length - 1: LAST, 0: FIRST}.get(int(part), "")
            own.append(part)
        if all(own):
            found[name] = ".".join(own)
    return found
