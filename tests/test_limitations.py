"""Every entry of docs/limitations.md names the test that holds it."""

import re

import pytest

from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "limitations.md").read_text()
ENTRIES = re.findall(r"^- \*\*(.*?)\*\*: .*\n  Test: `(tests/[\w/]+\.py)::(\w+)`$", PAGE, re.MULTILINE)


def test_every_entry_names_a_test():
    assert len(ENTRIES) == len(re.findall("^- ", PAGE, re.MULTILINE)) > 30


@pytest.mark.parametrize(("path", "name"), [entry[1:] for entry in ENTRIES], ids=[entry[0] for entry in ENTRIES])
def test_the_named_test_exists(path, name):
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.M), f"{path} has no test {name}"
