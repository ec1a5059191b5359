r"""
7. What helps against exploding gradients, and what does it cost?
=================================================================

There are four kinds of remedies: fewer layers, skip connections, normalization, and other
weights. All of them lower the growth of GSC in the network of this lesson. But GSC of a nearly
affine map does not grow either, and such a map is useless as a network. So this lesson also
measures the price: how much of the nonlinearity is left.
"""

import math

import matplotlib.pyplot as plt
import pandas as pd
import seaborn
import torch

import gradscope as gs

torch.set_num_threads(1)
seaborn.set_theme(style="ticks", palette="colorblind")

# %%
# The network has 50 layers with tanh, width 100 and ten outputs. Its weights are large, with
# variance 4 / fan-in. Without a remedy, its gradients explode. Each remedy keeps the number
# of parameters, apart from the last layer and rounding:
#
# - **wider**: ten layers instead of 50, but wider;
# - **residual**: 25 blocks :math:`f + V\varphi(Wf)` with two linear maps each;
# - **batch norm**, **layer norm**: normalization of the pre-activations;
# - **he**, **lecun**: weights of variance 2 / fan-in or 1 / fan-in;
# - **LSUV**: orthogonal weights, scaled in each layer until its pre-activations have variance 1.
#
# **Change these:** the activation, the variance of the weights, the remedies, and the number of
# networks.

ACTIVATION, VARIANCE = "tanh", 4.0
DEPTH, WIDTH, SEEDS = 50, 100, 2
FEWER = 5
size = WIDTH**2 * DEPTH  # parameters without the head; a network of depth d and width w has 100 w + (d - 1) w^2
wide = round(2 * size / (WIDTH + math.sqrt(WIDTH**2 + 4 * (DEPTH // FEWER - 1) * size)))
REMEDIES = {
    "unchanged": {},
    "wider": {"depth": DEPTH // FEWER, "width": wide},
    "residual": {"residual": "identity", "depth": DEPTH // 2},
    "batch norm": {"norm": "batch"},
    "layer norm": {"norm": "layer"},
    "he": {"weight_variance": 2.0},
    "lecun": {"weight_variance": 1.0},
    "LSUV": {},
}


def network(remedy, generator):
    options = {"depth": DEPTH, "width": WIDTH, "activation": ACTIVATION, "weight_variance": VARIANCE}
    options |= REMEDIES[remedy]
    model = gs.models.MLP(**options, in_features=WIDTH, out_features=10, generator=generator)
    if remedy == "LSUV":
        gs.initializers.lsuv(model, torch.randn(256, WIDTH, generator=generator), generator=generator)
    return model


# %%
# **Growth** is :math:`\log_{10}` GSC from the input to the output. **Nonlinearity** is the
# fraction of the variance of the outputs that is not explained by the best affine map of the
# inputs. It is 0 for an affine network.


def not_affine(x, y):
    x, y = (t.double() - t.double().mean(dim=0) for t in (x, y))
    left = y - x @ torch.linalg.lstsq(x, y).solution
    num, columns = x.shape
    return float(left.square().sum() / (num - columns - 1) / (y.square().sum() / (num - 1)))


rows = []
for remedy in REMEDIES:
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        model = network(remedy, generator)
        profile = gs.gsc(model, torch.randn(32, WIDTH, generator=generator), layers="input", probes=8)
        inputs = torch.randn(1000, WIDTH, generator=generator)
        with torch.no_grad():
            outputs = model(inputs)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        rows.append((remedy, profile["input"].log10_value, not_affine(inputs, outputs), parameters))
columns = ["remedy", "log10 GSC", "not affine", "parameters"]
table = pd.DataFrame(rows, columns=columns).groupby("remedy", sort=False).mean()
print(table.round({"log10 GSC": 2, "not affine": 2, "parameters": 0}).to_string())

# %%

_, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
for (remedy, row), marker in zip(table.iterrows(), "osD^vPX*", strict=False):
    ax.scatter(row["log10 GSC"], row["not affine"], s=80, marker=marker, label=remedy)
ax.set(xlabel=r"growth: $\log_{10}$ GSC, input to output", ylabel="nonlinearity: not affine", ylim=(0, 1.1))
ax.figure.legend(loc="outside right upper")
plt.show()

# %%
# *Nonlinearity of the outputs against the growth of GSC, for each remedy; means over two networks.
# The best place would be at the upper left: no growth, and far from affine.*
#
# Each remedy lowers GSC by more than two orders of magnitude. But the lower GSC is after a remedy,
# the less nonlinearity tends to be left: with LeCun's weights, an affine map explains about 80 %
# of the variance of the outputs. The :doc:`study of remedies </docs/studies/remedies>` confirms
# this relation for the outputs of this network: the rank correlation of GSC and nonlinearity is
# 0.95. For two other networks, the relation is undecided.
#
# Not every remedy helps every network. The study tests 17 pairs of a remedy and one of three
# networks. In 14 of these pairs, GSC falls by a factor of more than 2.7. The other three pairs are
# in the SELU network: neither He's weights nor layer normalization lowers GSC by this factor, and
# batch normalization raises GSC.
# A network that is nearly affine at initialization may become nonlinear during training, so low
# nonlinearity is only a warning.
#
# Exercises
# ---------
#
# 1. Predict the growth of "wider" from the growth of "unchanged". Why is this possible?
# 2. Batch normalization cancels the scale of the weights. What changes in a network with batch
#    normalization if its weights have variance 1 / fan-in instead of 4 / fan-in? Check the answer.
#
# To remember
# -----------
#
# **Judge every remedy by two numbers: the growth that it removes, and the nonlinearity that it
# leaves.**
#
# Solutions
# ---------
#
# 1. Both networks have the same rate per layer. So :math:`\log_{10}` GSC over the ten layers of
#    "wider" is a fifth of that over the 50 layers of "unchanged".

print(f"unchanged / {FEWER}: {table.loc['unchanged', 'log10 GSC'] / FEWER:.2f}")
print(f"wider:         {table.loc['wider', 'log10 GSC']:.2f}")

# %%
# 2. Nothing changes, except for rounding and for the small constant that normalization adds to the
#    variance.

inputs = torch.randn(32, WIDTH, generator=torch.Generator().manual_seed(1))
for variance in (4.0, 1.0):
    model = gs.models.MLP(
        depth=DEPTH, width=WIDTH, activation="tanh", norm="batch", weight_variance=variance,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    print(
        f"variance {variance:g}: log10 GSC {gs.gsc(model, inputs, layers='input', probes=8)['input'].log10_value:.3f}"
    )
