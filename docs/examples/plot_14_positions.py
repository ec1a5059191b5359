"""
How far does a token reach?
===========================

``positions="both"`` splits GSC of a sequence model into blocks.  A block is the part from position s of a layer to
position t of the target.
"""

import matplotlib.pyplot as plt
import torch

import gradscope as gs

generator = torch.Generator().manual_seed(0)
model = gs.models.GPT(depth=4, width=32, length=16, generator=generator)
tokens = torch.randint(256, (64, 16), generator=generator)

found = gs.gsc(model, tokens, positions="both", target="blocks.3")
print(found)

# %%
# The network is causal, so a token reaches no earlier position.  The blocks with t < s are exactly zero.

gs.plots.positions(found, layers="embedding")
plt.show()

# %%
# *GSC from each position of the embedding to each position of the last transformer block.*

# %%
# The lag profile is the mean over all blocks with the same lag t - s.

gs.plots.positions(found.lag_profile())
plt.show()

# %%
# *Mean GSC from position s of a layer to position t of the target, against the lag t - s, with 95 % intervals; one
# curve per layer.  The curves leave out all blocks whose source s is the first position.  The circle of each layer,
# left of the curves, is the mean of the blocks left out.*
