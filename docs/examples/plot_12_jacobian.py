"""
How do I get a Jacobian?
========================

``gs.capture`` records one forward pass.  It then gives the Jacobian between any two layers as a linear
operator.
"""

import matplotlib.pyplot as plt
import torch

import gradscope as gs

generator = torch.Generator().manual_seed(0)
model = gs.models.MLP(depth=24, width=40, activation="tanh", generator=generator)
x = torch.randn(1, 40, generator=generator)

captured = gs.capture(model, x)
names = [layer.name for layer in captured.units]
print(names[:4], "...")

# %%
# Products with a vector are computed without the matrix.

jacobian = captured.jacobian("input", names[-1])
print(jacobian.shape, "length of J v:", round(float(jacobian.matvec(torch.randn(40)).norm()), 4))

# %%
# The spread of the singular values grows with depth: most directions shrink, and a few hardly do.

fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
for depth, style in ((1, "-"), (4, "--"), (12, "-."), (24, ":")):
    values = captured.jacobian("input", names[depth]).singular_values()
    ax.semilogy(values / values.max(), style, label=f"{depth} layers")
ax.set(xlabel="number of the singular value", ylabel="singular value / largest one", ylim=(1e-6, 2))
ax.legend()
plt.show()

# %%
# *Singular values of the Jacobians from the input to the layers 1, 4, 12 and 24.  Each is divided by the largest one of
# its Jacobian.*
