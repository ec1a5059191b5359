r"""
3. How does training explode?
=============================

If the factors of lesson 2 are larger than 1, the gradient grows exponentially from the output to
the input: **the gradient explodes**. If the updates of the weights get so large that the loss
rises out of control, **training explodes**. This lesson shows both kinds of explosion, and the
symptoms of a run before it fails.
"""

import math

import matplotlib.pyplot as plt
import numpy as np
import seaborn
import torch
from torch.nn import functional

import gradscope as gs

torch.set_num_threads(1)
seaborn.set_theme(style="ticks", palette="colorblind")

# %%
# Gradients that explode before training
# --------------------------------------
#
# The data are ten clouds of points, one per class. The network has 30 layers with ReLU and batch
# normalization, and no skip connections.

generator = torch.Generator().manual_seed(0)
centers = 0.4 * torch.randn(10, 50, generator=generator)


def batch(generator, size=64):
    labels = torch.randint(10, (size,), generator=generator)
    return centers[labels] + torch.randn(size, 50, generator=generator), labels


deep = gs.models.MLP(depth=30, width=50, activation="relu", norm="batch", out_features=10, generator=generator)
inputs, labels = batch(generator)
functional.cross_entropy(deep(inputs), labels).backward()
norms = [float(layer.linear.weight.grad.norm()) for layer in deep.layers]
print(f"norm of the gradient: {norms[0]:.3g} in the first layer, {norms[-1]:.2g} in the last layer")
print(f"factor per layer, from the last to the second layer: {(norms[1] / norms[-1]) ** (1 / 28):.2f}")

# %%
# In the :doc:`study of vanishing gradients </docs/studies/vanishing>`, the norm of the gradient is
# multiplied by 1.235 per layer toward the input (95 % interval 1.224 to 1.246), for the same
# architecture at width 100.
#
# Training that explodes
# ----------------------
#
# A plain network learns the ten clouds by gradient descent with momentum. The learning rate rises
# linearly from 0 to a peak. Three symptoms are recorded at each step:
#
# - **loss jump**: the loss is above 5 times its median over the previous steps;
# - **gradient jump**: the norm of the gradient of all weights is above 10 times its median over
#   the previous steps;
# - **large update**: in some layer, the norm of the update is above 0.1 times the norm of the
#   weights.
#
# The run has **failed** when the loss exceeds :math:`10 \ln 10`: ten times the loss of guessing
# one of ten classes.
#
# **Change these:** the peak of the learning rate, the activation, the normalization (``"none"``,
# ``"layer"``, ``"batch"``) and the depth.

PEAK = 0.3
ACTIVATION, NORM = "selu", "none"
DEPTH = 20
STEPS = 50


def train(peak, activation, norm):
    """Three symptoms and the loss at every step, each divided by its threshold."""
    generator = torch.Generator().manual_seed(1)
    model = gs.models.MLP(
        depth=DEPTH, width=50, activation=activation, norm=norm, out_features=10, generator=generator
    )  # fmt: skip
    weights = list(model.parameters())
    optimizer = torch.optim.SGD(weights, lr=0.0, momentum=0.9)
    losses, lengths, updates = [], [], []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = peak * (step + 1) / STEPS
        inputs, labels = batch(generator)
        loss = functional.cross_entropy(model(inputs), labels)
        if not torch.isfinite(loss):
            break
        optimizer.zero_grad()
        loss.backward()
        before = [weight.detach().clone() for weight in weights]
        optimizer.step()
        losses.append(loss.item())
        lengths.append(math.hypot(*(float(weight.grad.norm()) for weight in weights)))
        updates.append(max(((w - old).norm() / old.norm()).item() for w, old in zip(weights, before, strict=True)))
    return {
        "large update": np.array(updates) / 0.1,
        "gradient jump": jump(lengths) / 10,
        "loss jump": jump(losses) / 5,
        "failure": np.array(losses) / (10 * math.log(10)),
    }


def jump(values):
    """Each value divided by the median of the previous values; unknown (NaN) for the first five."""
    return np.array([values[n] / np.median(values[:n]) if n >= 5 else math.nan for n in range(len(values))])


def report(run):
    for name, ratios in run.items():
        above = np.flatnonzero(ratios > 1)
        print(f"{name}: {f'first at step {above[0]}' if len(above) else 'never'}")


run = train(PEAK, ACTIVATION, NORM)
_, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
for (name, ratios), style in zip(run.items(), ("-o", "--s", "-.^", ":"), strict=True):
    ax.plot(ratios, style, markersize=4, linewidth=2, label=name)
ax.axhline(1, color="gray", linewidth=0.8)
ax.set(yscale="log", xlabel="step", ylabel="symptom / threshold")
ax.locator_params(axis="x", integer=True)
ax.legend()
plt.show()

# %%
# *Three symptoms and the loss ("failure") during training, each divided by its threshold. A
# symptom is present above the gray line. The learning rate rises linearly from step to step.*

report(run)

# %%
# What do many runs show?
# -----------------------
#
# One run proves little. The :doc:`study of symptoms </docs/studies/exploding_symptoms>` trains 125
# networks, and 48 of them fail. A large update announces 47 of these failures, 5 steps in advance
# (median). But it is a false alarm in 45 of the 77 runs that do not fail. A loss jump is a false
# alarm in only 1 of the 77 runs. But it announces only 18 of the failures, 2 steps in advance. So
# inspect a run after a large update, and stop a run only after a loss jump.
#
# The study also shows that exploding gradients do not imply exploding training. Before training,
# gradients explode most in the network with ReLU and batch normalization. But this network fails
# in none of 25 runs.
#
# Exercises
# ---------
#
# 1. Lower the peak of the learning rate to 0.03. Does the run fail? Which symptoms appear?
# 2. Train a network with ReLU and batch normalization at a peak of 0.3. Does it fail? Is there a
#    false alarm?
#
# To remember
# -----------
#
# **Exploding gradients are a property of a network, and exploding training is an event; a large
# update often announces this event, but about as often it is a false alarm.**
#
# Solutions
# ---------
#
# 1. With a tenth of the learning rate, the run does not fail, and no symptom appears.

report(train(0.03, "selu", "none"))

# %%
# 2. The run does not fail, so its large update is a false alarm. Batch normalization makes large
#    updates less harmful: the output of a layer does not depend on the scale of its weights.

report(train(0.3, "relu", "batch"))
