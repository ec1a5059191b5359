"""The API reference of the site lists every public function and class."""

import inspect
import re

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
