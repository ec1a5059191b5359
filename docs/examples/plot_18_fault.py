"""
Which layer is wrong?
=====================

``gs.compare`` runs each layer and the similar layers of the network (its siblings) on the same input.  It names the
layer that differs most from its siblings.
"""

import torch
from torch import nn

import gradscope as gs

generator = torch.Generator().manual_seed(0)
model = gs.models.MLP(depth=10, width=64, activation="tanh", norm="layer", generator=generator)
x = torch.randn(64, 64, generator=generator)

print(gs.compare(model, x).first_deviation)  # None: no layer deviates

# %%

model.layers[4].activation = nn.Identity()  # a forgotten activation
print(gs.compare(model, x))

# %%
# ``gs.check`` answers another question: does gradscope measure this model correctly?  The check measures GSC in several
# ways that must agree.

print(gs.check(model, x))
