"""
Where do the units of my network die?
=====================================

``gs.measure`` returns statistics of every nonlinearity: standard deviation and sign diversity of its inputs (the
pre-activations), fractions of dead and saturated units, and similarity of the samples.
"""

import matplotlib.pyplot as plt
import torch

import gradscope as gs

x = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
frames = []
for norm in ("none", "batch"):
    generator = torch.Generator().manual_seed(1)
    model = gs.models.MLP(depth=30, width=100, activation="relu", norm=norm, generator=generator)
    frames.append(gs.measure(model, x).assign(norm=norm))

frames[0]["quantity"].unique()

# %%
# Sign diversity is the mean over neurons of min(P, N) / (P + N), for P positive and N negative pre-activations.  If it
# is near 0, a ReLU network is nearly linear: nearly every neuron is active for almost all samples, or for almost none.

fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
for frame, style in zip(frames, ("-", "--"), strict=True):
    rows = frame[frame["quantity"] == "sign_diversity"]
    ax.plot(range(1, len(rows) + 1), rows["value"], style, label=f"norm: {frame['norm'].iloc[0]}")
ax.set(xlabel="layer", ylabel="sign diversity", ylim=(0, 0.52))
ax.legend()
plt.show()

# %%
# *Sign diversity of a ReLU network falls with depth, unless batch normalization centers each neuron.*
