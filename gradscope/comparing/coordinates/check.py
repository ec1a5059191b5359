"""`coordinate_check(factory, data)`: do activations, gradients and updates scale with width and depth as predicted?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import pandas as pd
from torch.optim import Optimizer

from gradscope import frames
from gradscope.choices import Depth, Positive, Range, Size, check_choice, checked
from gradscope.comparing.coordinates.exponents import KEYS, judged, slopes
from gradscope.comparing.coordinates.measurement import ACTIVATION, CHANGE, EFFECT, GRADIENT, GSC, Task
from gradscope.comparing.coordinates.networks import swept
from gradscope.comparing.coordinates.parametrizations import (
    AGREES,
    DEPTH,
    DEPTH_MUP,
    DIFFERS,
    MUP,
    STANDARD,
    TITLES,
    UNDECIDED,
    UNJUDGED,
    WIDTH,
    expected,
)  # fmt: skip
from gradscope.forward.inputs import Forward, LossFunction, as_batch
from gradscope.forward.interrupts import interruptible
from gradscope.forward.layers import LayerFilter

MARGIN = 0.25
Steps = Annotated[int, Range("an integer from 0 to 1,000", lambda number: 0 <= number <= 1000)]
VERBS = {AGREES: "agrees", DIFFERS: "differs", UNDECIDED: "is undecided", UNJUDGED: "is not judged"}
MARKS = {AGREES: " ", DIFFERS: "*", UNDECIDED: "?", UNJUDGED: " "}
PREPOSITIONS = {AGREES: " with", DIFFERS: " from", UNDECIDED: " against", UNJUDGED: " by"}


@dataclass(frozen=True, repr=False, eq=False)
class CoordinateCheck:
    """Exponents with which the quantities of a network scale with width or depth; made by `gradscope.coordinate_check`.

    - ``frame``: tidy frame of the quantities, which `gradscope.plots.coordinates` lists.  Additional columns: ``axis``
      (what varies, "width" or "depth"), ``size`` (its value), ``width``, ``depth``, ``seed``, ``step`` (number of
      optimizer steps so far) and ``role`` (see `gradscope.comparing.coordinates.parametrizations.expected`).
    - ``exponents``: one row per axis, layer, quantity and step; in each step, rows of the forward pass come first.
      Columns: ``exponent``, ``stderr``, ``low`` and ``high`` (95 % interval over seeds), ``zero`` (whether the quantity
      is zero in all networks), ``expected``, and ``verdict`` ("agrees", "differs" or "undecided").  The verdict is ""
      if there is no prediction, or if ``zero``.  Exception: a layer that is unchanged after the last step "differs".
    - ``optimizer``: class of the optimizer, or None.
    - ``parametrization``, ``margin``, ``seeds``, ``steps``: the arguments.

    >>> import torch, gradscope as gs
    >>> def factory(n):
    ...     return torch.nn.Sequential(torch.nn.Linear(4, n), torch.nn.Linear(n, 1))
    >>> x, losses = torch.ones(8, 4), lambda y, labels: (y[:, 0] - labels) ** 2
    >>> gs.coordinate_check(factory, (x, x[:, 0]), loss_fn=losses, widths=[8, 16], steps=0, seeds=2).seeds
    (0, 1)
    """

    frame: pd.DataFrame
    exponents: pd.DataFrame
    parametrization: str
    margin: float
    seeds: tuple[int, ...]
    steps: int
    optimizer: type[Optimizer] | None

    @property
    def verdict(self) -> str:
        """Is "differs" if an exponent differs, "agrees" if all verdicts agree, else "undecided"; "" without any."""
        return _joint(self.exponents["verdict"])

    @property
    def first(self) -> str | None:
        """Name of the first layer that differs, in the order in which a training step computes; None if none differs.

        Within a step, this is the order of the forward pass, followed by that of the backward pass.  Later layers may
        differ only because they receive wrong values from this layer.
        """
        row = self._first_row(DIFFERS)
        return None if row is None else str(row["layer"])

    @property
    def layers(self) -> pd.DataFrame:
        """A table with the ``role`` and the ``verdict`` of every layer, per axis and in execution order."""
        rows = [
            (*key, part["role"].iloc[0], _joint(part["verdict"]))
            for key, part in self.exponents.sort_values("index", kind="stable").groupby(["axis", "layer"], sort=False)
        ]
        return pd.DataFrame(rows, columns=["axis", "layer", "role", "verdict"])

    def against(self, parametrization: str) -> CoordinateCheck:
        """Return the same exponents with the verdicts of another parametrization; nothing is measured again."""
        check_choice("parametrization", parametrization, TITLES)
        table = self.exponents.drop(columns=["expected", "verdict"], errors="ignore")
        columns = [table[name] for name in ("axis", "role", "quantity", "step")]
        expectations = [
            expected(parametrization, axis, role, quantity, step, self.optimizer)
            for axis, role, quantity, step in zip(*columns, strict=True)
        ]
        table = judged(table, expectations, len(self.seeds), self.steps, self.margin)
        return replace(self, exponents=table, parametrization=parametrization)

    def to_frame(self) -> pd.DataFrame:
        """Return ``frame``."""
        return self.frame

    def plot(self, quantity: str = CHANGE, *, step: int | None = None, axis: str | None = None, ax: Any = None) -> Any:
        """Return Axes with a quantity of every layer against width or depth; see `gradscope.plots.coordinates`."""
        from gradscope import plots

        return plots.coordinates(self, quantity, step=step, axis=axis, ax=ax)

    def __str__(self) -> str:
        title = TITLES[self.parametrization]
        lines = [f"Coordinate check: the network {VERBS[self.verdict]}{PREPOSITIONS[self.verdict]} {title}."]
        if self.verdict in (DIFFERS, UNDECIDED) and (row := self._first_row(self.verdict)):
            exponent = "is zero" if row["zero"] else f"has the exponent {_interval(row)}"
            lines.append(
                f"  First layer that {VERBS[self.verdict]}: {row['layer']!r}. Its {_words(row['quantity'])} at step "
                f"{row['step']} {exponent} against {row['axis']}; expected {row['expected']}."
            )
        if self.verdict == UNDECIDED:
            lines.append("  More seeds make the intervals narrower, and a wider range of sizes does so too.")
        for other in (STANDARD, MUP):
            if self.parametrization != other and WIDTH in set(self.exponents["axis"]):
                lines.append(f"  By the table of {TITLES[other]}, the verdict is: {self.against(other).verdict}.")
        sizes = [f"{axis} {', '.join(map(str, part['size'].unique()))}" for axis, part in self.frame.groupby("axis")]
        steps = f"{self.steps} step{'s' * (self.steps != 1)}"
        optimizer = f", {steps} of {self.optimizer.__name__}" if self.optimizer else ""
        lines.append(f"  {'; '.join(sizes)}; {len(self.seeds)} seeds{optimizer}; intervals are for initializations")
        lines.append(f"  * {DIFFERS}, ? {UNDECIDED}")
        return "\n".join([*lines, *(f"  {line}" for line in self._table().to_string(index=False).splitlines())])

    def __repr__(self) -> str:
        first = f", first at {self.first!r}" if self.first else ""
        return f"CoordinateCheck({self.parametrization}: {self.verdict}{first}, {len(self.seeds)} seeds)"

    def _repr_html_(self) -> str:
        """Return the summary and the table of exponents in HTML, for notebooks."""
        return frames.notebook(str(self), self._table())

    def _first_row(self, verdict: str) -> dict[Any, Any] | None:
        """The first row of ``exponents`` with this verdict."""
        rows = self.exponents[self.exponents["verdict"] == verdict]
        return None if rows.empty else rows.iloc[0].to_dict()

    def _table(self) -> pd.DataFrame:
        """Exponents at initialization, and of the change in the last step, with the verdict of each layer."""
        table = self.layers
        by_row = {tuple(row[key] for key in KEYS): row for row in self.exponents.to_dict("records")}
        for quantity, step in ((ACTIVATION, 0), (GRADIENT, 0), (EFFECT, 1), (CHANGE, self.steps)):
            if step <= self.steps and (step or quantity != CHANGE):
                rows = [by_row.get((*key, quantity, step)) for key in zip(table["axis"], table["layer"], strict=True)]
                table.insert(len(table.columns) - 1, f"{_words(quantity)} {step}", list(map(_cell, rows)))
        return table


@checked
def coordinate_check(
    factory: Callable[..., Any],
    data: Any,
    *,
    loss_fn: LossFunction,
    widths: Sequence[Size] = (64, 128, 256, 512),
    depths: Sequence[Depth] | None = None,
    steps: Steps = 3,
    seeds: Depth | Sequence[int] = 8,
    parametrization: str | None = None,
    forward: Forward | None = None,
    layers: LayerFilter | None = None,
    margin: Positive = MARGIN,
    probes: Size = 4,
    progress: Callable[[str], None] | None = None,
) -> CoordinateCheck:
    """Measure how activations, gradients, updates and GSC scale with width or depth, and compare with predictions.

    A quantity that is proportional to n^b at width n has the exponent b.  Networks of several widths are trained for a
    few steps on one batch, and b is compared with the prediction of a parametrization.  A parametrization is a rule,
    such as mu-P, that says how initial weights and learning rates depend on the width.

    Arguments:
        factory: Function called as ``factory(width)``, or with ``depths`` as ``factory(width=..., depth=...)``.
            Returns (model, optimizer), or the model alone if ``steps=0``.  Learning rates may depend on the size.
            Weights must be drawn from torch's global generator, which is seeded before each call.
        data: One batch (inputs, labels) for all networks, not a loader.
        loss_fn: ``(output, labels) -> losses``, one per sample, or their mean.  The mean is minimized.
        widths: At least two different widths; one suffices if ``depths`` is given.
        depths: At least two different depths, or None.  Depths are compared at the first width, and widths at the
            first depth.
        steps: Optimizer steps; 0 measures the initialization only.
        seeds: Number n of networks per size, which get the seeds 0 to n - 1; or a list of seeds.  At least two.
        parametrization: "standard", "mup" or "depth_mup"; predictions: see
            `gradscope.comparing.coordinates.parametrizations.expected`.  Default: "depth_mup" with ``depths``, else
            "mup".  A network with default initialization and one learning rate is "standard".
        forward: As for `gradscope.gsc`.
        layers: Layers to measure, as for `gradscope.gsc`.  Default when widths are compared: the output and every
            module that holds parameters.  Default when depths are compared: the units, such as residual blocks.
        margin: Largest distance from the expected exponent that counts as agreement.  For GSC, a square, it is doubled.
            Different predictions differ by at least 1/2, and the default 1/4 is half of this.
        probes: Number of random probes for each GSC.
        progress: Called with one line of text after each seed.

    Returns:
        A `CoordinateCheck`.  Its intervals (Student's t over seeds) are for the mean exponent over random
        initializations, on this batch and at these sizes (`gradscope.comparing.coordinates.exponents`).  Predictions
        hold for large widths and small changes, so choose large widths, and small learning rates.

    Before each network is built, torch, Python and numpy are seeded; their random states are restored afterwards.  All
    steps of a network use the same dropout masks.

    Raises:
        ValueError: There are too few sizes or seeds, the factory ignores the size or the seed, layers have different
            names at different widths, the optimizer lacks a parameter, or a number is NaN or Inf.
        TypeError: The factory does not accept the sizes, or returns something else.

    Cost: per network, ``steps + 1`` training steps and as many calls of `gradscope.gsc` with few probes.

    References: Yang et al. (2022), "Tensor Programs V", arXiv:2203.03466 (coordinate check).

    >>> import torch
    >>> import gradscope as gs
    >>> def standard(width):
    ...     model = gs.models.MLP(depth=2, width=width, in_features=8, out_features=4, activation="tanh")
    ...     return model, torch.optim.SGD(model.parameters(), lr=0.01)
    >>> generator = torch.Generator().manual_seed(0)
    >>> x, y = torch.randn(16, 8, generator=generator), torch.randint(4, (16,), generator=generator)
    >>> loss = torch.nn.CrossEntropyLoss(reduction="none")
    >>> found = gs.coordinate_check(standard, (x, y), loss_fn=loss, widths=[64, 256], steps=1)
    >>> found.verdict, found.first, found.against("standard").verdict
    ('differs', 'head', 'agrees')
    """
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    parametrization = parametrization or (MUP if depths is None else DEPTH_MUP)
    check_choice("parametrization", parametrization, TITLES)
    _check_sizes(widths, depths, numbers)
    task = Task(as_batch(data, forward=forward, loss_fn=loss_fn), forward, loss_fn, steps, layers, probes)
    report = progress if progress is not None else lambda line: None
    parts = []
    with interruptible() as whole, whole:
        if len(widths) > 1:
            fixed = {} if depths is None else {DEPTH: depths[0]}
            parts.append(swept(factory, task, WIDTH, widths, fixed, numbers, report))
        if depths is not None:
            parts.append(swept(factory, task, DEPTH, depths, {WIDTH: widths[0]}, numbers, report))
    frame = pd.concat([part for part, _ in parts], ignore_index=True)
    _check_seeds(frame, len(numbers))
    table = slopes(frame)
    found = CoordinateCheck(frame, table, parametrization, margin, numbers, steps, parts[0][1])
    return found.against(parametrization)


def _check_sizes(widths: Sequence[int], depths: Sequence[int] | None, seeds: Sequence[int]) -> None:
    for name, sizes in ((WIDTH, widths), (DEPTH, depths or [])):
        if len(set(sizes)) < len(sizes):
            raise ValueError(f"{name}s must be different, got {list(sizes)}.")
    if depths is None and len(widths) < 2:
        raise ValueError(f"An exponent needs at least two widths, got {list(widths)}; or give depths=.")
    if not widths or (depths is not None and len(depths) < 2):
        raise ValueError(f"An exponent needs at least two depths and one width, got {depths} and {list(widths)}.")
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise ValueError(f"An interval over networks needs at least two different seeds, got {list(seeds)}.")


def _interval(row: dict[Any, Any]) -> str:
    return f"{row['exponent']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def _cell(row: dict[Any, Any] | None) -> str:
    if row is None:
        return ""
    text = "zero" if row["zero"] else f"{row['exponent']:+.2f} ± {row['high'] - row['exponent']:.2f}"
    return f"{text} {MARKS[row['verdict']]}"


def _words(quantity: str) -> str:
    return {
        ACTIVATION: "activation", CHANGE: "change", EFFECT: "effect of update", GRADIENT: "gradient", GSC: "GSC",
    }[quantity]  # fmt: skip


def _joint(verdicts: pd.Series) -> str:
    """Differs if one differs; agrees if all that are judged agree; "" if none is judged."""
    found = set(verdicts) - {UNJUDGED}
    if DIFFERS in found or not found:
        return DIFFERS if found else UNJUDGED
    return UNDECIDED if UNDECIDED in found else AGREES


def _check_seeds(frame: pd.DataFrame, num: int) -> None:
    """Raise ValueError if all seeds gave equal networks."""
    first = frame[(frame["step"] == 0) & (frame["quantity"] == ACTIVATION)]
    if first.groupby(["axis", "size", "layer"])["log10_value"].nunique().eq(1).all():
        raise ValueError(
            f"All {num} seeds gave the same network, so there is no spread between networks: does factory seed a "
            "generator itself, or load weights?"
        )
