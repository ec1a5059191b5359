"""
How much does each parameter move the output?
=============================================

``gs.parameter_gsc`` is GSC with respect to the parameters of a layer.  It is the mean squared relative change of the
output for a small random change of the parameters, divided by the squared relative change of the parameters.
"""

import matplotlib.pyplot as plt
import torch

import gradscope as gs

model = gs.models.ResNet(depth=8, width=8, generator=torch.Generator().manual_seed(0))
x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))

profile = gs.parameter_gsc(model, x, probes=8)
frame = profile.to_frame()
frame[["layer", "value", "log10_value"]].round(3)

# %%

fig, ax = plt.subplots(figsize=(6, 4.2), layout="constrained")
ax.errorbar(frame["log10_value"], frame["layer"], xerr=1.96 * frame["log10_stderr_probe"], fmt="o")
ax.invert_yaxis()
ax.set(xlabel="log10 GSC of the parameters", ylabel="layer, input on top")
plt.show()

# %%
# *GSC of the parameters of a ResNet before training.  The 95 % intervals account for the error of the probes only.*
