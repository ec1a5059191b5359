"""Names, intervals and verdicts as words of a sentence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

# NO_SPREAD: an interval whose width relative to its larger end is at most this is only rounding ("no spread").
# SCIENTIFIC: numbers with at least this number of decimals are written as 1.2e-09.
NO_SPREAD, SCIENTIFIC = 1e-6, 9


def listed(values: Iterable[object], last: str = "and") -> str:
    """The values as ``a``, ``a and b`` or ``a, b and c``, with ``last`` instead of "and"; "none" without values."""
    words = [f"{one:g}" if isinstance(one, float) else str(one) for one in values]
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else "none"


def digits(width: float, most: int = 6) -> int:
    """The number of decimals that show two significant digits of a width; 3 if the width is unknown."""
    return max(0, min(most, 1 - math.floor(math.log10(width)))) if 0 < width < math.inf else 3


def measured(value: float, low: float, high: float, sign: str = "") -> str:
    """A number with as many digits as its interval supports, such as ``1.25 (1.17 to 1.34)``.

    The last digit is the second significant digit of twice the distance from the value to the nearer end of the
    interval. If the value is an end, the last digit is the second significant digit of the width. ``sign`` may be
    ``+``.
    """
    width, largest = high - low, max(abs(low), abs(high))
    if not math.isfinite(width):
        return f"{value:{sign}.3g} (no interval)"
    if width <= NO_SPREAD * largest:
        return f"{value:{sign}.4g} (no spread)"
    nearer = min(value - low, high - value)
    places = 1 - math.floor(math.log10(max(2 * nearer, width / 10) if nearer > 0 else width))
    form = f"{max(0, places)}f" if places < SCIENTIFIC else f"{places + math.floor(math.log10(largest))}e"
    number, *ends = (f"{round(one, places):{sign}z.{form}}" for one in (value, low, high))  # z: no minus before 0
    return f"{number} ({' to '.join(ends)})"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def told(
    verdicts: Mapping[tuple[str, str], bool | None] | Mapping[str, bool | None],
    supported: str, contradicted: str, undecided: str,
) -> str:  # fmt: skip
    """One sentence for each verdict that occurs, in the order of the arguments. Names replace ``{}`` in a sentence.

    Names that are pairs are grouped by their first part: ``selu (wider, residual)``.
    """
    parts = []
    for verdict, sentence in {True: supported, False: contradicted, None: undecided}.items():
        names: dict[str, list[str]] = {}
        for name, own in verdicts.items():
            if own is verdict:
                first, second = name if isinstance(name, tuple) else (name, "")
                names.setdefault(first, []).append(second)
        if names:
            words = [f"{first} ({', '.join(seconds)})" if any(seconds) else first for first, seconds in names.items()]
            parts.append(sentence.format(listed(words)))
    return " ".join(filter(None, parts))
