"""Claims as tables: every claim can be read back from its table, and claims that do not fit stay apart."""

import itertools
import random
import re
from pathlib import Path

import pytest

from experiments.evidence.study import Claim
from experiments.reports.claims import claim_list

PAGES = sorted(Path("docs/studies").glob("[!R]*.md"))
ROW = re.compile(r"^\| (.*) \|$")


def read_back(text):
    """(sentence, verdict, numbers) of every claim of a text: of list items, and of the rows of tables."""
    found = []
    for verdict, says, because in re.findall(r"^- \*\*(\w+)\*\*: (.*)\.\n  Measured: (.*)\.$", text, re.M):
        found.append((says, verdict, because))
    for head, body in re.findall(r"^\*\*(.*\*X\*.*?)\*\*(?: \(.*\))?:\n\n((?:\|.*\n?)+)", text, re.M):
        titles, _, *rows = [ROW.match(line)[1].replace(r"\|", "¦").split(" | ") for line in body.splitlines()]
        for row in rows:
            cells = dict(zip(titles, row, strict=True))
            says = re.sub(r"\*([XY])\*", lambda slot, cells=cells: cells[slot[1]], head)
            numbers = [cell for title, cell in cells.items() if title not in ("X", "Y", "verdict")]
            found.append((says, cells["verdict"], "; ".join(numbers)))
    return found


def test_claims_that_differ_in_one_place_are_rows_of_one_table():
    claims = [
        Claim("The network selu, deep, explodes", True, "rate: 1.1 (1.0 to 1.2); limit: 1.02; p = 0.1"),
        Claim("It learns", None, "loss: 2"),
        Claim("The network relu, deep, explodes", False, "rate: 0.9 (0.8 to 1.0); limit: 1.02; p = 0.2"),
    ]
    table = (
        "**The network *X*, deep, explodes** (limit: 1.02):\n\n"
        "| X | verdict | rate | p |\n| --- | --- | --- | --- |\n"
        "| selu | supported | 1.1 (1.0 to 1.2) | 0.1 |\n| relu | contradicted | 0.9 (0.8 to 1.0) | 0.2 |\n\n"
        "- **undecided**: It learns.\n  Measured: loss: 2."
    )
    assert claim_list(claims).endswith(f"\n\n{table}")
    assert "*X*" not in claim_list(claims[:2])


@pytest.mark.parametrize(
    "other",
    [
        Claim("The network relu explodes", False, "growth: 0.9"),  # another number
        Claim("The network relu explodes", False, "rate: 0.9; limit: 2"),  # one more number
        Claim("The network relu explodes", False, "rate: 0.9", identity=True),
        Claim("Exploratory: network relu explodes", False, "rate: 0.9"),
        Claim("The relu network now shrinks fast", False, "rate: 0.9"),  # other words
        Claim("The network explodes", False, "rate: 0.9"),  # no case
    ],
)
def test_claims_of_another_kind_are_items(other):
    text = claim_list([Claim("The network selu explodes", True, "rate: 1.1"), other])
    assert "|" not in text and f"- **{other.verdict}**: {other.says}.\n  Measured: {other.because}." in text


def test_a_table_has_at_most_seven_columns():
    numbers = [[f"n{k}: {10 * row + k}" for k in range(6)] for row in range(2)]
    claims = [Claim(f"The network {row} surely explodes", True, "; ".join(of)) for row, of in enumerate(numbers)]
    assert "|" not in claim_list(claims)
    claims = [Claim(f"The network {row} surely explodes", True, "; ".join(of[:5])) for row, of in enumerate(numbers)]
    assert "| X | verdict | n0 | n1 | n2 | n3 | n4 |" in claim_list(claims)


def test_no_claim_is_lost_or_changed():
    source = random.Random(0)
    words = ["alpha", "beta, flat", "gamma+delta", 'the "rest"', "k = 2", "|x|", "relu: small"]
    templates = [
        "{}: the growth of {} slows down as the law predicts", "At depth {}, networks of kind {} fail",
        "In every run of the network {} the loss is finite", "{} pooling helps less, at every width, for {}",
    ]  # fmt: skip
    for _ in range(50):
        claims = []
        for template in source.sample(templates, 3):
            for first, second in source.sample(list(itertools.product(words, words)), 4):
                says = template.format(first, second)
                if says not in {claim.says for claim in claims}:
                    claims.append(Claim(says, source.choice([True, False, None]), f"rate: {source.random()}"))
        source.shuffle(claims)
        known = {(claim.says.replace("|", "¦"), claim.verdict) for claim in claims}
        found = read_back(claim_list(claims))
        assert len(found) == len(claims)
        assert {(says.replace("|", "¦"), verdict) for says, verdict, _ in found} == known


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_shows_as_many_claims_as_it_counts(path):
    text = path.read_text()
    number, counts = re.search(r"<summary>(\d+) claims: (.*)</summary>", text).groups()
    shown = [verdict for _, verdict, _ in read_back(text)]
    assert len(shown) == int(number)
    assert {word: str(shown.count(word)) for word in shown} == {
        word: count for count, word in (of.split() for of in counts.split(", "))
    }
