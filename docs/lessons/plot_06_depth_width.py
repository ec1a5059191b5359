r"""
6. Do depth and width change the growth?
========================================

In a deep plain network, each further layer multiplies GSC by nearly the same factor, the growth
**rate**. This lesson measures whether the rate itself depends on depth and width.

**Mean-field theory** predicts the rate for random weights and infinite width. Let the weights
have variance :math:`\sigma_w^2` / fan-in, and let :math:`\varphi` be the activation. In a
network without normalization, let :math:`q` be the variance of the pre-activations and :math:`z`
a standard normal number. If :math:`q` is the same in all layers, the squared gradient is
multiplied by :math:`\chi_1 = \sigma_w^2\, \mathrm{E}[\varphi'(\sqrt q z)^2]` per layer. This
factor is also the growth rate of GSC. With layer normalization, the rate is
:math:`\mathrm{E}[\varphi'(z)^2] / \mathrm{E}[\varphi(z)^2]`.
"""

import matplotlib.pyplot as plt
import numpy as np
import seaborn
import torch

import gradscope as gs

torch.set_num_threads(1)
seaborn.set_theme(style="ticks", palette="colorblind")

# %%
# The last formula can be checked by averaging over random numbers. (``gs.meanfield`` uses
# quadrature, which is more accurate.)

z = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
by_sampling = float((1 - z.tanh() ** 2).square().mean() / z.tanh().square().mean())
theory = gs.meanfield.gsc_rate("tanh", "layer")
print(f"tanh with layer normalization: {by_sampling:.3f} by sampling, {theory:.4f} by quadrature")
assert abs(by_sampling - theory) < 0.005

# %%
# Depth
# -----
#
# **Change these:** the activation, the normalization (``"none"``, ``"layer"``, ``"batch"``),
# depths and widths.

ACTIVATION, NORM = "tanh", "batch"
DEPTHS = (25, 50, 100)
WIDTHS = (64, 128, 256)
SAMPLES, SEEDS = 32, 6


def profile(depth, width, seed):
    """GSC from 20 layers to the output, with four random probes."""
    generator = torch.Generator().manual_seed(seed)
    model = gs.models.MLP(depth=depth, width=width, activation=ACTIVATION, norm=NORM, generator=generator)
    inputs = torch.randn(SAMPLES, width, generator=generator)
    layers = [f"layers.{n}" for n in np.linspace(0, depth - 1, 20).astype(int)]
    return gs.gsc(model, inputs, layers=layers, probes=4)


predicted = gs.meanfield.gsc_rate(ACTIVATION, NORM, SAMPLES if NORM == "batch" else None)
for depth in DEPTHS:
    growth = gs.growth([profile(depth, WIDTHS[0], seed) for seed in range(2)])
    print(f"depth {depth:3}: GSC from the first layer 10^{growth.total:.1f}, rate {growth.rate:.3f} per layer")
print(f"mean field: rate {predicted:.3f} per layer")

# %%
# The output gives GSC from the first layer as a power of 10. Its exponent is about proportional to
# the depth. The growth rate per layer stays nearly the same.
#
# Width
# -----
#
# At finite width, the rate differs from the rate in mean-field theory. The difference should be
# proportional to 1 / width.

rates = np.array([[profile(40, width, seed).growth().rate for seed in range(SEEDS)] for width in WIDTHS])
deviations = np.log(rates / predicted)
mean, error = deviations.mean(axis=1), deviations.std(axis=1, ddof=1) / SEEDS**0.5
inverse = 1 / np.array(WIDTHS)
slope = (inverse @ mean) / (inverse @ inverse)  # line through the origin, by least squares

_, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
ax.errorbar(inverse, mean, 2 * error, fmt="o", capsize=4, label=f"measured, {SEEDS} networks each")
ax.plot([0, inverse[0]], [0, slope * inverse[0]], "--", color="C1", label="proportional to 1 / width")
ax.axhline(0, color="gray", linewidth=0.8)
ax.set(xlabel="1 / width", ylabel="log rate - mean field", xlim=(0, None))
ax.legend()
plt.show()

# %%
# *Natural logarithm of the growth rate, minus that of the mean-field rate, against 1 / width. Bars
# are plus and minus two standard errors over networks. The dashed line is fitted so that it is 0 at
# infinite width, that is, at 1 / width = 0.*

for width, one, spread in zip(WIDTHS, mean, error, strict=True):
    print(f"width {width}: {one:+.4f} +- {spread:.4f}")
print(f"slope of the dashed line: {slope:.2f}")

# %%
# The :doc:`study of depth and width </docs/studies/depth_width>` measures seven networks with 39
# initializations each. From depth 50 to 200, the rate stays the same within 0.5 % in five networks;
# ReLU and ReLU with layer normalization are undecided. So a shallow network often gives the rate of
# a deep one. From width 100 to 400, the rate stays the same in two networks (ReLU with batch
# normalization, tanh). In tanh with batch normalization, it changes by more than 0.5 %. The other
# four networks are undecided. Mean field comes close to the rate of a wide network: in the largest
# SELU network, the rate is 1.0734 (95 % interval 1.0727 to 1.0741), and mean field predicts 1.0716.
#
# Exercises
# ---------
#
# 1. A ReLU network has :math:`\sigma_w^2 = 2` (He's initialization) and no normalization. Compute
#    its mean-field rate by hand.
# 2. Take the mean-field rate of tanh with batch normalization. After how many layers is GSC larger
#    than a million?
#
# To remember
# -----------
#
# **The growth rate changes little with depth and width, so a small network shows how fast a large
# one explodes.**
#
# Solutions
# ---------
#
# 1. The derivative of ReLU is 1 for half of all pre-activations, and 0 otherwise. So :math:`\chi_1
#    = 2 \cdot 1/2 = 1`: GSC neither grows nor shrinks.

print(f"relu: {gs.meanfield.gsc_rate('relu'):.4f}")

# %%
# 2. The number of layers is :math:`6 / \log_{10} r` for the rate :math:`r`.

rate = gs.meanfield.gsc_rate("tanh", "batch", 32)
print(f"6 / log10({rate:.3f}) = {6 / np.log10(rate):.1f} layers")
