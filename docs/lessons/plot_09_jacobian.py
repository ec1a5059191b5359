r"""
9. What does the Jacobian tell about a network?
===============================================

Near a point, a smooth network is almost a linear map. The matrix of this map is the Jacobian
:math:`J`. Its determinant says how areas change, and its singular values say how much each
direction is stretched. This lesson first looks at a network that maps the plane to the plane,
and then at deep networks.
"""

import matplotlib.pyplot as plt
import numpy as np
import seaborn
import torch

import gradscope as gs

torch.set_num_threads(1)
seaborn.set_theme(style="ticks", palette="colorblind")

# %%
# A map of the plane
# ------------------
#
# A tanh network maps the plane to the plane. At a point :math:`x`, its **linearization** is
# :math:`f(x) + J\,\Delta x`. The figure shows the images of a square grid around :math:`x` under
# both maps.
#
# **Change these:** half the side of the grid, the point, the depth and the variance of the
# weights.

EXTENT = 0.3
POINT = (0.5, -0.3)
DEPTH, VARIANCE = 3, 2.0

generator = torch.Generator().manual_seed(1)
model = gs.models.MLP(
    depth=DEPTH, width=32, activation="tanh", weight_variance=VARIANCE, in_features=2, out_features=2,
    generator=generator,
).double()  # fmt: skip
x = torch.tensor([POINT], dtype=torch.float64)
captured = gs.capture(model, x)
J = captured.jacobian("input", captured.target.name).dense()
value = model(x).detach()

steps = torch.linspace(-EXTENT, EXTENT, 11, dtype=torch.float64)
grid = torch.cartesian_prod(steps, steps)
with torch.no_grad():
    image = model(x + grid).reshape(11, 11, 2)
linear = (value + grid @ J.T).reshape(11, 11, 2)

_, ax = plt.subplots(figsize=(6, 4), layout="constrained")
for color, points, name in (("C1", linear, "linearization"), ("C0", image, "network")):
    ax.plot(points[..., 0], points[..., 1], color=color)
    ax.plot(points[..., 0].T, points[..., 1].T, color=color)
    ax.plot([], [], color=color, label=name)
ax.plot(*value[0], "ko", label="f(x)")
ax.set(xlabel="first output", ylabel="second output", aspect="equal")
ax.legend()
plt.show()

# %%
# *Image of a square grid under a tanh network and under its linearization at the center of the
# grid. Near the center, the two agree.*
#
# Two facts follow from the definition of the derivative. First, for small steps, the relative
# error of the linearization is proportional to the length of the step. Second, the network
# multiplies small areas by :math:`|\det J|`.


def area(corners):
    """Area of a polygon with these corners, by the shoelace formula."""
    after = corners.roll(-1, dims=0)
    return float((corners[:, 0] * after[:, 1] - corners[:, 1] * after[:, 0]).sum().abs() / 2)


determinant = abs(float(torch.linalg.det(J)))
direction = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
square = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=torch.float64) / 2
print(f"|det J| = {determinant:.6f}")
for step in (0.1, 0.01, 0.001):
    with torch.no_grad():
        moved, corners = model(x + step * direction), model(x + step * square)
    linear = step * direction @ J.T
    error = float((moved - value - linear).norm() / linear.norm())
    print(f"step {step}: relative error {error:.2g}, area ratio {area(corners) / step**2:.6f}")
assert abs(area(corners) / step**2 / determinant - 1) < 1e-3

# %%
# Many dimensions
# ---------------
#
# In :math:`n` dimensions, the Jacobian has singular values :math:`s_1, \dots, s_n`, the stretches
# along :math:`n` orthogonal directions. Two means describe them:
#
# - the **quadratic mean** :math:`\mathrm{qm}(J)` of lesson 4. The largest singular values dominate
#   this mean;
# - the **geometric mean** :math:`|\det J|^{1/n}`, which describes the **volume**: its logarithm is
#   :math:`\frac{1}{n} \ln|\det J| = \frac{1}{n} \sum_i \ln s_i`, and :math:`\ln|\det J|` is called
#   the log-volume. The geometric mean is never larger than the quadratic mean.
#
# The next cell follows both means through linear networks with Gaussian and with orthogonal
# weights. The determinant of a product is the product of the determinants, so the log-volumes of
# the layers add up. The expected log-volume of a Gaussian matrix with entries of variance
# :math:`1/n` has a closed form with the digamma function :math:`\psi`:
#
# .. math::
#
#     \frac{1}{n}\, \mathrm{E} \ln|\det W| = \frac{1}{2n} \sum_{i=1}^n \left(\psi(i/2) + \ln\frac{2}{n}\right)
#     \approx -\frac{1}{2}.

