"""Every row of docs/limitations.md names the test that holds it."""

import re

import pytest

from tests.helpers import ROOT

ROWS = [
    line for line in (ROOT / "docs" / "limitations.md").read_text().splitlines() if line.startswith("| ")
][1:]  # fmt: skip


def test_there_are_rows():
    assert len(ROWS) > 30


@pytest.mark.parametrize("row", ROWS, ids=[row.split("|")[1].strip() for row in ROWS])
def test_the_named_test_exists(row):
    ((path, name),) = re.findall(r"`(tests/\w+\.py)::(\w+)`", row)
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.M), f"{path} has no test {name}"
