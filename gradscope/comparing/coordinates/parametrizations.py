"""How lengths scale in a correct network: tables of exponents for the standard parametrization, mu-P and depth-mu-P."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import optim

from gradscope.comparing.coordinates.measurement import ACTIVATION, CHANGE, EFFECT, GRADIENT, GSC

STANDARD, MUP, DEPTH_MUP = "standard", "mup", "depth_mup"
TITLES = {STANDARD: "the standard parametrization", MUP: "mu-P", DEPTH_MUP: "depth-mu-P"}
WIDTH, DEPTH = "width", "depth"
INPUT, HIDDEN, WIDE, FINITE, OUTPUT = "input", "hidden", "wide", "finite", "output"
STREAM, EARLY = "stream", "early"
AGREES, DIFFERS, UNDECIDED, UNJUDGED = "agrees", "differs", "undecided", ""
ADAM = (optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax)


class Expectation(NamedTuple):
    """An exponent (``=``) or its upper bound (``<=``)."""

    relation: str
    exponent: float

    def __str__(self) -> str:
        return f"{self.relation} {self.exponent:g}"

    def ends(self, margin: float) -> tuple[float, float]:
        """The lowest and the highest exponent that agree."""
        return -math.inf if self.relation == "<=" else self.exponent - margin, self.exponent + margin

    def verdict(self, interval: tuple[float, float], cautious: tuple[float, float], margin: float) -> str:
        """Agrees if the interval lies inside the ends, differs if the cautious interval lies outside."""
        low, high = self.ends(margin)
        if low <= interval[0] and interval[1] <= high:
            return AGREES
        return DIFFERS if cautious[1] < low or cautious[0] > high else UNDECIDED


# Effect of the first update in the standard parametrization, by role, for SGD and for Adam.
_FIRST_UPDATE = {INPUT: (-0.5, 0.0), WIDE: (-0.5, 0.0), HIDDEN: (0.5, 1.0), OUTPUT: (1.0, 1.0)}


def expected(
    parametrization: str, axis: str, role: str, quantity: str, step: int, optimizer: type[optim.Optimizer] | None
) -> Expectation | None:
    """Return the exponent that theory predicts, or an upper bound of it; None if there is no prediction.

    The **role** of a layer follows from its shapes at the smallest and the largest width n.  If the shape of its output
    does not depend on n, the role is ``output`` for the output of the model and ``finite`` for other layers, which have
    no prediction.  All other layers are ``wide`` if their module holds no matrix (normalizations, blocks), ``hidden``
    if two dimensions of its weight grow with n, and otherwise ``input`` (also embeddings).

    **mu-P** against width (the same for SGD and Adam, each with its own learning rates):

    ==========================  ============  ============  ===================
    quantity                    step          output        input, hidden, wide
    ==========================  ============  ============  ===================
    activation                  0             <= -1/2       = 0
    change, effect of update    1, 2, ...     = 0           = 0
    gradient                    0, 1, ...     = 0           <= -1
    GSC                         0                           <= 0
    ==========================  ============  ============  ===================

    Each entry of a wide vector has order 1.  So has its change, because learning rates are as large as possible.  The
    last layer has weights of size 1/n.  At initialization they are independent of the features, so the output is a sum
    of n terms of size 1/n with random signs: n^(-1/2).  Updates are aligned with the features, so n such terms add up
    to 1.  The gradient at each of the last features is 1/n, and random square matrices preserve this size.  It may
    be smaller: where logits of attention are scaled by 1/n, queries and keys receive n^(-3/2) at initialization.

    **Standard parametrization**, with weights of variance 1 / fan-in and one learning rate for all widths:

    ======================  ====  ======  ======  ===========
    quantity                step  output  hidden  input, wide
    ======================  ====  ======  ======  ===========
    activation              0     = 0     = 0     = 0
    gradient                0     = 0     = -1/2  = -1/2
    effect of update, SGD   1     = 1     = 1/2   = -1/2
    effect of update, Adam  1     = 1     = 1     = 0
    GSC                     0             = 0     = 0
    ======================  ====  ======  ======  ===========

    SGD changes each weight by the learning rate times gradient times feature.  In a hidden layer this is n^(-1/2), so n
    aligned terms add up to n^(1/2).  Adam changes each weight by the learning rate, so n aligned terms add up to n.
    Later steps depend on the learning rate, so there is no prediction.

    **depth-mu-P** is the same as mu-P against width.  Against depth L:

    ============  ============  ======  ======  =====
    quantity      step          output  stream  early
    ============  ============  ======  ======  =====
    activation    0             <= 0    = 0     = 0
    change        1, 2, ...     = 0     = 0     <= 0
    gradient      0, 1, ...     = 0     = 0     = 0
    GSC           0                     = 0     = 0
    ============  ============  ======  ======  =====

    ``early`` is the first block, and ``stream`` are the other units.  Each of the L branches is multiplied by L^(-1/2).
    At initialization branches are independent, so their squares add up to order 1.  Updates change a branch by order
    L^(-1/2), and so the stream by order 1/L.  These changes are aligned, so all L of them add up to order 1, while the
    first block has made only one of them.

    References: Yang and Hu (2021), arXiv:2011.14522; Yang et al. (2022), "Tensor Programs V", arXiv:2203.03466, and
    the coordinate check of its package mup; Yang et al. (2023), "Tensor Programs VI", arXiv:2310.02244; Bordelon et
    al. (2023), arXiv:2309.16620.
    """
    if axis == DEPTH:
        return _against_depth(role, quantity, step) if parametrization == DEPTH_MUP else None
    if role == FINITE:
        return None
    if parametrization == STANDARD:
        return _standard(role, quantity, step, optimizer)
    if quantity == ACTIVATION and step == 0:
        return Expectation("<=", -0.5) if role == OUTPUT else Expectation("=", 0.0)
    if quantity in (CHANGE, EFFECT):
        return Expectation("=", 0.0)
    if quantity == GRADIENT:
        return Expectation("=", 0.0) if role == OUTPUT else Expectation("<=", -1.0)
    return Expectation("<=", 0.0) if quantity == GSC and step == 0 else None


def _standard(role: str, quantity: str, step: int, optimizer: type[optim.Optimizer] | None) -> Expectation | None:
    if quantity in (ACTIVATION, GSC) and step == 0:
        return Expectation("=", 0.0)
    if quantity == GRADIENT and step == 0:
        return Expectation("=", 0.0 if role == OUTPUT else -0.5)
    if quantity == EFFECT and step == 1 and optimizer is not None and issubclass(optimizer, (optim.SGD, *ADAM)):
        sgd, adam = _FIRST_UPDATE[role]
        return Expectation("=", sgd if issubclass(optimizer, optim.SGD) else adam)
    return None


def _against_depth(role: str, quantity: str, step: int) -> Expectation | None:
    if quantity == ACTIVATION and step == 0:
        return Expectation("<=" if role == OUTPUT else "=", 0.0)
    if quantity == CHANGE:
        return Expectation("<=" if role == EARLY else "=", 0.0)
    return Expectation("=", 0.0) if quantity == GRADIENT or (quantity == GSC and step == 0) else None


def role_of(
    small: tuple[tuple[int, ...], tuple[int, ...]], large: tuple[tuple[int, ...], tuple[int, ...]], *, target: bool
) -> str:
    """Return the role of a layer, from the shapes of its output and weight at the smallest and largest width."""
    growing = [sum(a != b for a, b in zip(*pair, strict=True)) for pair in zip(small, large, strict=True)]
    if not growing[0]:
        return OUTPUT if target else FINITE
    if len(small[1]) < 2:
        return WIDE
    return HIDDEN if growing[1] > 1 else INPUT
