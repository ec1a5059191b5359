"""The text: windows put together again are the corpus, no line of the training part is tested on, batches by seed."""

import re
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

from experiments import measure
from experiments.config import build
from experiments.data import text
from experiments.data.corpus import documentation
from tests.experiments.example_runs import composed

GPT = ("model=gpt", "data=text", "model.depth=2", "model.width=16", "data.batch_size=4", "data.length=32")


@pytest.mark.parametrize("train", [True, False])
def test_windows_and_targets_put_together_again_are_the_corpus(train):
    data = text(100, train)
    whole = documentation()[not train]
    assert len(data) == (len(whole) - 1) // 100
    x, y = data.batch(torch.arange(len(data)))
    assert bytes(x.flatten().tolist()) == whole[: x.numel()]
    assert bytes(y.flatten().tolist()) == whole[1 : y.numel() + 1]
    assert torch.equal(text(100).images, text(100, True).images)  # without a word about it, the training part


def test_held_out_topics_share_no_long_line_with_the_training_topics():
    learned, test = (part.decode() for part in documentation())
    lines = [{line.strip() for line in part.split("\n") if len(line.strip()) >= 40} for part in (learned, test)]
    assert not lines[0] & lines[1] and len(lines[1]) > 100
    names = sorted(topics)
    for number, name in enumerate(names):
        assert (topics[name] in learned) or number % 4 == 3
    held_out = {paragraph.strip() for name in names[3::4] for paragraph in topics[name].split("\n\n")}
    assert {paragraph.strip() for paragraph in test.split("\n\n")} <= held_out
    assert 0.05 < len(test) / len(learned) < 0.3


def test_batches_are_training_windows_chosen_by_the_seed():
    cfg = composed("measure", *GPT, "dtype=float64", "seed=3")
    model, x = build.network(cfg)
    assert x.dtype == torch.int64 and x.shape == (4, 32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    windows = {tuple(row) for row in text(32, True).images.tolist()}
    assert all(tuple(row) in windows for row in x.tolist())
    assert torch.equal(build.network(cfg)[1], x)
    cfg.seed = 4
    assert not torch.equal(build.network(cfg)[1], x)


def test_a_gpt_is_measured_on_text():
    cfg = composed("measure", *GPT, "matrix=true", "nlc=true", "model.residual_scale=depth")
    profile, frame = measure.measure_seeds(cfg, {"model": "gpt", "data": "text"})
    assert profile.layers == ("embedding", "blocks.0", "blocks.1", "norm", "head")
    assert np.isfinite(profile.log10_values).all() and {"gsc", "nlc", "sign_diversity"} <= set(frame["quantity"])
    assert set(frame["residual_scale"]) == {"depth"} and set(frame["norm"]) == {"pre"}


@pytest.mark.parametrize("length", [0, -3, 10_000_000])
def test_a_length_that_the_corpus_does_not_have_is_refused(length):
    with pytest.raises(ValueError, match=rf"data\.length must be between 1 and \d+ bytes, got {length}"):
        text(length)


def test_noise_has_no_tokens():
    cfg = composed("measure", "model=gpt", "model.depth=1", "data=noise")
    with pytest.raises(ValueError, match=re.escape("integer tokens of shape (B, T) with T from 1 to length=128, got")):
        measure.measure(cfg)