WIDTH, LAYERS = 100, 50  # also change these


def means(init):
    """ln of quadratic and geometric mean of the singular values up to each layer, and the effective rank."""
    network = gs.models.MLP(
        depth=LAYERS, width=WIDTH, activation="linear", init=init, generator=torch.Generator().manual_seed(0)
    ).double()
    product, volume, quadratic, geometric = torch.eye(WIDTH, dtype=torch.float64), 0.0, [], []
    for layer in network.layers:
        weight = layer.linear.weight.detach()
        product = weight @ product
        volume += float(torch.linalg.slogdet(weight).logabsdet)
        quadratic.append(float(gs.qm_norm(product).log()))
        geometric.append(volume / WIDTH)
    squares = torch.linalg.svdvals(product).square()
    return np.array(quadratic), np.array(geometric), float(squares.sum() ** 2 / squares.square().sum())


halves = torch.arange(1, WIDTH + 1, dtype=torch.float64) / 2
expected = float((torch.digamma(halves) + np.log(2 / WIDTH)).mean() / 2)
quadratic, geometric, rank = means("lecun")
both, same, full_rank = means("orthogonal")
assert abs(both).max() < 1e-5 and abs(same).max() < 1e-5  # the weights are rounded to float32
assert (geometric <= quadratic).all()

layers = np.arange(1, LAYERS + 1)
_, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
ax.plot(layers, both, color="gray", linewidth=1, label="orthogonal: both means")
ax.plot(layers, quadratic, "-", color="C0", linewidth=2, label="Gaussian: quadratic mean")
ax.plot(layers, geometric, "--", color="C1", linewidth=2.5, label="Gaussian: geometric mean")
ax.plot(layers, layers * expected, ":", color="black", label="Gaussian: expected")
ax.set(xlabel="layer", ylabel="ln of the mean singular value")
ax.legend(fontsize="small")
plt.show()

# %%
# *Quadratic and geometric mean of the singular values of the Jacobian from the input to each layer,
# for linear networks with Gaussian and with orthogonal weights. The dotted line is the expected
# geometric mean for Gaussian weights.*

print(f"geometric mean, ln per layer: {geometric[-1] / LAYERS:.3f}; expected: {expected:.4f}")
print(f"effective rank at the last layer: Gaussian {rank:.1f}, orthogonal {full_rank:.1f}, of {WIDTH}")

# %%
# The quadratic mean stays near 1, so its logarithm stays near 0, while the volume collapses. So
# a few directions carry the norm of the Jacobian, and all others are nearly lost. The **effective
# rank** :math:`(\sum s_i^2)^2 / \sum s_i^4` counts the directions that carry the norm. In the
# linear networks with Gaussian weights of the :doc:`study of the Jacobian
# </docs/studies/jacobian>`, the natural logarithm of the geometric mean of the singular values
# changes by -0.515 per layer. The effective rank at the last layer is 2.3, of at most 100. The
# volume of tanh and SELU networks collapses as well.
#
# Exercises
# ---------
#
# 1. Why is the geometric mean of the singular values never larger than their quadratic mean? When
#    are both equal?
# 2. Multiply all orthogonal matrices by 1.1. What are both means after 50 layers?
#
# To remember
# -----------
#
# **The norm of a Jacobian can be stable although nearly all directions have collapsed, so look at
# its singular values as well.**
#
# Solutions
# ---------
#
# 1. By the inequality of arithmetic and geometric means for the numbers :math:`s_i^2`, their
#    geometric mean is at most their arithmetic mean. Take the square root of both. Both means are
#    equal if all :math:`s_i` are equal, as for an orthogonal matrix.
#
# 2. Every layer multiplies all singular values by 1.1, so both means are :math:`1.1^{50}`.

scaled = gs.initializers.orthogonal(torch.empty(20, 20, dtype=torch.float64), gain=1.1, generator=generator)
power = torch.linalg.matrix_power(scaled, 50)  # the same matrix in every layer gives the same means
print(f"quadratic mean {float(gs.qm_norm(power)):.3f}", end=", ")
print(f"geometric mean {float(torch.linalg.det(power).abs()) ** (1 / 20):.3f}, 1.1^50 = {1.1**50:.3f}")
