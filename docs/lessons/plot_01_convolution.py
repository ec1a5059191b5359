r"""
1. What does a convolutional network compute?
=============================================

A convolution computes the same weighted sum at every position of an image. So if the image
moves, the output moves with it, under conditions that this lesson shows. It also shows how
gradients flow back through convolution and pooling.

**Convolution.** A kernel :math:`W` slides over an image :math:`X`. With stride :math:`s` and
padding :math:`p`, the output is

.. math::

    Y_{ij} = b + \sum_{u,v} W_{uv} \, X_{is + u - p,\; js + v - p},

where :math:`X` is 0 outside the image. The **stride** is the step of the kernel. **Padding**
adds :math:`p` pixels at each border. An image with :math:`n` pixels per side and a kernel with
:math:`k` pixels per side give an output with :math:`\lfloor (n + 2p - k) / s \rfloor + 1` pixels
per side. (Mathematicians call this operation a cross-correlation, because the kernel is not
flipped.)

**Pooling** replaces a window of :math:`m` pixels by one number: by the mean (average pooling) or
by the maximum (max pooling).
"""

import matplotlib.pyplot as plt
import seaborn
import torch
from torch.nn import functional

torch.set_num_threads(1)
seaborn.set_theme(style="ticks", palette="colorblind")
generator = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# %%
# The formula as code: cut the padded image into windows, and multiply each window by the kernel.
# PyTorch gives the same numbers.

x, weight, bias = randn(1, 1, 11, 11), randn(1, 1, 3, 3), randn(1)
stride, padding = 2, 1
windows = functional.unfold(x, kernel_size=3, stride=stride, padding=padding)  # one column per window
side = (11 + 2 * padding - 3) // stride + 1
by_hand = (weight.flatten() @ windows[0] + bias).reshape(1, 1, side, side)
assert torch.allclose(by_hand, functional.conv2d(x, weight, bias, stride=stride, padding=padding))
print("output:", tuple(by_hand.shape))

# %%
# Equivariance and invariance
# ---------------------------
#
# Let :math:`T` shift an image by :math:`t` pixels. A map :math:`f` is **equivariant** if its output
# moves with the image: :math:`f(Tx) = T'f(x)`, where :math:`T'` shifts the output by :math:`t/s`
# pixels, and :math:`s` is the stride. A map is **invariant** if its output stays the same:
# :math:`f(Tx) = f(x)`.
#
# The experiment shifts a smooth random image and measures the relative error :math:`\|f(Tx) -
# T'f(x)\| / \|T'f(x)\|`. Opposite borders of the image are joined (circular padding), so the
# border does not matter. If :math:`t/s` is not a whole number, :math:`T'` shifts by the nearest
# whole number.
#
# **Change these:** the strides, the largest shift, or the padding (``"circular"``, ``"zeros"``).

STRIDES = (1, 2, 4)
MAX_SHIFT = 8
PADDING = "circular"
SIDE = 32

image = functional.avg_pool2d(randn(1, 1, SIDE + 4, SIDE + 4), 5, stride=1)  # smooth: means of 5 x 5 random pixels


def layer(x, stride):
    mode = "circular" if PADDING == "circular" else "constant"
    return functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode=mode), weight, stride=stride).relu()


def error(stride, shift):
    expected = layer(image, stride).roll(round(shift / stride), dims=3)
    moved = layer(image.roll(shift, dims=3), stride)
    return float((moved - expected).norm() / expected.norm())


shifts = range(MAX_SHIFT + 1)
_, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
for stride, marker in zip(STRIDES, "osD", strict=False):
    ax.plot(shifts, [error(stride, shift) for shift in shifts], marker=marker, label=f"stride {stride}")
ax.set(xlabel="shift of the image [pixels]", ylabel="relative error")
ax.legend()
plt.show()

# %%
# *Relative error of equivariance of a convolution with ReLU, against the shift of the image. The
# error is 0 where the stride divides the shift.*

if PADDING == "circular":
    assert all(error(stride, shift) < 1e-12 for stride in STRIDES for shift in shifts if shift % stride == 0)

