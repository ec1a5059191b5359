"""
What differs between two models?
================================

``gs.diff`` runs every module of the second model on the inputs of the same module in the first model.  So it names the
first layer where two models differ, and says whether rounding explains the difference.  The two models can be two
checkpoints, a model and its conversion, or one model in two precisions.
"""

import copy

import matplotlib.pyplot as plt
import torch

import gradscope as gs

generator = torch.Generator().manual_seed(0)
model = gs.models.MLP(depth=8, width=48, activation="tanh", norm="layer", generator=generator)
x = torch.randn(32, 48, generator=generator)

changed = copy.deepcopy(model)
with torch.no_grad():
    changed.layers[3].linear.weight[0] *= 1.1  # one neuron of one layer

found = gs.diff(model, changed, x)
print(found)

# %%
# A copy of the model in another precision differs by rounding alone.

print(gs.diff(model, lambda copied: copied.bfloat16(), x))

# %%

found.plot()
plt.show()

# %%
# *Relative distance between the outputs of each layer in both models.  "Given equal inputs": the layer receives the
# same values in both models.  "Whole difference": each model runs on its own.  The gray line shows the largest
# distances that rounding explains.*
