"""
Which layer made the first NaN?
===============================

A NaN in the forward pass spreads to all later layers.  A NaN in the backward pass spreads to all earlier layers.
``gs.first_nonfinite`` names the layer in which it arose.
"""

import torch
from torch import nn

import gradscope as gs


class Length(nn.Module):
    """Divide by the length; the gradient at x = 0 is NaN."""

    def forward(self, x):
        return x / (1 + x.square().sum(-1, keepdim=True).sqrt())


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Length(), nn.Linear(8, 1))
with torch.no_grad():
    model[0].bias.fill_(-100)  # all units are dead, so x = 0 reaches Length
x = torch.randn(4, 8)

fault = gs.first_nonfinite(model, x)
print(fault)

# %%
# In a training loop, ``gs.Monitor`` runs the same search when a loss or a gradient is not finite.  It stops training
# before the update spreads the NaN over all weights.

optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
try:
    with gs.Monitor(model, x, loss_fn=lambda output, _: output[:, 0]) as monitor:
        loss = model(x).sum()
        loss.backward()
        monitor.step(loss, (x, x))
        optimizer.step()
except gs.NonFiniteError as error:
    print(error)
