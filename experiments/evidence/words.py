"""Names, intervals and verdicts as words of a sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

# Digits that may be added until the two ends of an interval are printed differently.
MOST_EXTRA = 3


def listed(values: Iterable[object], last: str = "and") -> str:
    """The values as ``a``, ``a and b`` or ``a, b and c``, with ``last`` instead of "and"; "none" without values."""
    words = [f"{one:g}" if isinstance(one, float) else str(one) for one in values]
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else "none"


def span(low: float, high: float, form: str) -> tuple[str, str]:
    """The interval in words, such as ``1.462 to 1.480``, and the number format of its ends.

    Digits are added to ``form`` until the ends differ. If `MOST_EXTRA` digits are too few, the words are "no spread".
    """
    digits = re.search(r"\.(\d+)", form)
    assert digits, f"A format needs a number of digits, got {form!r}."
    for extra in range(MOST_EXTRA + 1):
        finer = form.replace(digits[0], f".{int(digits[1]) + extra}")
        ends = format(low, finer), format(high, finer)
        if ends[0] != ends[1]:
            return " to ".join(ends), finer
    return "no spread", form


def digits(width: float, most: int = 6) -> int:
    """The number of decimals that show two significant digits of a width; 3 if the width is unknown."""
    return max(0, min(most, 1 - math.floor(math.log10(width)))) if 0 < width < math.inf else 3


def measured(value: float, low: float, high: float) -> str:
    """A number with as many digits as its interval supports, such as ``1.25 (1.17 to 1.34)``."""
    if not math.isfinite(high - low):
        return f"{value:.3g} (no interval)"
    places = digits(high - low)
    ends = f"{low:.{places}f}", f"{high:.{places}f}"
    return f"{value:.{places}f} ({' to '.join(ends) if ends[0] != ends[1] else 'no spread'})"


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
