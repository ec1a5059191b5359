"""
Gradient tests in continuous integration
========================================

The assertions of ``gs.testing`` fail if GSC grows or shrinks too fast, or if all samples become alike inside the
network. GSC does not show the size of activations: in a ReLU network without biases, a factor on all weights of a layer
does not change GSC, although outputs and raw gradients may overflow. So test the size of the outputs as well. With
``undecided="fail"``, ``assert_growth`` and ``assert_total`` also fail if ``low`` or ``high`` is in the 95 % interval.
If the model has several inputs, fix all but one: ``forward=lambda model, x: model(x, other)``. If its ``forward`` adds
tensors, mark each sum: ``x = gs.tap(x + f(x), "sum")``.
"""

import matplotlib.pyplot as plt
import torch

import gradscope as gs
from gradscope.testing import assert_growth, assert_no_collapse

generator = torch.Generator().manual_seed(0)
x = torch.randn(64, 64, generator=generator)


def test_gradients():
    model = gs.models.MLP(depth=16, width=64, activation="tanh", residual="identity", generator=generator)
    assert_growth(model, x, low=0.8, high=1.25, undecided="fail")
    assert_no_collapse(model, x)
    assert 0.01 < model(x).square().mean().sqrt() < 100


test_gradients()
print("passed")

# %%
# A normalization cancels a factor on the weights before it, and a skip passes the signal around weights that are too
# small.  So neither GSC nor outputs show a wrong scale of these weights.  In a residual network, test the write ratio
# instead: the size of what a branch adds, divided by the size of its skip.

model = gs.models.MLP(depth=16, width=64, activation="tanh", norm="layer", residual="identity", generator=generator)
# This model has no biases.  Set those of yours to zero before: they would hide weights that are too small.
ratios = gs.residual(model, x).to_frame().query("quantity == 'write_ratio'")["value"]
print(f"write ratios: {ratios.min():.2f} to {ratios.max():.2f}")
assert ratios.between(0.1, 3).all()

# %%
# The interval of a rate is wide if a network has few layers, or blocks that differ.  A bad network may then pass with
# ``undecided="warn"``, the default, and a good network may fail with ``undecided="fail"``.  Try the bounds on a good
# and on a bad version of your model.  Several networks usually give a narrower interval:
# ``gs.growth([gs.gsc(make(), x) for _ in range(8)])``.
#
# If an assertion fails, its message says what was measured.

model = gs.models.MLP(depth=40, width=64, activation="relu", norm="batch", generator=generator)
try:
    assert_growth(model, x, low=0.8, high=1.25)
except AssertionError as error:
    print(error)

# %%
# A figure shows where GSC grows.

gs.gsc(model, x).plot()
plt.show()
