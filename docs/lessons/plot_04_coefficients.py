r"""
4. Why do raw gradients mislead, and what is GSC?
=================================================

Lesson 3 measured explosion by the norm of the gradient. This norm depends on the scale of the
activations: the same function can be computed with large or with small activations. This lesson
shows the problem, and a number that avoids it: the **Gradient Scale Coefficient** (GSC).
"""

import copy

import matplotlib.pyplot as plt
import seaborn
import torch
from torch.nn import functional

import gradscope as gs

torch.set_num_threads(1)
seaborn.set_theme(style="ticks", palette="colorblind")

# %%
# One function, two networks
# --------------------------
#
# ReLU satisfies :math:`\mathrm{relu}(cx) = c\,\mathrm{relu}(x)` for :math:`c > 0`. Take a ReLU
# network with :math:`L` layers and a linear head. Divide the first weight matrix by :math:`R^L`,
# and multiply every other weight matrix by :math:`R`. The function stays the same. Between a layer
# and the logits, let there be :math:`l` weight matrices. The output of this layer is divided by
# :math:`R^l`, so the gradient with respect to it is multiplied by :math:`R^l`.
#
# **Change these:** the factor, the depth and the width.

R = 4.0
DEPTH, WIDTH = 20, 64

generator = torch.Generator().manual_seed(0)
model = gs.models.MLP(depth=DEPTH, width=WIDTH, activation="relu", out_features=10, generator=generator).double()
rescaled = copy.deepcopy(model)
with torch.no_grad():
    first, *others = rescaled.parameters()
    first /= R**DEPTH
    for weight in others:
        weight *= R
inputs = torch.randn(128, WIDTH, generator=generator, dtype=torch.float64)
labels = torch.randint(10, (128,), generator=generator)
assert torch.allclose(model(inputs), rescaled(inputs))


def raw_gradients(model):
    """Norm of the gradient of the loss with respect to the output of every layer."""
    outputs = [model.layers[0](inputs)]
    for layer in model.layers[1:]:
        outputs.append(layer(outputs[-1]))
    gradients = torch.autograd.grad(functional.cross_entropy(model.head(outputs[-1]), labels), outputs)
    return torch.tensor([gradient.norm() for gradient in gradients]).log10()


raw, raw_rescaled = raw_gradients(model), raw_gradients(rescaled)
profile, profile_rescaled = gs.gsc(model, inputs), gs.gsc(rescaled, inputs)
layers = range(1, DEPTH + 1)

_, axes = plt.subplots(1, 2, figsize=(6.4, 3.4), layout="constrained")
curves = {"original": (raw, profile, "-"), f"rescaled, R = {R:g}": (raw_rescaled, profile_rescaled, "--")}
for name, (gradients, measured, style) in curves.items():
    axes[0].plot(layers, gradients, style, linewidth=2.5, label=name)
    axes[1].plot(layers, measured.log10_values[1:-1, 0], style, linewidth=2.5, label=name)
axes[0].set(title="raw gradient", xlabel="layer", ylabel=r"$\log_{10}$ norm of the gradient")
axes[1].set(title="GSC", xlabel="layer", ylabel=r"$\log_{10}$ GSC", ylim=(-1, 1))
axes[0].legend(fontsize="small")
plt.show()

# %%
# *Left: norm of the gradient with respect to the output of each layer. Right: GSC from each layer
# to the logits. The networks compute the same function. Only their raw gradients differ; the
# curves of GSC coincide.*

per_layer = 10 ** float((raw_rescaled[0] - raw_rescaled[-1]) / (DEPTH - 1))
print(f"rescaled network: the raw gradient grows by a factor of {per_layer:.2f} per layer toward the input")
assert abs(profile.log10_values - profile_rescaled.log10_values).max() < 1e-9

