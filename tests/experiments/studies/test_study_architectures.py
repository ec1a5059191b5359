"""What the study of architectures says of rates and nonlinearities that are known."""

import re

import numpy as np
import pandas as pd
import pytest

from experiments.archive.tables import Collected
from experiments.studies import architectures as study
from gradscope import frames
from gradscope.frames import observed

MODELS = ("relu", "relu_layer", "relu_batch", "tanh", "tanh_layer", "tanh_batch", "selu")
DEPTH, SEEDS = 20, 4
# What the literature expects: rate a layer, part of the linear fit error that is kept, and NLC.
EXPECTED = {
    model: (1.2, 1.0, 50.0) if model in study.EXPLODING else (1.0, 1e-3, 1.5 if model == "tanh" else 4.0)
    for model in MODELS
}


def collected(changes=None, spread=1e-3, signs=0.01):
    """Seeds are ``spread`` apart in log10 of everything."""
    parts, ends = [], {name: [] for name in ("linear_fit_error", "preactivation_std", "sign_diversity", "nlc")}
    networks = [(model, seed) for model in EXPECTED | (changes or {}) for seed in range(SEEDS)]
    for model, seed in networks:
        rate, kept, nlc = (EXPECTED | (changes or {}))[model]
        apart = spread * (seed - (SEEDS - 1) / 2)
        ends["linear_fit_error"] += [10**apart * 0.3, 10**apart * (0.3 * kept)]
        ends["preactivation_std"] += [1.0, 0.5]
        ends["sign_diversity"] += [0.5, signs * 10**apart]
        ends["nlc"].append(nlc * 10**apart)
        parts.append(gsc((np.log10(rate) + apart) * np.arange(DEPTH, -1, -1)).assign(model=model, seed=seed))
    models, seeds = map(list, zip(*networks, strict=True))
    for quantity, values in ends.items():
        each = len(values) // len(networks)
        index = np.tile([0, DEPTH][:each], len(networks))
        own = {"model": np.repeat(models, each), "seed": np.repeat(seeds, each)}
        parts.append(observed(quantity, values, index=index, **own))
    return Collected(pd.concat(parts, ignore_index=True), None, {})


def gsc(logarithms):
    index = np.arange(DEPTH + 1)
    columns = dict.fromkeys(frames.COLUMNS) | {"num_probes": 0, "num_samples": 8, "quantity": "gsc", "target": "last"}
    columns |= {"layer": [f"layers.{k}" for k in index], "index": index, "depth_from_output": index[::-1]}
    columns |= {"log10_value": logarithms, "log10_stderr_probe": np.nan, "log10_stderr_sample": np.nan}
    return frames.tidy({key: value for key, value in columns.items() if key not in ("value", "stderr_sample")})


def verdicts(*args, **kwargs):
    return {claim.says: claim.holds for claim in study.claims(collected(*args, **kwargs))}


WHOLE = "By NLC, every network that is not shown to explode is nearer to linear than every network that explodes"
UNSEEN = (
    "relu: the data collapse (sign diversity) and the whole network is nonlinear (NLC), although the interval of "
    "the growth rate of GSC contains 1"
)


def test_what_is_expected_is_supported_where_it_is_so():
    assert set(verdicts().values()) == {True}
    exploding, linear, whole = study.answer(collected()).split(". ")
    assert exploding.startswith("Gradients explode in relu+batch (growth factor of GSC per layer: 1.200), tanh+layer")
    assert "they neither explode nor vanish in relu (1.000), relu+layer (1.000) and tanh (1.000)" in exploding
    assert "nearly linear in relu, relu+layer and tanh; it stays nonlinear in relu+batch" in linear
    assert "farther from linear than every" in whole
    table = study.details(collected())
    assert re.search(r"\| tanh\+batch \| 1\.20+ \(", table) and "| 50.0" in table and table.endswith(": none.")


def test_what_is_not_so_is_contradicted():
    turned = {"relu": (1.3, 1.0, 1.1), "selu": (1.0, 1e-3, 1.1), "relu_layer": (0.5, 1.0, 90.0)}
    found = verdicts(turned)
    for says in (
        "selu explodes",
        "relu neither explodes nor vanishes",
        "relu+layer neither explodes nor vanishes",
        "The last layer of relu is nearly linear over the data",
        "The last layer of selu stays nonlinear",
        WHOLE,
        UNSEEN,
    ):
        assert found[says] is False, says
    answer = study.answer(collected(turned))
    assert (
        "explode in relu (growth factor of GSC per layer: 1.300)" in answer and "vanish in relu+layer (0.500)" in answer
    )
    assert "can still be farther from linear than one that explodes" in answer and "is 90.00 (" in answer
    assert study.details(collected({"selu": (1.3, 1e-3, 50.0)})).endswith(": selu.")


@pytest.mark.parametrize(("rate", "holds"), [(1.0, True), (1.015, None), (0.985, None), (1.05, False), (0.9, False)])
def test_neither_needs_the_whole_interval_within_two_hundredths(rate, holds):
    """Seeds are so far apart that an interval is about 1 % on both sides."""
    found = verdicts({"tanh": (rate, 1e-3, 1.5)}, spread=2e-3)
    assert found["tanh neither explodes nor vanishes"] is holds


def test_what_is_not_clear_is_undecided():
    found = verdicts({"tanh": (1.0, 0.1, 50.0), "selu": (1.02, 0.1, 50.0)})
    assert found["The last layer of tanh is nearly linear over the data"] is None
    assert found["selu explodes"] is None and found[WHOLE] is None
    assert verdicts(signs=0.1)[UNSEEN] is None and verdicts(signs=0.4)[UNSEEN] is False
    flat = verdicts(dict.fromkeys(MODELS, (1.0, 1.0, 2.0)))
    assert flat[WHOLE] is None
