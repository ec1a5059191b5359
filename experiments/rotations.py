"""Linear networks of rotations, which keep every length and every volume, or change all of them alike."""

from __future__ import annotations

import torch

from gradscope.models import MLP


def rotations(depth: int, width: int, scale: float, in_features: int, *, generator: torch.Generator) -> MLP:
    """Layers f_l = scale Q_l f_{l-1}, the Q_l independent and uniform among orthogonal matrices (width, width).

    All singular values of the Jacobian from the input to layer l are scale^l.  An input of other than ``width``
    features meets a matrix with orthonormal rows or columns first.
    """
    network = MLP(
        depth=depth, width=width, in_features=in_features, activation="linear", init="orthogonal", generator=generator
    )
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(scale)
    return network
