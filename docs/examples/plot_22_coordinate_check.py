"""
Does my network behave the same at twice the width?
===================================================

``gs.coordinate_check`` trains networks of several widths for a few steps.  It measures how the root mean squares of
activations, of their changes and of gradients grow with the width.  It compares this growth with the rules of a
parametrization (here mu-P), and names the first layer whose growth differs from them.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import gradscope as gs


def network(width):
    """A network and its optimizer in the parametrization mu-P; at width 64 it is the standard one."""
    model = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4))
    ratio = width / 64
    nn.init.normal_(model[4].weight, std=64**-0.5 / ratio)
    rates = {0: 2e-3, 2: 2e-3, 4: 2e-3 / ratio}  # wrong: the hidden layer 2 needs 2e-3 / ratio, too
    return model, torch.optim.Adam([{"params": model[layer].parameters(), "lr": lr} for layer, lr in rates.items()])


generator = torch.Generator().manual_seed(0)
x, y = torch.randn(16, 8, generator=generator), torch.randint(4, (16,), generator=generator)
loss = nn.CrossEntropyLoss(reduction="none")
found = gs.coordinate_check(network, (x, y), loss_fn=loss, widths=[64, 128, 256], steps=1, seeds=4)
print(found)

# %%

found.plot()
plt.show()

# %%
# *Change of the activations of each layer against the width, on logarithmic axes: mean over initializations; bands are
# one standard deviation.  Thick lines: layers whose exponents differ from those of mu-P.*
