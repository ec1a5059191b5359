"""
Does the network behave as theory says?
=======================================

Mean-field theory predicts GSC of a wide random network.  The prediction is computed without any network, so a measured
network can be compared with it.
"""

import matplotlib.pyplot as plt
import torch

import gradscope as gs

generator = torch.Generator().manual_seed(0)
model = gs.models.MLP(depth=30, width=200, activation="tanh", norm="layer", generator=generator)
x = torch.randn(50, 200, generator=generator)

profile = gs.gsc(model, x)
print("measured: ", profile.growth())
print("predicted:", round(gs.meanfield.gsc_rate("tanh", "layer"), 4))

# %%
# ``gs.compare`` compares every layer with theory, and also with the similar layers of the same network (its siblings).

print(gs.compare(model, x))

# %%
# In theory, the growth rate depends on the activation alone if layer normalization fixes the length of the
# pre-activations.

rates = {name: gs.meanfield.gsc_rate(name, "layer") for name in ("relu", "gelu", "silu", "tanh", "selu", "sigmoid")}
for name, rate in rates.items():
    print(f"{name:8} {rate:.4f}")

# %%

fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
ax.barh(list(rates), [rate - 1 for rate in rates.values()])
ax.set(xlabel="predicted growth of GSC per layer, minus 1", xlim=(0, None))
plt.show()

# %%
# *Predicted growth of GSC per layer with layer normalization, in the limit of infinite width.*
