"""
Which factors on the weights bring GSC to a goal?
=================================================

``gs.repair`` computes one factor for the weights of each unit, such that GSC from its input to its output
reaches a goal, here 1.05.  With a goal near 1, the unit hardly amplifies or damps relative changes.  The weights do not
change before ``apply()``; ``undo()`` restores all weights exactly.
"""

import matplotlib.pyplot as plt
import torch

import gradscope as gs

generator = torch.Generator().manual_seed(0)
options = {"depth": 8, "width": 100, "activation": "tanh", "weight_variance": 4.0}
model = gs.models.MLP(**options, generator=generator)
x, fresh = torch.randn(256, 100, generator=generator), torch.randn(256, 100, generator=generator)

plan = gs.repair(model, x, goal=1.05, fresh=fresh, probes=16)
print(plan)

# %%

before = gs.gsc(model, x)
plan.apply()
after = gs.gsc(model, x)
plan.undo()

fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
for profile, style, name in ((before, "o-", "before"), (after, "s--", "repaired")):
    frame = profile.to_frame()
    ax.plot(frame["depth_from_output"], frame["log10_value"], style, label=name)
ax.set(xlabel="layers to the output", ylabel="log10 GSC")
ax.legend()
plt.show()

# %%
# *GSC from each layer to the output before and after the repair.*
