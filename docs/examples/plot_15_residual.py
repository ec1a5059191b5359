"""
What does each block write into the residual stream?
====================================================

Where a network is a sum x + f(x), ``gs.residual`` lists the length of the stream x, of the write f(x), and the shares
of the squared Jacobian that pass through the skip and the branch.
"""

import matplotlib.pyplot as plt
import torch

import gradscope as gs

generator = torch.Generator().manual_seed(0)
model = gs.models.GPT(depth=6, width=32, length=16, generator=generator)
tokens = torch.randint(256, (32, 16), generator=generator)

ledger = gs.residual(model, tokens)
print(ledger)

# %%

ledger.plot()
plt.show()

# %%
# *Above: root mean square of stream and writes.  Middle: their ratio.  Below: shares of the squared Jacobian.*
