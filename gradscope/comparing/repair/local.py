"""Local GSC, from one row of the trunk to the next, and the lengths of rows.

    GSC(k, k + 1) = |J|_F^2 / (B d_k) * |f_k|^2 / |f_(k+1)|^2,    rms(k) = |f_k| / sqrt(B d_k)

Cost: one forward pass, and for each pair of rows one short backward pass per cotangent, from one row to the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from gradscope.backward.cotangents import chosen, needed_for_exact
from gradscope.backward.readings import lengths
from gradscope.backward.route import TrunkRoute
from gradscope.backward.sweep import sweep
from gradscope.coefficients.pairs import Board, Pairs
from gradscope.coefficients.profiles import FloatArray, WithIntervals
from gradscope.comparing.repair.stages import Stage
from gradscope.forward.inputs import Forward
from gradscope.forward.layers import Layer, find
from gradscope.forward.modules import listed
from gradscope.forward.state import alone, same_draws
from gradscope.forward.trunk import vertex
from gradscope.jacobians.capture import Capture, captured_unread


@dataclass(frozen=True)
class Probing:
    """How local GSC is measured: options of `gradscope.gsc`.  The same draws at every call, also of dropout masks."""

    forward: Forward | None
    probes: int | str
    seed: int
    coupled: bool

    def point(self, model: nn.Module, batch: Any, stage: Stage) -> tuple[float, float]:
        """ln of the local GSC of one stage, and ln of the rms of its target, for one batch."""
        with alone, same_draws(listed(model), self.seed) as draws, draws:
            names = [stage.source, stage.target]
            captured = captured_unread(model, batch, forward=self.forward, layers=_exact(names), target=stage.target)
            source, target = (find(captured.layers, name) for name in names)
            needed = needed_for_exact(target, captured.batch_size, coupled=self.coupled)
            cotangents = chosen(target, needed, self.probes, torch.Generator().manual_seed(self.seed))
            with captured.replay.guard() as state, state:
                route = TrunkRoute(captured.graph, [source])
                (reading,) = sweep(
                    route, [cotangents], lengths(), widest=max(layer.bytes for layer in captured.reached)
                )
        with np.errstate(divide="ignore"):  # a basis vector of a dead entry
            squares = 2 * (np.log(reading.values[:, 0]) + reading.exponents * math.log(2))
        jacobian = np.logaddexp.reduce(squares) - (math.log(len(squares)) if cotangents.num_probes else 0.0)
        below, above = (rms(captured, layer) for layer in (source, target))
        return float(jacobian) - math.log(target.size) + 2 * (below - above), above

    def stages(self, model: nn.Module, batches: Iterable[Any], stages: Sequence[Stage], *, streamed: bool) -> Local:
        """Local GSC of all stages with errors, over all batches."""
        totals: list[Pairs] = []
        roots: list[list[float]] = []
        generator = torch.Generator().manual_seed(self.seed)
        for batch in batches:
            names = sorted({name for stage in stages for name in (stage.source, stage.target)})
            captured = captured_unread(model, batch, forward=self.forward, layers=_exact(names))
            found = []
            with alone, captured.replay.guard() as state, state:
                for stage in stages:
                    source, target = (find(captured.layers, name) for name in (stage.source, stage.target))
                    board = Board(captured, [source, target], [target], "batch")
                    found.append(board.measure([chosen(target, board.needed[0], self.probes, generator)]))
            totals = [a.merge(b) for a, b in zip(totals, found, strict=True)] if totals else found
            roots.append([2 * rms(captured, find(captured.layers, stage.target)) for stage in stages])
        return Local.of(totals, np.logaddexp.reduce(roots, axis=0) - math.log(len(roots)), streamed)


def rms(captured: Capture, layer: Layer) -> float:
    """ln of the root mean square of a layer."""
    square = captured.lengths.all[vertex(layer.edge)]
    return 0.5 * (math.log(float(square.squares.sum())) - math.log(layer.size)) + square.exponent * math.log(2)


def _exact(names: Sequence[str]) -> Any:
    return lambda layer: not set(names).isdisjoint(layer.names)


@dataclass(frozen=True)
class Local(WithIntervals):
    """Local GSC of the stages, with errors; ``log_rms``: ln of the rms of their targets."""

    log10_values: FloatArray
    log10_stderr_probe: FloatArray
    log10_stderr_sample: FloatArray
    streamed: bool
    _log10_stderr_cautious: FloatArray
    _fixed_share: FloatArray
    _probe_freedom: FloatArray
    _sample_freedom: FloatArray
    log_rms: FloatArray
    num_probes: FloatArray
    num_samples: int
    coupled: bool

    @classmethod
    def of(cls, pairs: Sequence[Pairs], squares: FloatArray, streamed: bool) -> Local:
        """Join the pairs of all stages; ``squares``: ln of the mean squares of the targets."""

        def each(name: str) -> FloatArray:
            return np.array([one.spread(name)[0, 0] for one in pairs])

        return cls(
            log10_values=each("log10_values"),
            log10_stderr_probe=each("log10_stderr_probe"),
            log10_stderr_sample=each("log10_stderr_sample"),
            streamed=streamed,
            _log10_stderr_cautious=each("log10_stderr_cautious"),
            _fixed_share=each("fixed_share"),
            _probe_freedom=each("probe_freedom"),
            _sample_freedom=each("sample_freedom"),
            log_rms=squares / 2,
            num_probes=np.array([one.num_probes[0, 0] for one in pairs]),
            num_samples=pairs[0].num_samples,
            coupled=any(one.coupled for one in pairs),
        )
