"""Networks with a bad initialization, the same networks after `gradscope.repair`, and a standard initialization."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

import gradscope as gs
from experiments.archive.tables import Collected
from experiments.data.batches import digits_8x8_with_labels
from experiments.evidence import means
from experiments.evidence.colors import COLORS
from experiments.evidence.means import Mean
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import listed, table
from gradscope.frames import observed
from gradscope.models.gpt import Attention, Block, FeedForward
from gradscope.models.mlp import MLP

CASES = ("plain-large", "plain-small", "residual", "transformer")
BAD, REPAIRED, STANDARD = VARIANTS = ("bad", "repaired", "standard")
NUM_PIXELS, NUM_CLASSES, SIDE, MOMENTUM, PROBES = 64, 10, 8, 0.9, 8
# A repaired network counts as good as a standard one if its training loss is at most this factor higher.
AS_GOOD = 1.1
# Weight variances, and the factor of the queries of the transformer.
LARGE, SMALL, SHARP = 9.0, 0.1, 8.0

Digits = tuple[Tensor, Tensor]


class Reader(nn.Module):
    """A pre-norm transformer that reads the rows of a digit, 8 tokens of 8 pixels; its blocks are those of `GPT`."""

    def __init__(self, depth: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.rows = nn.Linear(SIDE, width, bias=False)
        self.places = nn.Parameter(torch.randn(SIDE, width, generator=generator) / math.sqrt(2))
        self.blocks = nn.Sequential(
            *(
                Block(
                    Attention(width, 4, None, bias=False, causal=False, dropout=0.0),
                    FeedForward(width, "gelu", bias=False),
                    (nn.LayerNorm(width), nn.LayerNorm(width)), "pre", 0.0,
                )
                for _ in range(depth)
            )
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, NUM_CLASSES, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                gs.initializers.lecun(module.weight, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 64) -> (B, 10)."""
        y: Tensor = self.head(self.norm(self.blocks(self.rows(x.unflatten(1, (SIDE, SIDE))) + self.places)).mean(1))
        return y


def network(case: str, depth: int, width: int, *, generator: torch.Generator, standard: bool = False) -> nn.Module:
    """The network of a case with its bad initialization, or with a ``standard`` one.

    Raises:
        ValueError: The case is unknown.
    """
    if case not in CASES:
        raise ValueError(f"case must be one of {', '.join(CASES)}, got {case!r}.")
    if case == "transformer":
        model = Reader(depth, width, generator)
        if not standard:
            with torch.no_grad():
                for block in model.blocks:
                    block.attention.query.weight.mul_(SHARP)  # type: ignore[union-attr, operator]
        return model
    return MLP(
        depth=depth, width=width, activation="tanh", residual="identity" if case == "residual" else "none",
        weight_variance=1.0 if standard else SMALL if case == "plain-small" else LARGE,
        in_features=NUM_PIXELS, out_features=NUM_CLASSES, generator=generator,
    )  # fmt: skip


def measure(
    model: nn.Module, x: Tensor, *, generator: torch.Generator, case: str, depth: int, width: int, steps: int,
    train_batch_size: int, learning_rates: Sequence[float],
) -> pd.DataFrame:  # fmt: skip
    """Training loss and test accuracy of the three variants, and the distance of local GSC from its goal.

    Arguments:
        model: The network with its bad initialization. Copies are repaired and trained in float32.
        x: The digits, without labels, for which the factors are solved.
        generator: Draws the standard network, other digits to measure local GSC, and the order of training.
        case, depth, width: The arguments of `network`.
        steps, train_batch_size, learning_rates: Of SGD with momentum. Each variant has its own best learning rate.
    """
    pixels, labels = digits_8x8_with_labels()
    held_out = torch.arange(len(pixels)) % 4 == 3
    digits, test = (pixels[~held_out], labels[~held_out]), (pixels[held_out], labels[held_out])
    order = torch.randint(len(digits[0]), (steps, train_batch_size), generator=generator)
    others = pixels[torch.randperm(len(pixels), generator=generator)[: len(x)]]
    goal = math.exp(1 / depth)
    repaired = copy.deepcopy(model).float()
    plan = gs.repair(repaired, x.float(), goal=goal, fresh=others, probes=PROBES, generator=generator)
    plan.apply()
    standard = network(case, depth, width, generator=generator, standard=True)
    parts = [
        observed("distance", float(np.abs(np.log(plan.table[column] / goal)).mean()), variant=variant)
        for column, variant in (("gsc_before", BAD), ("gsc", REPAIRED))
    ]
    for variant, start in zip(VARIANTS, (model, repaired, standard), strict=True):
        tried = [descend(start, digits, order, rate) for rate in learning_rates]
        losses = [loss_of(trained, digits) for trained in tried]
        best = int(np.argmin(losses))
        parts += [
            observed("train_loss", losses[best], num_samples=len(digits[0]), variant=variant),
            observed("test_accuracy", accuracy_of(tried[best], test), num_samples=len(test[0]), variant=variant),
            observed("learning_rate", learning_rates[best], variant=variant),
        ]
    return pd.concat(parts, ignore_index=True)


