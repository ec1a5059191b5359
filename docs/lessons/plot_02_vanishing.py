r"""
2. Why do gradients vanish?
===========================

The gradient of a layer is a product with one factor per layer above it. If the factors are
smaller than 1, the product shrinks exponentially with depth. This lesson computes the factors by
hand for a sigmoid network.

The sigmoid :math:`s(h) = 1 / (1 + e^{-h})` has the slope :math:`s'(h) = s(h)\,(1 - s(h))`. The
numbers :math:`s(h)` and :math:`1 - s(h)` have the sum 1, and the product of two such numbers is at
most 1/4. So the slope is at most 1/4, and it is 1/4 at :math:`h = 0`.
"""

import math

import matplotlib.pyplot as plt
import seaborn
import torch
from torch.nn import functional

import gradscope as gs

torch.set_num_threads(1)
seaborn.set_theme(style="ticks", palette="colorblind")

h = torch.linspace(-10, 10, 2001, dtype=torch.float64)
slope = torch.sigmoid(h) * (1 - torch.sigmoid(h))
print(f"largest slope: {float(slope.max()):.4f}, at h = {abs(float(h[slope.argmax()])):.1f}")

# %%
# By hand: a chain of two hidden units
# ------------------------------------
#
# The smallest deep network has two hidden units and one output:
#
# .. math::
#
#     a_1 = s(w_1 x), \quad a_2 = s(w_2 a_1), \quad y = s(w_3 a_2), \quad E = (t - y)^2 / 2.
#
# Let :math:`\delta_i` be the derivative of :math:`E` with respect to the input of the i-th
# sigmoid, for example :math:`w_1 x` for :math:`i = 1`. The chain rule gives these derivatives from
# output to input. Each step multiplies by a weight and by a slope:
#
# .. math::
#
#     \delta_3 &= -(t - y)\, y (1 - y),        & \partial E / \partial w_3 &= \delta_3 a_2, \\
#     \delta_2 &= \delta_3\, w_3\, a_2 (1 - a_2), & \partial E / \partial w_2 &= \delta_2 a_1, \\
#     \delta_1 &= \delta_2\, w_2\, a_1 (1 - a_1), & \partial E / \partial w_1 &= \delta_1 x.

x, t, weights = 0.7, 0.9, (0.8, -1.3, 1.7)
w1, w2, w3 = (torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in weights)
a1 = torch.sigmoid(w1 * x)
a2 = torch.sigmoid(w2 * a1)
y = torch.sigmoid(w3 * a2)
d3 = -(t - y) * y * (1 - y)
d2 = d3 * w3 * a2 * (1 - a2)
d1 = d2 * w2 * a1 * (1 - a1)
by_hand = [d.item() for d in (d1 * x, d2 * a1, d3 * a2)]
by_autograd = [d.item() for d in torch.autograd.grad((t - y) ** 2 / 2, (w1, w2, w3))]
assert all(math.isclose(a, b, rel_tol=1e-12) for a, b in zip(by_hand, by_autograd, strict=True))
for name, derivative in zip(("w1", "w2", "w3"), by_hand, strict=True):
    print(f"dE/d{name} = {derivative:+.5f}")

# %%
# The gradient of the first weight is only a quarter of the gradient of the last weight, although
# there are only two hidden units.
#
# A long chain
# ------------
#
# A chain of :math:`L` units :math:`h_l = s(w h_{l-1} + b)` has the derivative :math:`\partial h_L
# / \partial h_0 = \prod_l w\, s'(w h_{l-1} + b)`, which is at most :math:`(|w| / 4)^L`. With
# :math:`w = 1`, the gradient vanishes for any bias. With :math:`|w| > 4`, the bound grows with
# :math:`L`. Whether the gradient itself grows depends on the values of the units. With the bias
# :math:`-w/2` and :math:`h_0 = 1/2`, the input of every sigmoid is 0, where the slope is largest.
#
# **Change these:** weight and bias of each chain, and the number of units.

CHAINS = {"w = 1, b = 0": (1.0, 0.0), "w = 8, b = 0": (8.0, 0.0), "w = 8, b = -4": (8.0, -4.0)}
UNITS = 30


def logarithms(weight, bias):
    """log10 of the derivative of each unit with respect to h_0 = 1/2."""
    h, total, found = 0.5, 0.0, [0.0]
    for _ in range(UNITS):
        h = 1 / (1 + math.exp(-(weight * h + bias)))
        total += math.log10(abs(weight) * h * (1 - h))
        found.append(total)
    return found


_, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
for (name, (weight, bias)), style in zip(CHAINS.items(), ("-", "--", "-."), strict=False):
    curve = logarithms(weight, bias)
    ax.plot(curve, style, label=name)
    assert all(found <= length * math.log10(abs(weight) / 4) + 1e-9 for length, found in enumerate(curve))
    print(f"{name}: 10^{curve[-1]:.2f} after {UNITS} units; bound 10^{UNITS * math.log10(abs(weight) / 4):.2f}")
ax.axhline(0, color="gray", linewidth=0.8)
ax.set(xlabel="number of units L", ylabel=r"$\log_{10}\ |\partial h_L / \partial h_0|$")
ax.legend()
plt.show()

# %%
# *Derivative of the last unit of a chain of sigmoids with respect to the first, against the length
# of the chain. It vanishes for w = 1. For w = 8, the bias decides whether it vanishes or
# explodes.*
#
# A real network
# --------------
#
# In a wide layer, the gradient is multiplied by a random matrix and by the slopes. If the weights
# have variance :math:`\sigma_w^2 / n` for :math:`n` inputs, the norm of the gradient is multiplied
# by about :math:`\sqrt{\sigma_w^2\, \mathrm{E}\, s'^2}` per layer. This factor is at most
# :math:`\sigma_w / 4`.

DEPTH, WIDTH, WEIGHT_VARIANCE = 30, 100, 1.0  # also change these

generator = torch.Generator().manual_seed(0)
model = gs.models.MLP(
    depth=DEPTH, width=WIDTH, activation="sigmoid", weight_variance=WEIGHT_VARIANCE, out_features=10,
    generator=generator,
).double()  # fmt: skip
inputs = torch.randn(32, WIDTH, generator=generator, dtype=torch.float64)
labels = torch.randint(10, (32,), generator=generator)
functional.cross_entropy(model(inputs), labels).backward()
norms = [float(layer.linear.weight.grad.norm()) for layer in model.layers]
per_layer = (norms[1] / norms[-1]) ** (1 / (DEPTH - 2))
print(f"measured: the gradient is multiplied by {per_layer:.3f} per layer")
print(f"bound: {math.sqrt(WEIGHT_VARIANCE) / 4:.3f}")
assert per_layer < 1.1 * math.sqrt(WEIGHT_VARIANCE) / 4

# %%
# The :doc:`study of vanishing gradients </docs/studies/vanishing>` measures sigmoid networks with
# weights of variance :math:`1/n`: per layer, the norm of the gradient is multiplied by 0.2358 (95 %
# interval 0.2332 to 0.2385, over 8 networks). The slope is not all that matters: with larger weights
# or normalization, the gradient can keep its size, or even explode.
#
# Exercises
# ---------
#
# 1. The slope of tanh is at most 1. Why does the gradient of a chain of tanh units with :math:`w =
#    1` vanish more slowly than that of a chain of sigmoids? Why does it still shrink for
#    :math:`h_0 \neq 0`?
# 2. Give the sigmoid network weights of variance :math:`256/n`. Does its gradient vanish?
#
# To remember
# -----------
#
# **A gradient is a product with one factor per layer; for a sigmoid unit this factor is at most a
# quarter of its weight, so with small weights the gradient vanishes exponentially.**
#
# Solutions
# ---------
#
# 1. The derivative of tanh is :math:`1 - \tanh^2(h)`. It is 1 at 0, and smaller everywhere else,
#    so the product shrinks. Near 0 the factors are close to 1, so the product shrinks much more
#    slowly than :math:`4^{-L}`.

h, derivative = 0.5, 1.0
for _ in range(UNITS):
    h = math.tanh(h)
    derivative *= 1 - h**2
print(f"{UNITS} tanh units from h = 0.5: {derivative:.3f}; {UNITS} sigmoids: at most {4.0**-UNITS:.0e}")

# %%
# 2. No. The standard deviation of the weights is now :math:`16 / \sqrt n`, so the bound is
#    :math:`16 / 4 = 4` per layer. The measured factor is above 1, so the gradient grows toward the
#    input. (The study finds the factor 1.217, with the 95 % interval 1.171 to 1.264.)

large = gs.models.MLP(
    depth=DEPTH, width=WIDTH, activation="sigmoid", weight_variance=256.0, out_features=10, generator=generator
).double()
functional.cross_entropy(large(inputs), labels).backward()
norms = [float(layer.linear.weight.grad.norm()) for layer in large.layers]
print(f"weight variance 256 / n: a factor of {(norms[1] / norms[-1]) ** (1 / (DEPTH - 2)):.2f} per layer")