# %%
# A convolution of stride 1 is equivariant to every shift. A stride of 2 or 4 breaks equivariance
# to shifts that it does not divide, because the kernel then lands on other pixels of the shifted
# image. Zero padding breaks equivariance at the border: set ``PADDING = "zeros"`` to see it.
#
# The mean over all positions makes an equivariant map invariant. A single pooling layer is not
# enough for invariance. In the :doc:`study of pooling </docs/studies/pooling>`, images are shifted
# by one pixel, which changes their feature maps. Max pooling multiplies this change by 0.87, and
# average pooling by 0.68. After max pooling, the change is still 0.25 of the distance between the
# maps of two different images. After average pooling, it is 0.20 of this distance.

means = [float(layer(image.roll(shift, dims=3), 1).mean()) for shift in shifts]
print(f"mean over positions, stride 1: {min(means):.6f} to {max(means):.6f}")

# %%
# How gradients flow back
# -----------------------
#
# Let :math:`G = \partial L / \partial Y` be the gradient of a loss :math:`L` with respect to the
# output. The chain rule gives, here for stride 1 without padding:
#
# - kernel: :math:`\partial L / \partial W` is the correlation of the image with :math:`G`;
# - image: :math:`\partial L / \partial X` is the correlation of :math:`G`, padded by :math:`k - 1`
#   zeros, with the *flipped* kernel;
# - bias: :math:`\partial L / \partial b` is the sum of :math:`G`;
# - average pooling: each of the :math:`m` pixels of a window receives :math:`G/m`;
# - max pooling: the largest pixel of the window (the argmax) receives :math:`G`, the others
#   receive 0.

X, W, b = (t.requires_grad_() for t in (randn(1, 1, 8, 8), randn(1, 1, 3, 3), randn(1)))
Y = functional.conv2d(X, W, b)
G = randn(*Y.shape)
x_gradient, w_gradient, b_gradient = torch.autograd.grad(Y, (X, W, b), G)
assert torch.allclose(w_gradient, functional.conv2d(X, G))
padded = functional.pad(G, (2, 2, 2, 2))
assert torch.allclose(x_gradient, functional.conv2d(padded, W.flip(2, 3)))
assert torch.allclose(b_gradient, G.sum())

window = torch.tensor([[[[1.0, 5.0], [2.0, 3.0]]]], requires_grad=True)
for pool in (functional.avg_pool2d, functional.max_pool2d):
    (gradient,) = torch.autograd.grad(pool(window, 2).sum(), window)
    print(pool.__name__, gradient.flatten().tolist())

# %%
# The :doc:`study of convolutions </docs/studies/convolution>` tests these formulas with strides,
# padding and dilation. The :doc:`study of gradients in convolutions
# </docs/studies/convolution_gsc>` measures GSC, the coefficient of lesson 4: stride and padding
# hardly change it, and pooling lowers it.
#
# Exercises
# ---------
#
# 1. An image has 32 pixels per side. Which padding keeps this size for a 5 x 5 kernel with stride
#    1?
# 2. Two convolutions of stride 2 follow each other. To which shifts is their composition
#    equivariant?
#
# To remember
# -----------
#
# **The output of a convolution moves with the image if the stride divides the shift; the gradient
# with respect to the image is a correlation with the flipped kernel.**
#
# Solutions
# ---------
#
# 1. The size is kept if :math:`2p - k + 1 = 0`, so :math:`p = (5 - 1)/2 = 2`.

assert functional.conv2d(randn(1, 1, 32, 32), randn(1, 1, 5, 5), padding=2).shape[-1] == 32

# %%
# 2. The strides multiply, so the total stride is 4. The composition is equivariant to shifts by
#    multiples of 4 pixels.


def twice(x):
    return layer(layer(x, 2), 2)


for shift in (2, 4):
    change = twice(image.roll(shift, dims=3)) - twice(image).roll(round(shift / 4), dims=3)
    print(f"shift by {shift}: relative error {float(change.norm() / twice(image).norm()):.2g}")
