"""
Gradient norms and GSC
======================

With a loss, ``gs.measure`` also returns statistics of the gradient of every layer.  Gradient norms depend on the scale
of the weights and activations of a layer; GSC does not.
"""

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

import gradscope as gs

generator = torch.Generator().manual_seed(0)
model = gs.models.MLP(depth=12, width=50, activation="relu", out_features=10, generator=generator)
x, y = torch.randn(64, 50, generator=generator), torch.arange(64) % 10


def loss(output, labels):
    return cross_entropy(output, labels, reduction="none")


before, profile = gs.measure(model, (x, y), loss_fn=loss), gs.gsc(model, x)

# %%
# Multiply the weights of one layer by 10 and those of another by 1/10. ReLU passes such factors on, and the two cancel,
# so the network computes the same function.

with torch.no_grad():
    model.layers[2].linear.weight.mul_(10)
    model.layers[8].linear.weight.div_(10)
after, scaled = gs.measure(model, (x, y), loss_fn=loss), gs.gsc(model, x)


def norms(frame):
    return frame.loc[frame["quantity"] == "gradient_norm", "value"].to_numpy()


change = scaled.to_frame()["log10_value"] - profile.to_frame()["log10_value"]
print("largest change of log10 GSC:", f"{change.abs().max():.1e}")
print("gradient norms, after / before:", (norms(after) / norms(before)).round(2))

# %%

fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
ax.semilogy(norms(before), "o-", label="before")
ax.semilogy(norms(after), "s--", label="after")
ax.set(xlabel="layer", ylabel="gradient norm")
ax.legend()
plt.show()

# %%
# *Gradient norms of two networks that compute the same function.  Their GSC is equal up to rounding.*