def descend(model: nn.Module, digits: Digits, order: Tensor, rate: float) -> nn.Module:
    """A copy of the network, trained on the digits of each row of ``order`` in turn."""
    network = copy.deepcopy(model).float()
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, momentum=MOMENTUM)
    for chosen in order:
        optimizer.zero_grad()
        functional.cross_entropy(network(digits[0][chosen]), digits[1][chosen]).backward()
        optimizer.step()
    return network


@torch.no_grad()
def loss_of(model: nn.Module, digits: Digits) -> float:
    """Mean cross-entropy; infinite if training diverged."""
    return float(functional.cross_entropy(model(digits[0]), digits[1]).nan_to_num(nan=math.inf))


@torch.no_grad()
def accuracy_of(model: nn.Module, digits: Digits) -> float:
    """Fraction of correctly classified digits."""
    return float((model(digits[0]).argmax(dim=1) == digits[1]).double().mean())


def _table(frame: pd.DataFrame, quantity: str, case: str) -> pd.DataFrame:
    """Values by seed (rows) and variant (columns)."""
    rows = frame[(frame["quantity"] == quantity) & (frame["case"] == case)]
    return rows.pivot(index="seed", columns="variant", values="value")


def ratio(frame: pd.DataFrame, case: str, variant: str, other: str) -> Mean:
    """The training loss of a variant divided by that of another one, paired by seed, jointly for all cases."""
    losses = _table(frame, "train_loss", case)
    return means.geometric_mean(losses[variant] / losses[other], len(CASES))


def gain(frame: pd.DataFrame, case: str, variant: str, other: str) -> Mean:
    """Test accuracy of a variant minus that of another one, in percentage points, paired by seed."""
    accuracies = 100 * _table(frame, "test_accuracy", case)
    return means.mean(accuracies[variant] - accuracies[other], len(CASES))


def claims(collected: Collected) -> list[Claim]:
    """Whether repaired networks train better than before, and as well as standard ones."""
    frame = collected.frame
    found = []
    for case in CASES:
        distance = _table(frame, "distance", case)
        nearer = means.mean(distance[REPAIRED] - distance[BAD], len(CASES))
        before, after = (means.mean(distance[variant]) for variant in (BAD, REPAIRED))
        lower, same = ratio(frame, case, REPAIRED, BAD), ratio(frame, case, REPAIRED, STANDARD)
        better = gain(frame, case, REPAIRED, BAD)
        found += [
            Claim(f"{case}: the repair brings local GSC nearer to its goal", nearer.below(0),
                  f"mean over units of |ln (local GSC / goal)| on newly drawn digits: {before} before and {after} "
                  "after the repair"),
            Claim(f"{case}: the repaired network ends with a lower training loss than the bad one", lower.below(1),
                  f"training loss, repaired / bad: {lower}"),
            Claim(f"{case}: the repaired network classifies more test digits correctly than the bad one",
                  better.above(0), f"difference of the test accuracies: {better:+} percentage points"),
            Claim(f"{case}: the repaired network trains as well as one with a standard initialization",
                  same.below(AS_GOOD), f"training loss, repaired / standard: {same}; as well: ratio below {AS_GOOD:g}"),
        ]  # fmt: skip
    return found


def answer(collected: Collected) -> str:
    """In which cases a repair lowers the training loss, and by which factor."""
    frame = collected.frame
    lower = [case for case in CASES if ratio(frame, case, REPAIRED, BAD).below(1)]
    higher = [case for case in CASES if ratio(frame, case, REPAIRED, BAD).above(1)]
    same = [case for case in CASES if ratio(frame, case, REPAIRED, STANDARD).below(AS_GOOD)]
    raised = f" and raises that of {listed(higher)}" if higher else ""
    factors = listed(f"{ratio(frame, case, REPAIRED, BAD)} for {case}" for case in CASES)
    return (
        f"`gs.repair`, which rescales weights, lowers the training loss of {len(lower)} of {len(CASES)} badly "
        f"initialized networks (named as in the method){raised}. The training loss with the repair, divided by the "
        f"loss without it, is {factors}. Networks that are shown to train as well after the repair as with a standard "
        f"initialization: {listed(same)}."
    )


