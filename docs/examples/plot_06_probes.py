"""
How many probes are enough?
===========================

If the exact Jacobian is too expensive, random probes estimate GSC. Every estimate has a standard error.  ``rtol=``
requests a relative standard error.
"""

import matplotlib.pyplot as plt
import torch

import gradscope as gs

generator = torch.Generator().manual_seed(0)
model = gs.models.MLP(depth=20, width=100, activation="tanh", norm="layer", generator=generator)
x = torch.randn(20, 100, generator=generator)

exact = gs.gsc(model, x, probes="exact")
choices = {"4 probes": 4, "32 probes": 32, "2 %": None}
profiles = {name: gs.gsc(model, x, probes=num or "auto", rtol=None if num else 0.02) for name, num in choices.items()}
for name, profile in profiles.items():
    print(f"{name:10} largest relative standard error: {profile.relative_error:.3f}")

# %%
# The figure shows estimate minus exact value.  So 95 % intervals should contain 0 for about 95 % of the layers.

fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
truth = exact.to_frame()["log10_value"].to_numpy()
for shift, (name, profile) in enumerate(profiles.items()):
    frame = profile.to_frame()
    middle = frame["log10_value"] - truth
    low, high = (frame[column] - frame["log10_value"] for column in ("log10_low", "log10_high"))
    marker = "os^"[shift]
    ax.errorbar(frame["index"] + 0.25 * shift, middle, [-low, high], fmt=marker, markersize=4, label=name)
ax.axhline(0, color="black", linewidth=0.8)
ax.set(xlabel="layer", ylabel="estimated minus exact log10 GSC")
ax.legend()
plt.show()

# %%
# *Error of log10 GSC, with 95 % intervals due to the probes.*
