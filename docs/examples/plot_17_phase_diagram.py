"""
Where is the edge of chaos?
===========================

For weights of variance sigma_w^2 / width and biases of variance sigma_b^2, mean-field theory gives the factor chi_1 by
which the squared gradient is multiplied per layer.
"""

import matplotlib.pyplot as plt
import numpy as np

import gradscope as gs

diagram = gs.meanfield.phase_diagram("tanh", np.linspace(0.5, 4, 36), np.linspace(0, 1, 21))
point = gs.meanfield.critical_point("tanh", bias_variance=0.05)
print(point)

# %%

gs.plots.phase_diagram(diagram)
plt.show()

# %%
# *chi_1 of tanh networks.  On the critical line chi_1 = 1, gradients neither explode nor vanish.*
