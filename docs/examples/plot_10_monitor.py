"""
Monitor a training run
======================

``gs.Monitor`` measures a model at scheduled steps of your own training loop.  By default, it skips measurements that
would make training take more than 3 % longer.  Its warnings name the layer.
"""

import matplotlib.pyplot as plt
import torch

import gradscope as gs

generator = torch.Generator().manual_seed(0)
model = gs.models.MLP(depth=8, width=32, activation="tanh", out_features=2, generator=generator)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
x = torch.randn(512, 32, generator=generator)
y = (x[:, 0] * x[:, 1] > 0).long()

with gs.Monitor(model, x[:32], every=20, max_overhead=None) as monitor:
    for _ in range(200):
        batch = torch.randint(512, (64,), generator=generator)
        loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        monitor.step(loss, (x[batch], y[batch]))  # after backward, before the update
        optimizer.step()

print(monitor)

# %%
# The frame has one row per step, layer and quantity.

frame = monitor.to_frame()
print(sorted(frame["quantity"].unique()))

# %%

gs.plots.evolution(frame)
plt.show()

# %%
# *log10 GSC of each layer (input on top) over the steps of training.*

# %%

gs.plots.before_after(frame)
plt.show()

# %%
# *GSC of each layer to the output at the first and at the last record.*
