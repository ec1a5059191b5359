"""The API reference of the site lists every public function and class."""

import inspect
import re
from operator import attrgetter

import pytest

import gradscope as gs
from tests.helpers import ROOT


def public():
    for name in gs.__all__:
        found = getattr(gs, name)
        if not inspect.ismodule(found):
            yield f"gradscope.{name}"
            continue
        of_module = getattr(found, "__all__", None) or [
            inner for inner, value in vars(found).items() if getattr(value, "__module__", None) == found.__name__
        ]
        for inner in of_module:
            if callable(getattr(found, inner)) and not inner.startswith("_"):
                yield f"{found.__name__}.{inner}"


def test_the_reference_lists_every_public_name_once():
    listed = re.findall(r"^   (gradscope\.\S+)$", (ROOT / "docs/api/index.rst").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(public())


@pytest.mark.parametrize("name", list(public()))
def test_every_page_of_the_reference_has_an_example(name):
    found = attrgetter(name.removeprefix("gradscope."))(gs)
    assert ">>> " in inspect.getdoc(found), f"{name} has no example"
