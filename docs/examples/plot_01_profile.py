"""
Do the gradients of my network explode?
=======================================

A small random change of a layer grows or shrinks on its way to the output.  The Gradient Scale Coefficient (GSC) of a
layer is the mean squared relative change of the output, divided by the squared relative change of the layer.  One call
measures GSC for every layer.
"""

import matplotlib.pyplot as plt
import torch

import gradscope as gs

generator = torch.Generator().manual_seed(0)
model = gs.models.MLP(depth=30, width=64, activation="selu", norm="batch", generator=generator)
x = torch.randn(64, 64, generator=generator)

profile = gs.gsc(model, x)
print(profile)

# %%
# The last line holds the growth rate per layer, its 95 % interval for networks drawn like this one, and the verdict:
# exploding, vanishing, stable or undecided.  ``total`` is log10 GSC from the input to the output of this network.

growth = profile.growth()
print("rate per layer:", round(growth.rate, 3))
print("log10 GSC of the whole network:", round(growth.total, 2))

# %%
# A straight line on this logarithmic axis is exponential growth.

profile.plot()
plt.show()

# %%
# *GSC from each layer to the output, against the number of layers between the two.  The input is the rightmost point.*
