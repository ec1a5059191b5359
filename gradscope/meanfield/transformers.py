"""Mean field of transformers with random weights: the residual ledger and GSC per block, by kernels over positions.

The state is the kernel C (T, T) of the stream, C_ts = x_t . x_s / width.  A branch f receives K, which is C, or its
normalized version K_ts = C_ts / sqrt((C_tt + eps)(C_ss + eps)) with pre-norm, and adds alpha^2 times

    attention   v E[A K A^T]                                   (`gradscope.meanfield.attention`)
    MLP         o E[phi(u) phi(u')]                            u with kernel h K
    gated MLP   o E[phi(u) phi(u')] h K

to the kernel.  Post-norm normalizes the sum.  Gradients have a kernel G (T, T) too, which begins as the identity at the
output and moves down through the transposed maps, plus the identity of the skip.  Then GSC of a layer with kernel C is
tr G tr C / (T tr C_out), in the squared convention.

The theory holds for wide networks with independent zero-mean weights and zero biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, NamedTuple

import numpy as np
import pandas as pd

from gradscope import frames
from gradscope.choices import Depth, Numbers, Range, Size, check_choice, checked
from gradscope.meanfield.activations import Activation, ActivationLike, as_activation
from gradscope.meanfield.attention import Attention
from gradscope.meanfield.kernels import activation_kernels, log10_mean_square, mean_overlap, mean_square
from gradscope.meanfield.quadrature import FloatArray

NORMS = ("pre", "post", "none")
KINDS = {"layer": 2, "rms": 1}  # directions of a gradient that a norm removes: that of the token, and the mean
EPS = 1e-5  # of the normalizations
BAND = 4.0  # two standard deviations; see `Transformer.gsc`

Positions = Annotated[Size, Range("an integer from 1 to 2048", lambda number: number <= 2048)]
Width = Annotated[Size, Range("an integer from 3 to 1e7", lambda number: 3 <= number <= 1e7)]  # norms remove up to 2
Variance = Annotated[float, Range("a number from 0 to 1e6", lambda number: 0 <= number <= 1e6)]
Scale = Annotated[float, Range("a number from 1e-12 to 1e6", lambda number: 1e-12 <= number <= 1e6)]
Deviation = Annotated[float, Range("a number from 1e-5 to 1", lambda number: 1e-5 <= number <= 1)]
Map = Callable[[FloatArray], FloatArray]


class _Branch(NamedTuple):
    """One branch: name, kernels of the stream before, of what it writes, and of their sum; and its transposed map."""

    name: str
    stream: FloatArray
    write: FloatArray
    total: FloatArray
    backward: Map


class _Gradient(NamedTuple):
    """log10 mean squares of gradients with respect to x + f(x) and to x, and the share that passes through the skip."""

    total: float
    stream: float
    skip: float


@checked
@dataclass(frozen=True, eq=False)
class Transformer:
    """Mean-field theory of a wide random transformer: predicts GSC (`gsc`) and sizes of stream and branches (`ledger`).

    The variance of a matrix is that of one weight, times the fan-in.  So 1 stands for weights of standard
    deviation 1 / sqrt(fan-in).

    Arguments:
        depth: Number of blocks, each with an attention branch and then an MLP branch.
        width: Number of features d.
        length: Number of positions T, at most 2048.
        activation: Name, callable or `Activation`.
        gated: Whether the MLP is phi(gate(x)) * linear(x), as SwiGLU is with "silu".
        norm: pre (before each branch and at the end), post (after each sum), or none.
        norm_kind: layer or rms.
        causal: Whether a position attends only to itself and to earlier positions.
        residual_scale: Factor of the output of each branch, in addition to its variances.
        score_variance: Variance of the query matrix times that of the key matrix.  Scores of normalized tokens have
            this variance.  Set it to 1 if queries and keys are normalized.
        value_variance: Variance of the value matrix times that of the output matrix of attention.
        hidden_variance: Variance of the first matrix of an MLP; if ``gated``, of each of the matrices gate and linear.
        output_variance: Variance of the matrix after the activation.
        outputs: Number of logits, which affects only the interval of `gsc`; None for infinitely many.
        mean_square: Mean square of an entry of the embeddings.
        overlap: Correlation of the embeddings of two positions: a number, or a (T, T) matrix with ones on its diagonal.

    Raises:
        ValueError: A name is unknown, a number is out of its range, or ``overlap`` is no correlation matrix.
            Predictions also raise it if lengths vanish or overflow, or scores have a standard deviation above 20.

    Cost: about 0.1 s per block for 128 positions.  Memory: about 20 matrices (T, T) per block.

    References: Noci et al. (2022), arXiv:2206.03126; Cowsik et al. (2024), arXiv:2403.02579; Kedia et al. (2024),
    arXiv:2403.09635; Giorlandino and Goldt (2025), arXiv:2505.24333.

    >>> found = Transformer(depth=12, width=512, length=64).gsc()
    >>> found[["layer", "log10_value"]].iloc[[0, 1]].round(2)
                    layer  log10_value
    0           embedding         0.02
    1  blocks.0.attention        -1.09
    """

    depth: Depth
    width: Width
    length: Positions
    activation: ActivationLike = "gelu"
    gated: bool = False
    norm: str = "pre"
    norm_kind: str = "layer"
    causal: bool = True
    residual_scale: Variance = 1.0
    score_variance: Variance = 1.0
    value_variance: Variance = 1.0
    hidden_variance: Scale = 1.0
    output_variance: Variance = 1.0
    outputs: Size | None = None
    mean_square: Scale = 1.0
    overlap: Numbers = 0.0

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, NORMS)
        check_choice("norm_kind", self.norm_kind, tuple(KINDS))
        as_activation(self.activation)
        overlap = np.asarray(self.overlap, dtype=np.float64)
        if overlap.shape not in ((), (self.length, self.length)):
            raise ValueError(
                f"overlap must be a number or a matrix ({self.length}, {self.length}), got shape {overlap.shape}."
            )
        if np.isnan(overlap).any() or (np.abs(overlap) > 1 + 1e-9).any():
            raise ValueError("overlap must hold correlations between -1 and 1.")

    @classmethod
    @checked
    def gpt2(
        cls, depth: Depth, width: Width, length: Positions, *, std: Deviation = 0.02, **options: Any
    ) -> Transformer:
        """Return the theory of a transformer initialized like GPT-2: all weights have standard deviation ``std``.

        Weights that write into the stream are divided by sqrt(2 depth).  Token and position embeddings are added up.

        >>> round(Transformer.gpt2(12, 768, 128).score_variance, 4)
        0.0944
        """
        matrix = std**2 * width  # variance times fan-in
        return cls(
            depth, width, length,
            **{"score_variance": matrix**2, "value_variance": matrix**2, "hidden_variance": matrix,
               "output_variance": 4 * matrix, "residual_scale": 1 / math.sqrt(2 * depth), "mean_square": 2 * std**2}
            | options,
        )  # fmt: skip

    def ledger(self) -> pd.DataFrame:
        """Return a tidy frame with the sizes of the stream and of the output of each branch, such as ``blocks.3.mlp``.

        ``stream_rms``, ``stream_overlap``: root mean square of the stream before the branch's output is added, and
        mean correlation of two positions in it.  ``write_rms``, ``write_overlap``: the same for this output.
        ``skip_share``: the fraction of the squared gradient that passes through the skip, as in `gradscope.residual`.
        With one position, there are no overlaps.  If the output is 0, there is no ``write_overlap``.

        >>> Transformer(depth=1, width=512, length=64).ledger()[["layer", "quantity", "value"]].iloc[2:5].round(3)
                        layer       quantity  value
        2  blocks.0.attention      write_rms  0.356
        3  blocks.0.attention  write_overlap  0.299
        4  blocks.0.attention     skip_share  0.802
        """
        rows = [
            (branch.name, place // 2 + 1, self._end - place // 2 - 1, quantity, value)
            for place, (branch, gradient) in enumerate(zip(self._branches, self._gradients, strict=True))
            for quantity, value in (
                ("stream_rms", math.sqrt(mean_square(branch.stream))), ("stream_overlap", mean_overlap(branch.stream)),
                ("write_rms", math.sqrt(mean_square(branch.write))), ("write_overlap", mean_overlap(branch.write)),
                ("skip_share", gradient.skip),
            )
            if not math.isnan(value)
        ]  # fmt: skip
        names = ("layer", "index", "depth_from_output", "quantity", "value")
        return frames.tidy({**dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)), "num_samples": 1})

    def gsc(self) -> pd.DataFrame:
        """Return a tidy frame of predicted GSC with respect to the logits, with the layers of `gradscope.models.GPT`.

        Layers: ``embedding``, ``blocks.0``, ..., ``norm`` (pre-norm only), ``head``, and branches such as
        ``blocks.0.mlp``.  At least 95 % of random networks of this width have log10 GSC between ``log10_low`` and
        ``log10_high``.  For ln GSC, this interval reaches 4 sqrt(S / width) to each side: two standard deviations if
        all positions vary together, the worst case.  S is the sum of these terms (`ledger` defines ``skip_share``):

        - s + g for each branch f after the layer: s = |f(x)|^2 / |x + f(x)|^2, and g = 1 - ``skip_share``.
        - 1 for a branch; width / (2 outputs) for all layers but ``head``; 1 / width for all but ``norm`` and ``head``.

        >>> found = Transformer(depth=12, width=512, length=64).gsc()
        >>> found[["layer", "log10_value", "log10_low", "log10_high"]].iloc[[0, 1]].round(2)
                        layer  log10_value  log10_low  log10_high
        0           embedding         0.02      -0.14        0.19
        1  blocks.0.attention        -1.09      -1.26       -0.92
        """
        top = self._branches[-1].total
        output = top if self.norm == "none" else self._normalized(top)
        exponent, gradients = -log10_mean_square(output), self._gradients
        # In units of 4 / width: the logits have variance 2 / outputs, and the last norm an error of 2 / width.
        spread = 0.0 if self.outputs is None else self.width / (2 * self.outputs)
        rows, last = [("head", self._end, 0.0, 0.0)], 0.0  # a block without a norm above it has GSC 1, as the head has
        if self.norm == "pre":
            rows.append(("norm", self._end - 1, 0.0, spread))
            last = exponent + gradients[-1].total + log10_mean_square(top)
        spread += 1 / self.width
        rows.append((f"blocks.{self.depth - 1}", self.depth, last, spread))
        for place, (branch, gradient) in reversed(list(enumerate(zip(self._branches, gradients, strict=True)))):
            index = place // 2 + 1
            rows.append((branch.name, index, exponent + gradient.total + log10_mean_square(branch.write), spread + 1))
            spread += mean_square(branch.write) / mean_square(branch.total) + 1 - gradient.skip
            if place % 2 == 0:
                name = f"blocks.{index - 2}" if index > 1 else "embedding"
                rows.append((name, index - 1, exponent + gradient.stream + log10_mean_square(branch.stream), spread))
        names, indices, values, spreads = map(np.array, zip(*reversed(rows), strict=True))
        half = BAND * np.sqrt(spreads / self.width) / math.log(10)
        return frames.tidy({
            "layer": list(names), "index": indices, "depth_from_output": self._end - indices, "target": "head",
            "quantity": "gsc", "log10_value": values, "log10_low": values - half, "log10_high": values + half,
            "reduction": "batch", "num_samples": 1,
        })  # fmt: skip

    @property
    def _end(self) -> int:
        """The index of the head."""
        return self.depth + (2 if self.norm == "pre" else 1)

    @cached_property
    def _branches(self) -> list[_Branch]:
        """All branches, from the embedding up."""
        ones = np.eye(self.length)
        overlap = np.asarray(self.overlap, dtype=np.float64)
        stream = self.mean_square * (overlap + (1 - overlap) * ones if overlap.ndim == 0 else overlap)
        phi, found = as_activation(self.activation), []
        for place in range(2 * self.depth):
            name = f"blocks.{place // 2}.{'mlp' if place % 2 else 'attention'}"
            received = self._normalized(stream) if self.norm == "pre" else stream
            try:
                write, backward = self._mlp(phi, received) if place % 2 else self._attention(received)
            except ValueError as error:
                raise ValueError(f"{name} cannot be predicted: {error}") from error
            if self.norm == "pre":
                backward = self._through_norm(stream, backward)
            total = stream + write
            if not (np.isfinite(total).all() and mean_square(total) > 0):
                raise ValueError(f"Lengths vanish or overflow after {name}: change residual_scale or the variances.")
            found.append(_Branch(name, stream, write, total, backward))
            stream = self._normalized(total) if self.norm == "post" else total
        return found

    @cached_property
    def _gradients(self) -> list[_Gradient]:
        """Gradients of the output at all branches, from the embedding up."""
        gradient, exponent, removed, found = np.eye(self.length), 0.0, float(KINDS[self.norm_kind]), []
        if self.norm == "pre":
            gradient = self._denormalized(self._branches[-1].total, gradient, removed)
        for branch in reversed(self._branches):
            if self.norm == "post":
                gradient = self._denormalized(branch.total, gradient, removed)
            stream = gradient + branch.backward(gradient)
            total, below = (exponent + log10_mean_square(each) for each in (gradient, stream))
            found.append(_Gradient(total, below, mean_square(gradient) / mean_square(stream)))
            exponent, gradient = found[-1].stream, stream / mean_square(stream)  # so that nothing overflows
            # The norm above has removed the mean from what the skip passes, and the length if branches are homogeneous.
            removed = (KINDS[self.norm_kind] - 1) * (1 - found[-1].skip)
        return found[::-1]

    def _attention(self, kernel: FloatArray) -> tuple[FloatArray, Map]:
        """What attention adds to the kernel of the stream, and the map of gradients back to what it received."""
        attention = Attention(kernel, self.score_variance, causal=self.causal)
        factor = self.residual_scale**2 * self.value_variance
        return factor * attention.output, lambda gradient: factor * attention.backward(gradient)

    def _mlp(self, phi: Activation, kernel: FloatArray) -> tuple[FloatArray, Map]:
        """The same for the MLP."""
        hidden = self.hidden_variance * kernel
        value, slope = activation_kernels(phi, hidden)
        factor = self.residual_scale**2 * self.output_variance
        if self.gated:
            write, back = value * hidden, self.hidden_variance * (value + slope * hidden)
        else:
            write, back = value, self.hidden_variance * slope
        return factor * write, lambda gradient: factor * back * gradient

    def _normalized(self, kernel: FloatArray) -> FloatArray:
        length = np.sqrt(np.diag(kernel) + EPS)
        return kernel / np.outer(length, length)

    def _denormalized(self, kernel: FloatArray, gradient: FloatArray, removed: float) -> FloatArray:
        """Gradients before the normalization of tokens of this kernel, which removes this number of directions."""
        length = np.sqrt(np.diag(kernel) + EPS)
        return (1 - removed / self.width) * gradient / np.outer(length, length)

    def _through_norm(self, stream: FloatArray, backward: Map) -> Map:
        return lambda gradient: self._denormalized(stream, backward(gradient), KINDS[self.norm_kind])
