"""
Between which two layers does the gradient change?
==================================================

``gs.gsc_matrix`` measures GSC between all pairs of layers.  GSC is not multiplicative: GSC over several layers is not
the product of the values of the single layers.
"""

import matplotlib.pyplot as plt
import torch

import gradscope as gs

generator = torch.Generator().manual_seed(0)
model = gs.models.MLP(depth=20, width=50, activation="relu", norm="batch", generator=generator)
x = torch.randn(50, 50, generator=generator)

matrix = gs.gsc_matrix(model, x)
print(matrix)

# %%
# ``log10_values`` is an array of shape (sources, targets).

first, last = matrix.log10_values[0, -1], matrix.log10_values[:-1, 1:].diagonal().sum()
print(f"log10 GSC of the whole network: {first:.3f}")
print(f"sum of log10 GSC of single layers: {last:.3f}")

# %%

matrix.plot()
plt.show()

# %%
# *log10 GSC from each layer (source) to each later layer (target) of a ReLU network with batch normalization.*
