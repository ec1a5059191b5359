"""Decisions that may stay open: supported, contradicted or undecided, and sentences that follow them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.summaries import Mean


def below(found: Mean, bound: float) -> bool | None:
    """Whether a mean lies below ``bound``: True or False where its whole interval does or does not, else None."""
    return True if found.high < bound else False if found.low > bound else None


def above(found: Mean, bound: float) -> bool | None:
    """Whether a mean lies above ``bound``, likewise."""
    return True if found.low > bound else False if found.high < bound else None


def within(found: Mean, wanted: float, tolerance: float) -> bool | None:
    """Whether a mean lies within ``tolerance`` of ``wanted``: the whole interval inside, or outside, else None."""
    if wanted - tolerance < found.low and found.high < wanted + tolerance:
        return True
    return False if found.low > wanted + tolerance or found.high < wanted - tolerance else None


def all_of(*verdicts: bool | None) -> bool | None:
    """Whether everything holds; False as soon as one does not, None while one is open."""
    return False if False in verdicts else None if None in verdicts else True


def told(
    verdicts: Mapping[tuple[str, str], bool | None] | Mapping[str, bool | None],
    supported: str, contradicted: str, undecided: str,
) -> str:  # fmt: skip
    """A sentence for each verdict that occurs, in that order, with the names it is said of in place of ``{}``.

    Names in pairs are put together by the first: ``selu (wider, residual)``.
    """
    sentences = {True: supported, False: contradicted, None: undecided}
    parts = []
    for verdict, sentence in sentences.items():
        names: dict[str, list[str]] = {}
        for name, own in verdicts.items():
            if own is verdict:
                first, second = name if isinstance(name, tuple) else (name, "")
                names.setdefault(first, []).append(second)
        if names:
            words = [f"{first} ({', '.join(seconds)})" if any(seconds) else first for first, seconds in names.items()]
            parts.append(sentence.format(listed(words)))
    return " ".join(filter(None, parts))


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
