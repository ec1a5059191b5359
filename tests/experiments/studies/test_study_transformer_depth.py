"""The study of transformers by depth, on networks whose Jacobian is written out and on frames with a known story."""

import functools
import itertools
import math

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

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


def collected(gsc, lengths=LENGTHS, seeds=6, spread=1e-6, theory=None):
    """Runs in which ``gsc(norm, scale, depth)`` is the mean of log10 GSC of the embedding over its seeds.

    Theory is right, except for what ``theory`` adds to its predictions: {quantity: difference}.
    """
    records, added = [], theory or {}
    for norm, scale, depth, seed in itertools.product(NORMS, (1.0, SCALED), DEPTHS, range(seeds)):
        about = {"norm": norm, "residual_scale": scale, "depth": depth, "seed": seed}
        mean = gsc(norm, str(scale), depth)
        value = mean + spread * (-1) ** seed * depth * (1 + NORMS.index(norm))
        records.append(about | {"quantity": "gsc", "layer": "embedding", "log10_value": value})
        records.append(about | {"quantity": "gsc", "layer": "head", "log10_value": 99.0})
        growth = math.log10(lengths[norm](depth)) + spread * (-1) ** seed
        whole = {
            "log10_square_growth": growth, "log10_square_growth_theory": math.log10(lengths[norm](depth)),
            "log10_gsc_theory": mean, "log10_gsc_low": mean - 0.1, "log10_gsc_high": mean + 0.1,
        }  # fmt: skip
        records += [
            about | {"quantity": name, "layer": "network", "value": number + added.get(name, 0.0)}
            for name, number in whole.items()
        ]
        for block, branch in itertools.product(measurement.blocks(depth), ("attention", "mlp")):
            share = 1 - 0.5 / (1 + block) if norm == "pre" else 0.5
            layer = f"blocks.{block}.{branch}"
            measured = about | {"quantity": "skip_share", "layer": layer, "value": share + spread * (-1) ** seed}
            predicted = share + added.get("skip_share_theory", 0.0)
            records += [measured, about | {"quantity": "skip_share_theory", "layer": layer, "value": predicted}]
    return numbers.condensed(Collected(pd.DataFrame(records), {}, None))


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
    certain = ("squared length", "band", "larger in the last")  # of these, the noise has another size
    noisy = [claim.holds for claim in claims if not any(words in claim.says for words in certain)]
    assert set(noisy) == {None}


def test_lengths_and_scaled_weights():
    claim = verdicts()
    assert claim("same amount").holds
    assert all(claim(f"With {numbers.name(norm)} and residual").holds for norm in NORMS)
    assert verdicts(pre=lambda depth: 0.1 * depth)("with pre-norm", "neither").holds is False
    quadratic = collected(story(), LENGTHS | {"pre": lambda depth: 1 + depth**2})
    assert only(transformer_depth.claims(quadratic), "same amount").holds is False
    growing = collected(lambda norm, scale, depth: 0.02 * depth)
    assert only(transformer_depth.claims(growing), "With post-norm and residual").holds is False


@pytest.mark.parametrize(
    ("quantity", "off", "words"),
    [
        ("skip_share_theory", 0.1, "predicts the skip share"),
        ("log10_square_growth_theory", 0.1, "predicts the squared length"),
        ("log10_gsc_theory", -0.2, "predicts the mean"),
        ("log10_gsc_high", -0.3, "in the band of theory"),
    ],
)
def test_theory_that_is_right_and_wrong(quantity, off, words):
    right = functools.partial(only, transformer_depth.claims(collected(story(), seeds=16)))
    wrong = functools.partial(only, transformer_depth.claims(collected(story(), seeds=16, theory={quantity: off})))
    for norm in map(numbers.name, NORMS):
        assert right(f"With {norm}", words).holds is True and wrong(f"With {norm}", words).holds is False
    assert right("larger in the last").holds is True
    assert (
        f"{-off:+.4g}"[:4] in wrong("With pre-norm", words).because
        or "0 of 80 runs" in wrong("With pre-norm", words).because
    )


def test_the_ratio_of_a_power():
    early, late = (math.log(b / a) / (b - a) for a, b in itertools.pairwise(numbers.WINDOW))
    assert late / early == pytest.approx(numbers.POWER) == 0.25


@pytest.mark.parametrize("norm", NORMS)
def test_coefficients_are_those_of_the_whole_jacobian(norm):
    model = GPT(vocabulary=5, length=3, depth=2, width=4, heads=2, norm=norm, generator=seeded()).double()
    tokens = torch.tensor([[0, 3, 1], [2, 2, 4]])
    sums = {}
    for name in ("blocks.1.norm2", "norm"):
        hook = functools.partial(lambda name, _, x: sums.update({name: x[0].detach()}), name)
        model.get_submodule(name).register_forward_pre_hook(hook)
    frame = measurement.measure(model, tokens, generator=seeded(1), num_probes=3000)
    found = frame[frame["quantity"] == "gsc"].set_index("layer")["log10_value"]
    assert found["embedding"] == pytest.approx(bruteforce.gsc_log10(model, "embedding", tokens), abs=0.02)
    ends = sums["norm" if norm == "pre" else "blocks.1.norm2"], model.embedding(tokens).detach()
    growth = math.log10(float(ends[0].square().sum() / ends[1].square().sum()))
    assert frame.loc[frame["quantity"] == "log10_square_growth", "value"].tolist() == pytest.approx([growth])
    theory = model.mean_field(tokens)
    names = ["log10_gsc_theory", "log10_gsc_low", "log10_gsc_high"]
    values = frame.set_index("quantity")["value"]
    assert values[names].tolist() == theory.gsc().loc[0, ["log10_value", "log10_low", "log10_high"]].tolist()
    layers = [f"blocks.{block}.{branch}" for block in (0, 1) for branch in ("attention", "mlp")]
    assert frame.loc[frame["quantity"] == "skip_share_theory", "layer"].tolist() == layers


def test_the_figure_of_skip_shares_names_blocks_as_the_model_does():
    made = transformer_depth.figures.draw(collected(story()))
    blocks = [str(block) for block in measurement.blocks(DEPTHS[-1])]
    for ax in made["skips"].axes:
        assert [label.get_text() for label in ax.get_xticklabels()] == blocks
    plt.close("all")


def test_the_published_results_are_those_of_the_configuration():
    found = reference.load(ROOT / "results" / "transformer_depth")
    assert set(numbers.totals(found.frame, "pre").columns) == set(DEPTHS)
    for norm, scale in itertools.product(NORMS, (UNIT, SCALED)):
        seeds = found.manifest["config"]["seeds"]
        assert list(numbers.totals(found.frame, norm, scale).index) == seeds
        assert numbers.within_band(found.frame, norm, scale).shape == (len(seeds), len(DEPTHS))
    assert transformer_depth.answer(found) and transformer_depth.details(found)
