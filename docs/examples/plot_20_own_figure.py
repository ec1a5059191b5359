"""
A figure of my own
==================

``to_frame()`` of a result returns a table with one row per layer and quantity.  You can join the tables of several
networks with pandas, and draw them with any library.
"""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch

import gradscope as gs

frames = []
for width in (16, 64, 256):
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        model = gs.models.MLP(depth=16, width=width, activation="relu", norm="batch", generator=generator)
        profile = gs.gsc(model, torch.randn(64, width, generator=generator), probes=8)
        frames.append(profile.to_frame().assign(width=width, seed=seed))
frame = pd.concat(frames, ignore_index=True)
frame[["width", "seed", "layer", "depth_from_output", "log10_value"]].head(3).round(3)

# %%

fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
sns.lineplot(
    frame, x="depth_from_output", y="log10_value", hue="width", style="width", palette="viridis", errorbar="sd", ax=ax
)
ax.set(xlabel="layers to the output", ylabel="log10 GSC")
plt.show()

# %%
# *GSC of ReLU networks with batch normalization for three widths: mean and standard deviation over 4 networks.*
