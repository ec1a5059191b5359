"""Every entry of docs/limitations.md names the test that holds it."""

import re

import pytest

from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "limitations.md").read_text()
ENTRIES = re.findall(r"^- \*\*.*?(?=^- |^$)", PAGE, re.MULTILINE | re.DOTALL)


def test_there_are_entries():
    assert len(ENTRIES) == len(re.findall("^- ", PAGE, re.MULTILINE)) > 30


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.split("**")[1] for entry in ENTRIES])
def test_the_named_test_exists(entry):
    ((path, name),) = re.findall(r"^  Test: `(tests/[\w/]+\.py)::(\w+)`$", entry, re.MULTILINE)
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.M), f"{path} has no test {name}"
