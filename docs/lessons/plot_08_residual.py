r"""
8. What do skip connections do, and how deep is a trained network?
==================================================================

A residual block adds its input to the output of a branch: :math:`f_l = s f_{l-1} + b(f_{l-1})`.
The first term is the skip connection. This lesson shows by how much the skip lowers the growth
of GSC, and how many layers of a trained network act together.
"""

import copy

import matplotlib.pyplot as plt
import numpy as np
import seaborn
import torch
from torch.nn import functional

import gradscope as gs

torch.set_num_threads(1)
seaborn.set_theme(style="ticks", palette="colorblind")

# %%
# The law of dilution
# -------------------
#
# The **dilution** :math:`k` is the length of the skip divided by the length of the branch. Let
# :math:`r` be GSC of the branch alone. Suppose that the outputs of skip and branch are orthogonal,
# and that their Jacobians :math:`J_s` and :math:`J_b` are orthogonal as well (:math:`\mathrm{tr}\,
# J_s^T J_b = 0`). Both are nearly true if the branch ends in a wide random linear map. Then
# squared lengths and squared norms add up, and GSC of a block is
#
# .. math::
#
#     \mathrm{GSC} = \frac{k^2 + r}{k^2 + 1},
#     \qquad\text{so}\qquad \mathrm{GSC} - 1 = \frac{r - 1}{k^2 + 1}.
#
# Without the skip, GSC - 1 would be :math:`r - 1`. So the skip divides GSC - 1 by :math:`k^2 + 1`.
# The experiment measures this with branches :math:`b(f) = V\varphi(\mathrm{norm}(Wf))`, whose length
# normalization keeps constant. The skip has the weight :math:`s = k / \sqrt{k^2 + 1}`. Then the
# length of the activations approaches a constant, and the dilution approaches :math:`k`.
#
# **Change these:** the dilutions, the activation (such as ``"relu"``), the depth and the width.

DILUTIONS = (0, 0.5, 1, 2)
ACTIVATION = "tanh"
DEPTH, WIDTH, SEEDS = 30, 200, 3

rates = []
for k in DILUTIONS:
    profiles = []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        model = gs.models.MLP(
            depth=DEPTH, width=WIDTH, activation=ACTIVATION, norm="layer", residual="identity",
            skip_weight=k / (k**2 + 1) ** 0.5, generator=generator,
        )  # fmt: skip
        profiles.append(gs.gsc(model, torch.randn(32, WIDTH, generator=generator), probes=4))
    rates.append(gs.growth(profiles))
branch = gs.meanfield.gsc_rate(ACTIVATION, "layer")
law = [gs.meanfield.residual_rate(branch, k) for k in DILUTIONS]

_, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
growth = np.array([found.rate for found in rates]) - 1
ends = np.array([[found.rate - found.rate_low, found.rate_high - found.rate] for found in rates]).T
ax.errorbar(DILUTIONS, growth, ends, fmt="o", capsize=4, label="measured")
smooth = np.linspace(0, max(DILUTIONS), 100)
ax.plot(smooth, (branch - 1) / (smooth**2 + 1), "--", label="law of dilution")
ax.set(xlabel="dilution k", ylabel="GSC per block - 1", ylim=(0, None))
ax.legend()
plt.show()

# %%
# *Growth of GSC per block, minus 1, against the dilution. Bars are 95 % intervals. The dashed line
# is the law of dilution with the mean-field value of r.*

for k, found, expected in zip(DILUTIONS, rates, law, strict=True):
    print(f"k = {k}: measured {found.rate:.3f}, law {expected:.3f}")

