r"""
5. Which networks explode, and which collapse?
==============================================

Seven plain networks differ in their activation and normalization. GSC shows which of them
explode at initialization. Networks that do not explode often **collapse**: their layers
become nearly linear.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn
import torch

import gradscope as gs
from gradscope.measures import PreactivationStd, SignDiversity

torch.set_num_threads(1)
seaborn.set_theme(style="ticks", palette="colorblind")

# %%
# Each layer computes :math:`f_l = \varphi(\mathrm{norm}(W_l f_{l-1}))`. The input is Gaussian
# noise. Three networks of each architecture are drawn, with different random weights. Four random
# probes per network estimate GSC accurately enough here.
#
# **Change these:** the architectures (activation and normalization), the depth, the width and the
# number of networks.

ARCHITECTURES = [
    ("relu", "none"), ("relu", "layer"), ("relu", "batch"),
    ("tanh", "none"), ("tanh", "layer"), ("tanh", "batch"),
    ("selu", "none"),
]  # fmt: skip
DEPTH, WIDTH, SEEDS = 50, 100, 3

profiles, statistics = {}, {}
for activation, norm in ARCHITECTURES:
    name = activation if norm == "none" else f"{activation}+{norm}"
    profiles[name], frames = [], []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        model = gs.models.MLP(depth=DEPTH, width=WIDTH, activation=activation, norm=norm, generator=generator)
        inputs = torch.randn(100, WIDTH, generator=generator)
        profiles[name].append(gs.gsc(model, inputs, probes=4))
        frames.append(gs.measure(model, inputs, measures=[PreactivationStd(), SignDiversity()]))
    statistics[name] = pd.concat(frames).pivot_table(index="index", columns="quantity", values="value")  # means

# %%
# Who explodes?
# -------------

COLORS = dict(zip(("relu", "tanh", "selu"), seaborn.color_palette("colorblind"), strict=False))
STYLES = {"none": "-", "layer": "--", "batch": ":"}


def draw(ax, name, values):
    activation, _, norm = name.partition("+")
    ax.plot(values, STYLES[norm or "none"], color=COLORS[activation], linewidth=2, label=name)


_, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
for name, own in profiles.items():
    draw(ax, name, np.mean([profile.log10_values[::-1, 0] for profile in own], axis=0))
ax.set(xlabel="layers between the layer and the output", ylabel=r"$\log_{10}$ GSC")
ax.figure.legend(loc="outside right upper")
plt.show()

# %%
# *GSC from each layer to the output of seven architectures, against the distance from the output;
# means over three networks. A straight line is exponential growth. Color: activation. Dashes:
# normalization.*
#
# A line is fitted to :math:`\log` GSC over the half of the layers nearer to the output. Its slope
# gives the growth **rate** per layer. A network *explodes* if the whole 95 % interval of the rate
# is above 1.02, and *vanishes* if all of it is below 0.98. It is *stable* if the whole interval
# lies between 0.98 and 1.02, and *undecided* if the interval contains one of these limits.

growth = {name: gs.growth(own) for name, own in profiles.items()}
for name, found in growth.items():
    print(f"{name:10}  {found}".split(":")[0])  # without advice

# %%
# ReLU with batch normalization explodes most. SELU explodes too, and so does tanh with either
# normalization.
#
# Who collapses?
# --------------
#
# Look at the **pre-activations**, the inputs of the nonlinearities, over the samples of the batch:
#
# - the **standard deviation** over samples. If it is small, each neuron receives nearly the same
#   number for all samples. Over such a small range, a smooth nonlinearity such as tanh is nearly a
#   straight line;
# - the **sign diversity**, the fraction of samples with the rarer sign. If it is small, nearly all
#   samples lie on one side of the kink of a ReLU, where ReLU is a straight line.

_, axes = plt.subplots(1, 2, figsize=(6.4, 3.8), layout="constrained")
titles = {"preactivation_std": "standard deviation", "sign_diversity": "sign diversity"}
for ax, (quantity, title) in zip(axes, titles.items(), strict=True):
    for name, table in statistics.items():
        draw(ax, name, table[quantity])
    ax.set(xlabel="layer", title=title, ylim=(0, None))
axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
plt.show()

# %%
# *Pre-activations of each layer. Left: standard deviation over samples; batch normalization sets
# it to 1, so two curves coincide. Right: fraction of samples with the rarer sign, at most 0.5.*

table = pd.DataFrame({name: table.iloc[-1] for name, table in statistics.items()}).T
table["GSC rate"] = [found.rate for found in growth.values()]
print("last layer:", table.round(3).to_string(), sep="\n")

# %%
# Sign diversity collapses for ReLU, and for ReLU with layer normalization. The standard deviation
# collapses for tanh. In these three networks, the last layer is nearly linear. The :doc:`study of
# architectures </docs/studies/architectures>` repeats this with eight initializations. It finds
# growth rates of 1.469 for relu+batch, 1.210 for tanh+batch, 1.188 for tanh+layer and 1.077 for
# selu. The rate of tanh is 1.004, and the verdicts of relu and relu+layer are undecided. In the
# study, the last layer of relu and of tanh is nearly linear; for relu+layer, this is undecided. The
# last layers of the exploding networks stay nonlinear.
#
# But a network that does not explode need not be close to linear as a whole. Many nearly linear
# layers can form a function that is far from linear. In the study, selu explodes, and relu+layer is
# not shown to explode; yet the function of relu+layer is farther from linear than that of selu.
#
# Exercises
# ---------
#
# 1. Why does batch normalization prevent both kinds of collapse?
# 2. Give tanh larger weights: ``weight_variance=2``. Does the standard deviation still collapse?
#    What happens to GSC?
#
# To remember
# -----------
#
# **At initialization, the gradients of these plain networks explode, or their last layers are
# nearly linear: look at both GSC and the pre-activations.**
#
# Solutions
# ---------
#
# 1. For each neuron, batch normalization subtracts the mean over the batch and divides by the
#    standard deviation. So the standard deviation of the pre-activations is 1 in each layer. Their
#    mean is 0, so both signs occur.
#
# 2. The standard deviation stays large, and the network now explodes.

large = gs.models.MLP(
    depth=DEPTH, width=WIDTH, activation="tanh", weight_variance=2.0, generator=torch.Generator().manual_seed(0)
)
frame = gs.measure(large, inputs, measures=[PreactivationStd()])
print(f"standard deviation in the last layer: {frame['value'].iloc[-1]:.2f}")
print(gs.gsc(large, inputs, probes=4).growth())
