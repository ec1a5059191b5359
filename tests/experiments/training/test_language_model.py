"""Training on tokens: loss and accuracy per position, learning a rule, resuming, and what is printed and refused."""

import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional

from experiments import train
from experiments.data.images import Images
from experiments.training import checkpoints, loop
from experiments.training.recipe import Recipe
from experiments.training.records import read
from gradscope.models import GPT
from tests.experiments.commands import run_main
from tests.experiments.example_runs import composed

CPU = torch.device("cpu")
RECIPE = Recipe(
    epochs=4, batch_size=16, precision="float32", checkpoint_every=3, log_every=4,
    optimizer=partial(torch.optim.AdamW, lr=0.01), clip=1.0,
)  # fmt: skip


def counting(num: int, vocabulary: int = 7, length: int = 8, seed: int = 0) -> Images:
    """Sequences that count up by one or two from a random token; from the third token on, the rule is known."""
    generator = torch.Generator().manual_seed(seed)
    first, step = (
        torch.randint(vocabulary, (num, 1), generator=generator),
        torch.randint(1, 3, (num, 1), generator=generator),
    )
    tokens = (first + step * torch.arange(length + 1)) % vocabulary
    return Images(tokens[:, :-1], tokens[:, 1:], (), ())


def network() -> GPT:
    return GPT(
        vocabulary=7, length=8, depth=2, width=16, heads=2, dropout=0.1, generator=torch.Generator().manual_seed(0)
    )


def by_hand(model: GPT, data: Images) -> tuple[np.ndarray, np.ndarray]:
    """Cross entropy in nats, and whether the most likely token is right, of each sample and position, in float64."""
    logits = model.double().eval()(data.images).detach().numpy()
    model.float()
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    right = np.take_along_axis(log_p, data.labels.numpy()[..., None], axis=-1)[..., 0]
    return -right, logits.argmax(axis=-1) == data.labels.numpy()


def test_loss_and_accuracy_are_means_over_all_positions(monkeypatch):
    model, data = network(), counting(21)
    losses, right = by_hand(model, data)
    monkeypatch.setattr(loop, "PREDICTED", 40)  # five samples per forward pass
    found = loop.evaluate(model, data)
    assert found["test_loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert found["test_bits"] == pytest.approx(losses.mean() / math.log(2), rel=1e-5)
    assert found["test_accuracy"] == pytest.approx(right.mean())
    of_samples = loop.sample_losses(model.eval()(data.images), data.labels)
    np.testing.assert_allclose(of_samples.detach(), losses.mean(axis=1), rtol=1e-5)


def test_the_losses_of_images_are_as_before():
    logits, labels = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4
    expected = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    assert torch.equal(loop.sample_losses(logits, labels, 0.1), expected)


def test_it_learns_a_rule():
    records = loop.train(network(), counting(320), counting(64, seed=1), replace(RECIPE, epochs=6))
    # The first of eight next tokens is a guess between two.
    assert records[-1]["test_accuracy"] > 0.85 and records[-1]["test_loss"] < 0.4 < records[0]["train_loss"]


class KilledError(Exception):
    pass


def test_a_run_that_was_killed_ends_with_the_same_weights(tmp_path):
    data, test = counting(70), counting(20, seed=1)
    whole = network()
    expected = loop.train(whole, data, test, RECIPE)

    class Killer:
        left = 8
        on_nonfinite = "raise"

        def step(self, loss, batch):
            self.left -= 1
            if not self.left:
                raise KilledError

        def state_dict(self):
            return {}

    with pytest.raises(KilledError):
        loop.train(network(), data, test, RECIPE, tmp_path, monitor=Killer())
    model = network()
    records = loop.train(model, data, test, RECIPE, tmp_path, state=checkpoints.load(tmp_path / "checkpoints", CPU))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    assert [record["train_loss"] for record in records] == [record["train_loss"] for record in expected]


SMALL = [
    "model=gpt", "model.depth=2", "model.width=8", "model.heads=2", "data=text", "data.length=16", "train.max_steps=4",
    "train.batch_size=64", "train.log_every=2", "train.clip=1", "optimizer=adamw", "monitor.every=2", "holdout=40",
    "monitor.max_overhead=null", "monitor.batch_size=4", "device=cpu",
]  # fmt: skip


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_command_trains_on_text_with_the_monitor(tmp_path, capsys, monkeypatch, precision):
    said, code = run_main(
        train.main, capsys, monkeypatch, *SMALL, f"results={tmp_path}", f"train.precision={precision}"
    )
    assert code is None, said
    (folder,) = (path.parent for path in tmp_path.rglob("metrics.jsonl"))
    last = read(folder / "metrics.jsonl")[-1]
    assert last["test_loss"] == pytest.approx(last["test_bits"] * math.log(2)) and 4 < last["test_loss"] < 7
    assert f"test loss {last['test_loss']:.4f} nats ({last['test_bits']:.3f} bits) per token" in said
    recorded = read(folder / "monitor.jsonl")
    assert [one["step"] for one in recorded] == [0, 2, 4]
    assert {"embedding", "blocks.0", "embedding.tokens", "embedding.positions"} <= set(recorded[-1]["layer"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("model.vocabulary=64",),
            r"cannot take samples of shape \(16,\) of the data: Tokens must be between 0 and 63",
        ),
        (("data.length=200",), r"samples of shape \(200,\) .* T from 1 to length=128"),
    ],
)
def test_a_model_that_does_not_fit_the_text_is_refused(options, message):
    cfg = composed("train", *SMALL, *options)
    learned, _ = train.images(cfg, CPU)
    with pytest.raises(ValueError, match=message):
        train.network(cfg, learned, CPU)


def test_a_vocabulary_with_fewer_outputs_than_tokens_names_its_key():
    data = counting(8)
    data = Images(data.images % 3, data.labels, (), ())  # inputs that fit, and labels that do not
    with pytest.raises(ValueError, match=re.escape("3 outputs, but there are 7 classes: set model.vocabulary=7")):
        train.network(composed("train", *SMALL, "model.vocabulary=3"), data, CPU)
