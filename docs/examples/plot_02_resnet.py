"""
Which block of my ResNet changes gradients?
===========================================

GSC is computed from the autograd graph, so any module can be measured.  The rows of a profile are the parts that a
person would name: here the first convolution, the blocks and the head.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import gradscope as gs


class Block(nn.Module):
    def __init__(self, channels, stride):
        super().__init__()
        out = channels * stride
        self.branch = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x):
        return torch.relu(self.skip(x) + self.branch(x))


torch.manual_seed(0)
blocks = [Block(8, 1), Block(8, 2), Block(16, 1), Block(16, 2), Block(32, 1), Block(32, 1)]
head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
model = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), *blocks, *head)
x = torch.randn(32, 3, 32, 32)

profile = gs.gsc(model, x, probes=8)
profile.to_frame()[["layer", "value", "log10_value", "log10_stderr_probe"]].round(3)

# %%
# ``layers=`` selects layers by name or pattern, also inside the blocks.

inside = gs.gsc(model, x, layers="4.*", probes=8)
inside.to_frame()[["layer", "value"]].round(3)

# %%
# ``named_profile`` writes the names of the layers at the axis.  Each value is estimated from eight random probes; bars
# are 95 % intervals.  ``ax.figure.savefig("gsc.png")`` would save the picture.

ax = gs.plots.named_profile(profile)
plt.show()

# %%
# *GSC from each block to the logits of a small ResNet, with 95 % intervals.*
