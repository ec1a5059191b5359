"""
How much of its depth does training use?
========================================

Write the Jacobian of each layer as its value before training plus the change by training.  The Jacobian of the network
is then a sum of terms that contain the changes of 0, 1, 2, ... layers.  Add up all terms with the changes of k layers.
The effective depth is the largest k for which the norm of this sum is at least a millionth of the total of these norms
over all k.
"""

import copy

import matplotlib.pyplot as plt
import torch

import gradscope as gs

generator = torch.Generator().manual_seed(0)
options = {"depth": 8, "width": 24, "activation": "relu", "norm": "layer", "out_features": 3}
x = torch.randn(96, 24, generator=generator)
y = (x[:, 0] + x[:, 1] * x[:, 2]).clamp(-1, 1).round().long() + 1

figure, ax = plt.subplots()
for residual in ("none", "identity"):
    model = gs.models.MLP(**options, residual=residual, generator=generator)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    depth = gs.effective_depth(model, x[:16], initial=before)
    print(f"residual={residual}:", depth)
    ax.plot(depth.log10_values, "o-", label=f"residual={residual}")
ax.set(xlabel="number of changed layers in a term", ylabel="log10 of the share of these terms")
ax.legend()
plt.show()
