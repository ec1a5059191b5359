"""
What does each block write into the residual stream?
====================================================

A residual network consists of sums x + f(x): the branch f writes f(x) into the residual stream x.  For every sum,
``gs.residual`` lists the lengths of x and f(x), and the shares of the squared Jacobian that pass through the skip and
the branch.
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
# *Above: root mean square (rms) of the stream x and of what each branch writes, f(x).  Middle: rms of f(x) divided by
# rms of x.  Below: shares of the squared norm of the Jacobian: skip, branch and their cross term.*
