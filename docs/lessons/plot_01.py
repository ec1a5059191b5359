"""
Does my network explode?
========================

GSC of every layer, its growth rate and the verdict.
"""

import torch

import gradscope as gs

model = gs.models.MLP(depth=30, width=64, activation="tanh", norm="layer")
profile = gs.gsc(model, torch.randn(64, 64))
print(profile.growth())

# %%
# The figure shows GSC of every layer with respect to the output.

profile.plot()
