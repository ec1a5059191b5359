"""
With which initialization does GSC grow least?
==============================================

``gs.compare_models`` draws several networks of each kind, and tests which growth rates differ.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import gradscope as gs


def network(scale):
    """A function that draws a new tanh network whose weights have a standard deviation of scale / sqrt(width)."""

    def make():
        layers = []
        for _ in range(20):
            linear = nn.Linear(64, 64, bias=False)
            nn.init.normal_(linear.weight, std=scale / 8)
            layers.append(nn.Sequential(linear, nn.Tanh()))
        return nn.Sequential(*layers)

    return make


x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
comparison = gs.compare_models({"small": network(0.8), "critical": network(1.0), "large": network(2.0)}, x, seeds=4)
print(comparison)

# %%
# With a probability of 95 %, the intervals from ``low`` to ``high`` contain the true ratios of all pairs of rates at
# once.  The intervals of the rates printed above are not simultaneous: each one has the level 95 % by itself.

comparison.differences[["model", "other", "ratio", "low", "high", "differ"]].round(3)

# %%
# ``comparison.plot().figure.savefig("initializations.png")`` saves the figure.

comparison.plot()
plt.show()

# %%
# *GSC of tanh networks with three scales of the weights.  Lines: means over 4 networks each.  Bands: ± one standard
# deviation.*
