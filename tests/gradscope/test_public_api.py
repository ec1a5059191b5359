"""One shape of public API: ``f(model, data, *, options)``, the same defaults everywhere, and results that print."""

import inspect
from html import unescape

import numpy as np
import pytest

import gradscope as gs
from gradscope.models import MLP
from tests.helpers import noise, seeded

CALLS = [
    gs.attention, gs.capture, gs.check, gs.compare, gs.effective_depth, gs.first_nonfinite, gs.gsc, gs.gsc_matrix,
    gs.jacobian_coherence, gs.measure, gs.nlc, gs.parameter_gsc, gs.repair, gs.residual, gs.taylor_losses, gs.Monitor,
    gs.testing.assert_growth, gs.testing.assert_no_collapse,
]  # fmt: skip
DEFAULTS = {
    "forward": None, "layers": None, "target": None, "loss_fn": None, "probes": "auto", "rtol": None,
    "reduction": "batch", "generator": None,
}  # fmt: skip
# What has no default, and the few probes of a record.
EXCEPT = {(gs.taylor_losses, "loss_fn"), (gs.Monitor, "probes")}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_shape(call):
    first, second, *options = inspect.signature(call).parameters.values()
    assert (first.name, second.name) == ("model", "data")
    for option in options:
        assert option.kind is inspect.Parameter.KEYWORD_ONLY, option.name
        if option.name in DEFAULTS and (call, option.name) not in EXCEPT:
            assert option.default == DEFAULTS[option.name], option.name


def test_every_public_name_exists_and_has_a_docstring():
    assert len(set(gs.__all__)) == len(gs.__all__)
    for name in gs.__all__:
        assert getattr(gs, name).__doc__, name


def model():
    return MLP(depth=8, width=12, generator=seeded()).double()


@pytest.mark.parametrize("call", [gs.gsc, gs.gsc_matrix, gs.check, gs.compare], ids=lambda call: call.__name__)
def test_results_print_a_summary_have_a_short_repr_and_a_table(call):
    result = call(model(), noise(6, 12))
    assert "\n" not in repr(result) and len(repr(result)) < 120
    assert "\n" in str(result)
    shown = result._repr_html_()
    assert "<table" in shown and len(shown) < 20_000
    assert unescape(shown[len("<pre>") : shown.index("</pre>")]) in (str(result), repr(result))


@pytest.mark.parametrize("probes", ["exact", 3])
def test_frames_of_profiles_hold_their_intervals(probes):
    profile = gs.gsc(model(), noise(6, 12), probes=probes)
    frame = profile.to_frame()
    low, high = profile.interval()
    np.testing.assert_array_equal(frame["log10_low"], low[:, 0])
    np.testing.assert_array_equal(frame["log10_high"], high[:, 0])
    assert (frame["log10_low"] < frame["log10_high"]).iloc[:-1].all() == (probes != "exact")
