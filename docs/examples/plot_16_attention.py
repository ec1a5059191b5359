"""
Which attention head has collapsed?
===================================

``gs.attention`` measures every attention head of a model.  It finds the heads at calls of
``scaled_dot_product_attention`` or a softmax, in any module.
"""

import matplotlib.pyplot as plt
import torch

import gradscope as gs

generator = torch.Generator().manual_seed(0)
model = gs.models.GPT(depth=4, width=32, length=16, generator=generator)
tokens = torch.randint(256, (32, 16), generator=generator)

attention = model.blocks[2].attention
with torch.no_grad():  # head 1 of block 2 gets queries and keys that are 10 times as long
    for linear in (attention.query, attention.key):
        linear.weight[8:16] *= 10

heads = gs.attention(model, tokens)
print(heads)

# %%
# The relative attention entropy is the entropy of the attention weights divided by ln n, for n visible keys.  It is 1
# for uniform attention, and 0 for attention to a single key.

heads.plot()
plt.show()

# %%
# *Entropy / ln n (for n visible keys) and largest logit of every head.  Head 1 of block 2 attends to single keys.*