# %%
# The :doc:`study of skip connections </docs/studies/residual>` measures by which factor a skip
# divides GSC - 1. In 5 of 8 cases (two kinds of blocks, four dilutions), this factor is shown to be
# :math:`k^2 + 1` within 10 %. If the skip has weight 1, the activations get longer with every
# block, while a normalized branch keeps its length. So the dilution grows with depth, and GSC
# grows more slowly than exponentially. In a ResNet with 32 layers, GSC from the first to the last
# block is :math:`10^{1.16}` with skip connections and :math:`10^{4.29}` without.
#
# Effective depth
# ---------------
#
# Write the Jacobian of each trained layer as :math:`I_l + R_l`: :math:`I_l` is the Jacobian with
# the parameters before training, and :math:`R_l` is the change by training. The Jacobian of the
# network is the product of these sums over all layers. Multiply it out, and let :math:`C^k` be the
# sum of all terms with exactly :math:`k` factors :math:`R_l`: the joint contribution of :math:`k`
# trained layers. The **effective depth** is the largest :math:`k` for which the norm of
# :math:`C^k` is at least a millionth of the sum of the norms of :math:`C^0, C^1, C^2, \dots`
#
# The next cell trains a plain and a residual network to classify ten clouds of points.

data = torch.Generator().manual_seed(0)
centers = torch.randn(10, 32, generator=data)
labels = torch.randint(10, (512,), generator=data)
points = centers[labels] + torch.randn(512, 32, generator=data)
LAYERS, STEPS, LEARNING_RATE = 20, 60, 0.005  # also change these

_, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
for name, residual, style in (("plain", "none", "-o"), ("residual", "identity", "--s")):
    model = gs.models.MLP(
        depth=LAYERS, width=32, activation="tanh", norm="layer", residual=residual, out_features=10,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    for _ in range(STEPS):
        loss = functional.cross_entropy(model(points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    accuracy = float((model(points).argmax(dim=1) == labels).double().mean())
    found = gs.effective_depth(model.double(), points[:16].double(), initial=before.double())
    print(f"{name}: {accuracy:.0%} correct, {len(found.layers)} layers, effective depth {found.at()}")
    ax.plot(found.log10_values, style, markersize=4, label=name)
ax.axhline(-6, color="gray", linewidth=0.8)
ax.set(xlabel="number k of trained layers that act together", ylabel=r"$\log_{10}$ share of $C^k$", ylim=(-12, 0.3))
ax.legend()
plt.show()

# %%
# *Share of C^k: its norm divided by the sum of these norms over all k. The effective depth is the
# largest k for which the share is at least a millionth (gray line).*
#
# Both networks have 21 layers, but a far smaller effective depth. In the :doc:`study of effective
# depth </docs/studies/effective_depth>`, deep networks that learn have up to 52 layers and an
# effective depth of 10.2 to 13.4. The study does not show that skip connections increase the
# effective depth. A large effective depth is not a success by itself: a network with batch
# normalization that hardly learns has an effective depth of 37.6.
#
# Exercises
# ---------
#
# 1. Which dilution reduces the growth GSC - 1 of a block to a tenth?
# 2. The skip has weight 1, and all branches have the same length as the input of the first block.
#    So :math:`k^2 = l` in block :math:`l`. According to the law, how does GSC over :math:`L`
#    blocks grow with :math:`L`?
#
# To remember
# -----------
#
# **A skip connection dilutes the growth of its block, and a trained network acts like a shallower
# one.**
#
# Solutions
# ---------
#
# 1. :math:`k^2 + 1 = 10`, so :math:`k = 3`.

r = 1.5
print(f"r = {r}: GSC - 1 is {gs.meanfield.residual_rate(r, 3) - 1:.3f} instead of {r - 1}")

# %%
# 2. Like a power of the depth. Treat GSC of the network as the product of GSC of its blocks. Its
#    logarithm is the sum over :math:`l` of :math:`\ln(1 + (r - 1)/(l + 1))`, which is about
#    :math:`(r - 1) \ln L`. So GSC grows like :math:`L^{r - 1}` and not like :math:`r^L`.

for number in (100, 200, 400):
    total = np.prod([gs.meanfield.residual_rate(r, block**0.5) for block in range(1, number + 1)])
    print(f"L = {number}: GSC {total:.2f}, divided by L^(r - 1): {total / number ** (r - 1):.3f}")