# %%
# The raw gradient of the rescaled network seems to explode. But both networks compute the same
# function. They even train identically if the learning rates are adapted to the factors. The
# :doc:`study of rescaling </docs/studies/rescaling>` shows this for R = 4. Toward the input, the
# raw gradient grows by a factor of 4.021 per layer in the rescaled network, and of 1.005 in the
# original one. GSC and the losses are the same in both networks.
#
# How much does a Jacobian stretch a random direction?
# ----------------------------------------------------
#
# Let :math:`f_k` and :math:`f_l` be the outputs of an earlier layer :math:`k` and a later layer
# :math:`l`, and :math:`J` the Jacobian of :math:`f_l` with respect to :math:`f_k`. If we move
# :math:`f_k` by a short step in the unit direction :math:`u`, then :math:`f_l` moves
# :math:`\|Ju\|` times as far. The **quadratic mean norm** is the quadratic mean of this stretch
# over random directions. It has a closed form with the singular values :math:`s_i`:
#
# .. math::
#
#     \mathrm{qm}(J) = \sqrt{\mathrm{E}_u \|Ju\|^2} = \frac{\|J\|_F}{\sqrt{n}}
#     = \sqrt{\tfrac{1}{n} \textstyle\sum_i s_i^2} \qquad \text{for a matrix with } n \text{ columns.}

matrix = torch.randn(30, 50, generator=generator, dtype=torch.float64)
directions = torch.randn(50, 100_000, generator=generator, dtype=torch.float64)
directions /= directions.norm(dim=0)
stretches = (matrix @ directions).norm(dim=0)
print(f"quadratic mean of 100,000 stretches: {float(stretches.square().mean().sqrt()):.3f}")
print(f"|J|_F / sqrt(n):                     {float(matrix.norm()) / 50**0.5:.3f}")
print(f"gs.qm_norm:                          {float(gs.qm_norm(matrix)):.3f}")
assert abs(float(stretches.square().mean().sqrt() / gs.qm_norm(matrix)) - 1) < 0.01

# %%
# GSC
# ---
#
# To become independent of the scale of the activations, measure relative changes: divide the
# length of the step of :math:`f_k` by :math:`\|f_k\|`, and that of the step of :math:`f_l` by
# :math:`\|f_l\|`. The relative stretch is the second quotient divided by the first. GSC is the
# mean square of the relative stretch over random directions:
#
# .. math::
#
#     \mathrm{GSC}(k, l) = \mathrm{qm}(J)^2\, \frac{\|f_k\|^2}{\|f_l\|^2}.
#
# In words: let :math:`f_k` undergo a small random change. GSC is the mean squared *relative*
# change of :math:`f_l`, divided by the squared relative change of :math:`f_k`. If GSC is 1,
# relative changes keep their size. If GSC grows exponentially with the number of layers between
# :math:`k` and :math:`l`, gradients explode. (Part of the literature uses the square root of GSC.)
#
# Exercises
# ---------
#
# 1. A layer multiplies its input by an orthogonal matrix: :math:`f_l = Q f_k`. What is its GSC?
# 2. Let :math:`A = \mathrm{diag}(2, 1)`, :math:`B = \mathrm{diag}(1/2, 1)` and :math:`f = (1, 1)`.
#    Compute GSC of :math:`A` at :math:`f`, of :math:`B` at :math:`Af`, and of :math:`BA` at
#    :math:`f`. Is the last GSC the product of the other two?
#
# To remember
# -----------
#
# **Raw gradients depend on the scale of the activations; GSC does not, because it compares
# relative changes.**
#
# Solutions
# ---------
#
# 1. All singular values of :math:`Q` are 1, so :math:`\mathrm{qm}(Q) = 1`. Lengths stay the same.
#    So GSC is 1.

orthogonal = gs.models.MLP(depth=10, width=20, activation="linear", init="orthogonal", generator=generator).double()
found = gs.gsc(orthogonal, torch.randn(8, 20, generator=generator, dtype=torch.float64))
print(f"log10 GSC of ten orthogonal layers: {abs(found['input'].log10_value):.6f}")

# %%
# 2. GSC of :math:`A` is 1, GSC of :math:`B` is 25/16, and GSC of :math:`BA`, the identity, is 1.
#    So GSC is not multiplicative.


def gsc(matrix, f):
    return float(gs.qm_norm(matrix) ** 2 * f.norm() ** 2 / (matrix @ f).norm() ** 2)


A, B, f = torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([0.5, 1.0])), torch.ones(2)
print(f"A: {gsc(A, f):.4f}, B: {gsc(B, A @ f):.4f}, BA: {gsc(B @ A, f):.4f}")
