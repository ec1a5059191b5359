"""The claims of a study, as Markdown.  Claims that differ in one or two places become the rows of one table."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from experiments.evidence.study import Claim
from experiments.evidence.words import table

RULE = (
    "Brackets after a number contain its 95 % interval. A claim is supported if all values in the interval satisfy "
    "it, contradicted if no value does, and undecided otherwise. A claim with several intervals is supported if all of "
    "them support it, contradicted if at least one contradicts it, and undecided otherwise. A claim about a number "
    "without an interval is supported if the number satisfies it, and contradicted otherwise. Some claims have another "
    'rule, which the claim or the method states. "No spread" means that both ends of an interval are equal up to '
    "rounding."
)
GROUPED = (
    "Claims with nearly the same sentence are the rows of a table. *X* and *Y* stand for the words that differ. "
    "Brackets after the sentence contain what holds for all rows, such as the limit that decides."
)
EXPLORATORY = 'Claims that begin with "Exploratory" were added after a first look at the data.'
CHECKED = "*Checked* claims are theorems or identities, tested up to rounding. Only a bug could make such a test fail."
SLOT, SLOTS = "…", ("X", "Y")
MOST_COLUMNS = 7


@dataclass
class Group:
    """Claims whose sentences agree in all words but those at the slots of ``pattern``, and name the same numbers."""

    pattern: list[str]
    claims: list[Claim]

    def with_claim(self, claim: Claim) -> Group | None:
        """The group with one more claim, or None if the claim does not fit."""
        words, first = tokens(claim.says), self.claims[0]
        same = (claim.identity, _explores(claim), list(parts(claim)))
        if same != (first.identity, _explores(first), list(parts(first))):
            return None
        pattern, place, other = list[str](), 0, 0
        for start, begin, size in SequenceMatcher(None, self.pattern, words, autojunk=False).get_matching_blocks():
            if (start > place) != (begin > other):
                return None
            pattern += [SLOT] * (start > place) + words[begin : begin + size]
            place, other = start + size, begin + size
        if not 0 < pattern.count(SLOT) <= len(SLOTS) or 2 * (len(pattern) - pattern.count(SLOT)) < len(words):
            return None
        wider = Group(pattern, [*self.claims, claim])
        return wider if pattern.count(SLOT) + 1 + len(wider.header()[0]) <= MOST_COLUMNS else None

    def header(self) -> tuple[list[str], dict[str, str]]:
        """The names of the columns of numbers, and the other numbers, which are equal in all claims.

        The first number of a claim always has a column, even if it is equal in all claims.
        """
        found = [parts(claim) for claim in self.claims]
        first, *others = found[0]
        common = {name: found[0][name] for name in others if len({values[name] for values in found}) == 1}
        return [first, *(name for name in others if name not in common)], common

    def __str__(self) -> str:
        """One table, or one item if there is only one claim."""
        if len(self.claims) == 1:
            (claim,) = self.claims
            return f"- **{claim.verdict}**: {claim.says}.\n  Measured: {claim.because}."
        names = iter(SLOTS)
        says = joined(f"*{next(names)}*" if word == SLOT else word for word in self.pattern)
        cases = re.compile(joined("(.+?)" if word == SLOT else re.escape(word) for word in self.pattern))
        shown, common = self.header()
        rows = []
        for claim in self.claims:
            match, values = cases.fullmatch(claim.says), parts(claim)
            assert match is not None, f"{claim.says!r} does not have the pattern {says!r}."
            rows.append([*match.groups(), claim.verdict, *(values[name] for name in shown)])
        limits = "; ".join(f"{name}: {value}".removeprefix(": ") for name, value in common.items())
        columns = [*SLOTS[: self.pattern.count(SLOT)], "verdict", *(name or "measured" for name in shown)]
        return f"**{says}**{f' ({limits})' if limits else ''}:\n\n{table(columns, rows)}"


def tokens(text: str) -> list[str]:
    """The words of a sentence, and the commas, colons and semicolons that end them."""
    return re.findall(r"[^\s,:;]+(?:[,:;]+[^\s,:;]+)*|[,:;]", text)


def joined(words: Iterable[str]) -> str:
    """The sentence of these `tokens`."""
    return "".join(word if word in ",:;" else f" {word}" for word in words).strip()


def _explores(claim: Claim) -> bool:
    return claim.says.startswith("Exploratory")


def parts(claim: Claim) -> dict[str, str]:
    """The numbers of a claim by name: ``"rate: 1.1; p = 0.2"`` has the parts rate and p."""
    numbers = re.split(r";\s+(?![^()]*\))", claim.because)
    named = dict[str, str]()
    for number in numbers:
        found = re.fullmatch(r"(\w+) = (.+)", number) or re.fullmatch(r"((?:[^():]|\([^()]*\))+): (.+)", number)
        named[found[1] if found else ""] = found[2] if found else number
    return named if len(named) == len(numbers) else {"": claim.because}


def grouped(claims: Sequence[Claim]) -> Iterator[Group]:
    """The claims in groups, each at the place of its first claim."""
    groups: list[Group] = []
    for claim in claims:
        for place, group in enumerate(groups):
            if (wider := group.with_claim(claim)) is not None:
                groups[place] = wider
                break
        else:
            groups.append(Group(tokens(claim.says), [claim]))
    yield from groups


def claim_list(claims: Sequence[Claim]) -> str:
    """How claims are decided, and for each claim its verdict, its sentence, and the numbers that decide."""
    groups = list(grouped(claims))
    head = [RULE]
    if len(groups) < len(claims):
        head.append(GROUPED)
    if any(map(_explores, claims)):
        head.append(EXPLORATORY)
    lists = itertools.groupby(groups, key=lambda group: len(group.claims) == 1)
    text = [("\n" if single else "\n\n").join(map(str, of)) for single, of in lists]
    tail = [CHECKED] if any(claim.verdict == "checked" for claim in claims) else []
    return "\n\n".join([" ".join(head), *text, *tail])