def details(collected: Collected) -> str:
    """A table of losses and accuracies."""
    frame, rows = collected.frame, []
    for case in CASES:
        losses, accuracies = _table(frame, "train_loss", case), 100 * _table(frame, "test_accuracy", case)
        rates = _table(frame, "learning_rate", case)
        for variant in VARIANTS:
            usual = rates[variant].mode().iloc[0]
            rows.append((case, variant, means.geometric_mean(losses[variant]), means.mean(accuracies[variant]), usual))
    header = ("network", "initialization", "training loss", "test accuracy in %", "learning rate chosen most often")
    return table(header, rows)


def figures(collected: Collected) -> dict[str, Figure]:
    """Training loss and test accuracy of every network and initialization; one dot per seed, and means."""
    frame = collected.frame
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    for ax, quantity, average in zip(axes, ("train_loss", "test_accuracy"), (means.geometric_mean, means.mean),
                                     strict=True):  # fmt: skip
        for number, variant in enumerate(VARIANTS):
            tables = [_table(frame, quantity, case)[variant] for case in CASES]
            places = np.arange(len(CASES)) + 0.25 * (number - 1)
            for place, values in zip(places, tables, strict=True):
                ax.plot([place] * len(values), values, ".", color=COLORS[number], alpha=0.3, markersize=5)
            style: dict[str, Any] = {"fmt": "o", "color": COLORS[number], "capsize": 3, "label": variant}
            means.errorbars(ax, places + 0.08, [average(values) for values in tables], **style)
        ax.set_xticks(range(len(CASES)), CASES)
        sns.despine(ax=ax)
    axes[0].set(yscale="log", ylabel="training loss", title="training loss: lower is better")
    axes[1].set(ylabel="test accuracy", title="test accuracy: higher is better")
    axes[0].legend(frameon=False, title="initialization")
    figure.suptitle(f"Digits, after the same number of steps; {frame['seed'].nunique()} seeds", fontsize=11)
    return {"repair": figure}


STUDY = Study(
    question="Does a network train better after its local GSC was repaired?",
    answer=answer,
    use="""
If a deep network does not train, call `gs.repair(model, x)` ([repair](../repair.md)). Within seconds, it computes
factors for the weights of every unit (layer or block). It reports whether local GSC of every unit (from its
input to its output) then reaches the goal, by default 1. Compare the result with a standard initialization.
""",
    method="""
Four networks start from a bad initialization (depth {model.depth}, width {model.width}, {dtype}).

- **plain-large, plain-small**: tanh layers without biases; weight variance 9 / fan_in (large) or 0.1 / fan_in (small).
- **residual**: x + V tanh(W x), where W has the variance 9 / fan_in.
- **transformer**: a pre-norm transformer that reads the 8 rows of a digit; its queries are 8 times too large.

The repaired network is the same network after `gs.repair`, which multiplies the weights of every unit (layer or block)
by a factor. The factors are chosen for two goals. The **local GSC** of a unit, that is, GSC from its input to its
output, should be exp(1 / depth). Then GSC over all units is about e. The output of every unit should have the same root
mean square as the input of the network. The factors are computed from {data.batch_size} digits without labels. The
standard network has weights of variance 1 / fan_in everywhere (LeCun).

All networks learn the digits of scikit-learn by SGD with momentum 0.9. A run has {measurement.steps} steps with batches
of {measurement.train_batch_size}, which are the same for the bad, the repaired and the standard network. For each of
these networks and each seed, we try the learning rates {measurement.learning_rates} and report the run with the lowest
training loss. A quarter of the digits is held out for the test accuracy.
""",
    how_sure="""
Intervals are 95 % Student's t intervals over {num_seeds} seeds. Each seed draws other weights and digits, and trains
in another order. Differences and ratios are paired by seed. Their intervals are simultaneous over the four networks
(Bonferroni). Claims and constants were fixed before the reported seeds were run, after a trial with one other seed. The
results are for small networks, few steps and one optimizer.
""",
    claims=claims,
    figures=figures,
    captions={
        "repair": "Training loss (left, logarithmic) and test accuracy (right) of four networks with a bad, a repaired "
        "and a standard initialization. Each dot is one seed. Circles are means over seeds. Bars are 95 % intervals.",
    },
    details=details,
)
