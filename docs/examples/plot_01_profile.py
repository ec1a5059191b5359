"""
Do the gradients of my network explode?
=======================================

A Gradient Scale Coefficient (GSC) is the factor by which a small random change of a layer, relative to the layer's
length, grows until it reaches the output.  One call measures it for every layer, and prints a verdict.
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
# The last line is the verdict: the change per layer, its 95 % interval for networks drawn like this one, and one of
# four words.  ``total`` is about this network alone.

growth = profile.growth()
print("rate per layer:", round(growth.rate, 3))
print("log10 GSC of the whole network:", round(growth.total, 2))

# %%
# A straight line on this logarithmic axis is exponential growth.

profile.plot()
plt.show()

# %%
# *GSC from each layer to the output, against the number of layers between the two.  The input is the rightmost point.*
