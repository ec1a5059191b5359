"""The study of transformers by depth, on networks whose Jacobian is written out and on frames with a known story."""

import functools
import itertools
import math

import pandas as pd
import pytest

from experiments.archive import reference
from experiments.archive.tables import Collected
from experiments.studies import transformer_depth
from experiments.studies.transformer_depth import measurement, numbers
from experiments.studies.transformer_depth.numbers import DEPTHS, NORMS, SCALED, UNIT
from gradscope.models import GPT
from tests import bruteforce
from tests.experiments.studies.claimed import only
from tests.helpers import ROOT, seeded

LENGTHS = {"pre": lambda depth: 1 + 0.5 * depth, "post": lambda depth: 1.0}


def collected(gsc, lengths=LENGTHS, seeds=6, spread=1e-6):
    """Runs in which ``gsc(norm, scale, depth)`` is the mean of log10 GSC of the embedding over its seeds."""
    records = []
    for norm, scale, depth, seed in itertools.product(NORMS, (1.0, SCALED), DEPTHS, range(seeds)):
        about = {"norm": norm, "residual_scale": scale, "depth": depth, "seed": seed}
        value = gsc(norm, str(scale), depth) + spread * (-1) ** seed * depth * (1 + NORMS.index(norm))
        records.append(about | {"quantity": "gsc", "layer": "embedding", "log10_value": value})
        records.append(about | {"quantity": "gsc", "layer": "blocks.0", "log10_value": 99.0})
        growth = math.log10(lengths[norm](depth))
        records.append(about | {"quantity": "log10_square_growth", "layer": "network", "value": growth})
    return Collected(pd.DataFrame(records), {}, None)


def story(post=lambda depth: 0.02 * depth, pre=lambda depth: 0.3 * math.log10(depth)):
    def gsc(norm, scale, depth):
        return 0.05 if scale == SCALED else {"post": post, "pre": pre}[norm](depth)

    return gsc


def verdicts(*changes, **options):
    return functools.partial(only, transformer_depth.claims(collected(story(**options))))


def test_an_exponential_and_a_power_are_told_apart():
    claim = verdicts()
    assert claim("post-norm", "exponentially").holds and claim("pre-norm", "power").holds
    assert claim("pre-norm", "more slowly").holds and claim("more with post-norm").holds
    assert "late / early: 0.25" in claim("pre-norm", "power").because and "0.30" in claim("pre-norm", "power").because
    swapped = verdicts(post=lambda depth: 0.3 * math.log10(depth), pre=lambda depth: 0.02 * depth)
    assert not any(
        swapped(*words).holds for words in (("post-norm", "exponentially"), ("pre-norm", "power"), ("more slowly",))
    )
    decaying = verdicts(post=lambda depth: -0.02 * depth)
    assert decaying("post-norm", "exponentially").holds and decaying("With post-norm, GSC grows with").holds is False


def test_noise_decides_nothing():
    claims = transformer_depth.claims(collected(story(), spread=10.0))
    assert {claim.holds for claim in claims if "squared length" not in claim.says} == {None}


def test_lengths_and_scaled_weights():
    claim = verdicts()
    assert claim("same amount").holds
    assert all(claim(f"With {numbers.name(norm)} and residual").holds for norm in NORMS)
    assert verdicts(pre=lambda depth: 0.1 * depth)("with pre-norm", "neither").holds is False
    quadratic = collected(story(), LENGTHS | {"pre": lambda depth: 1 + depth**2})
    assert only(transformer_depth.claims(quadratic), "same amount").holds is False
    growing = collected(lambda norm, scale, depth: 0.02 * depth)
    assert only(transformer_depth.claims(growing), "With post-norm and residual").holds is False


def test_the_ratio_of_a_power():
    early, late = (math.log(b / a) / (b - a) for a, b in itertools.pairwise(numbers.WINDOW))
    assert late / early == pytest.approx(numbers.POWER) == 0.25


@pytest.mark.parametrize("norm", NORMS)
def test_coefficients_are_those_of_the_whole_jacobian(norm):
    model = GPT(vocabulary=5, length=3, depth=2, width=4, heads=2, norm=norm, generator=seeded()).double()
    model.norm = model.head = measurement.nn.Identity()  # so that the last block is the output
    tokens = measurement.torch.tensor([[0, 3, 1], [2, 2, 4]])
    frame = measurement.measure(model, tokens, generator=seeded(1), num_probes=3000)
    found = frame[frame["quantity"] == "gsc"].set_index("layer")["log10_value"]
    for layer in ("embedding", "blocks.0"):
        assert found[layer] == pytest.approx(bruteforce.gsc_log10(model, layer, tokens), abs=0.02)
    streams = bruteforce.stages(model, ["embedding", "blocks.1"], tokens)[1:]
    growth = math.log10(float(streams[1].square().sum() / streams[0].square().sum()))
    assert frame.loc[frame["quantity"] == "log10_square_growth", "value"].tolist() == pytest.approx([growth])


def test_the_published_results_are_those_of_the_configuration():
    found = reference.load(ROOT / "results" / "transformer_depth")
    assert set(numbers.totals(found.frame, "pre").columns) == set(DEPTHS)
    for norm, scale in itertools.product(NORMS, (UNIT, SCALED)):
        assert numbers.totals(found.frame, norm, scale).shape == (found.manifest["config"]["seeds"], len(DEPTHS))
    assert transformer_depth.answer(found) and transformer_depth.details(found)
