r"""
10. What happens to GSC while an AlexNet learns?
================================================

The first nine lessons mostly looked at networks before training. This lesson looks at two small
AlexNets for images of 32 x 32 pixels. It measures GSC on noise before training, and reads GSC
during training on CIFAR-10 from stored results.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn
import torch

import gradscope as gs

torch.set_num_threads(1)
seaborn.set_theme(style="ticks", palette="colorblind")

# %%
# Two networks
# ------------
#
# - **AlexNet A** has four 3 x 3 convolutions in two pairs. A 2 x 2 max pooling follows each pair.
#   Then come three linear layers.
# - **AlexNet B** has four 5 x 5 convolutions, a 2 x 2 max pooling after each of the first two, and
#   two linear layers.
#
# ReLU follows each convolution and each linear layer but the last. Weights have He's variance 2 /
# fan-in. AlexNet A is used without dropout, as in the trained runs below.
#
# **Change these:** the initialization (``"he"``, ``"lecun"``, ``"xavier"``, ``"orthogonal"``) and
# the number of networks.

INIT, SEEDS = "he", 2

profiles = {"AlexNet A": [], "AlexNet B": []}
for seed in range(SEEDS):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    a = gs.models.AlexNetA(dropout=0.0, init=INIT, generator=generator)
    b = gs.models.AlexNetB(init=INIT, generator=generator)
    for name, model in (("AlexNet A", a), ("AlexNet B", b)):
        profiles[name].append(gs.gsc(model, images))
for name, model in (("AlexNet A", a), ("AlexNet B", b)):
    values = np.array([profile.log10_values[:, 0] for profile in profiles[name]])
    number = sum(parameter.numel() for parameter in model.parameters())
    print(f"{name}: {number:,} parameters; GSC on noise from {10 ** values.min():.2f} to {10 ** values.max():.2f}")

# %%
# In all layers, GSC is within one order of magnitude of 1. For ReLU with He's weights, mean field
# predicts the rate 1 (lesson 6). These networks also have so few layers that a slightly different
# rate would hardly matter.
#
# During training
# ---------------
#
# The repository holds the results of three training runs per network: four epochs of CIFAR-10 by
# gradient descent with momentum. The images were **recompressed as JPEG**, so the accuracies are
# not those of the original data set. GSC to the logits is always measured on the same 32 test
# images. This part of the lesson needs a clone of the repository.

results = Path(gs.__file__).parents[1] / "results" / "alexnet"
frame, metrics = pd.read_csv(results / "data.csv"), pd.read_csv(results / "metrics.csv")
names = {"alexnet_a_no_dropout": "AlexNet A", "alexnet_b": "AlexNet B"}
gsc = frame[(frame["quantity"] == "gsc") & (frame["layer"] != "flatten")]
accuracy = metrics.dropna(subset="test_accuracy").groupby(["model", "seed"])["test_accuracy"].last()
for key, name in names.items():
    print(
        f"{name}: test accuracy {accuracy[key].mean():.1%} (three runs: {', '.join(f'{a:.1%}' for a in accuracy[key])})"
    )

# %%
# **Change this:** the layers whose GSC is drawn.

LAYERS = ("input", "conv1", "relu1", "relu4", "fc1")

means = gsc.groupby(["model", "layer", "step"])["log10_value"].mean()
_, axes = plt.subplots(1, 2, figsize=(6.4, 3.8), layout="constrained", sharey=True)
for ax, (key, name) in zip(axes, names.items(), strict=True):
    for layer, style in zip(LAYERS, ("-", "--", "-.", ":", (0, (5, 1, 1, 1))), strict=False):
        ax.plot(means[key, layer], linestyle=style, linewidth=2, label=layer)
    ax.set(title=name, xlabel="step of training")
axes[0].set(ylabel=r"$\log_{10}$ GSC to the logits")
axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
plt.show()

# %%
# *GSC from five layers to the logits during training on CIFAR-10 (images recompressed as JPEG), means
# over three runs.*

first, last = gsc["step"].min(), gsc["step"].max()
units = gsc[(gsc["depth_from_output"] > 0) & gsc["step"].isin([first, last])]
table = units.groupby(["model", "index", "layer", "step"])["log10_value"].mean().unstack("step")
change = table[last] - table[first]
for key, name in names.items():
    own = change[key].droplevel("index")
    print(f"{name}: GSC falls in {(own < 0).sum()} of {len(own)} units, most in {own.idxmin()} ({own.min():+.2f})")

# %%
# A **unit** is here a layer, an activation or a pooling. Before training, all units of a network
# have similar GSC. After training, GSC depends on the unit: at the first ReLU it is about ten
# times smaller than before, and at the input it has changed by less than a factor of two. The
# :doc:`study of trained AlexNets </docs/studies/trained_alexnet>` adds intervals. The mean of GSC
# over the runs falls in 14 of 15 units of AlexNet A and in 13 of 13 units of AlexNet B. But three
# runs are few: the whole 95 % interval of the change is negative in only 7 units of AlexNet A and
# in only 9 units of AlexNet B. In no unit is the whole interval positive.
#
# A few epochs of one training recipe say nothing about longer training. The practical advice is
# simple: measure GSC again after training, because GSC at initialization does not describe the
# trained network.
#
# Exercises
# ---------
#
# 1. Count the parameters of the first convolution of AlexNet B by hand.
# 2. Is GSC of different runs more similar before or after training? Use the standard deviation
#    over runs.
#
# To remember
# -----------
#
# **GSC at initialization does not describe the trained network, so measure it again after
# training.**
#
# Solutions
# ---------
#
# 1. There are 96 kernels of 5 x 5 pixels and 3 channels, and 96 biases: :math:`96 \cdot (3 \cdot
#    25 + 1) = 7296`.

assert sum(parameter.numel() for parameter in b.conv1.parameters()) == 96 * (3 * 25 + 1)

# %%
# 2. After training. The standard deviation of :math:`\log_{10}` GSC over runs, averaged over
#    units, falls by a factor of about ten.

spread = units.groupby(["model", "step", "layer"])["log10_value"].std().groupby(["model", "step"]).mean()
print(spread.round(2).to_string())
