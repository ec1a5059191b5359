"""Settings of the doctests: the figures of an example are closed at its end."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _closed_figures(request):
    yield
    if isinstance(request.node, pytest.DoctestItem) and "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
