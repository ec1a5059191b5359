"""`compare_models({name: factory}, data)`: profiles and growth of several architectures, each over several seeds.

Estimators, for a model with networks i = 1 .. n: the rate is that of `gradscope.growth` over the networks; the total is
the mean of log10 GSC of the first row, with Student's t over the networks.  Two models differ if the interval of the
difference of their means of ln rate_i excludes 0: Welch's t with Bonferroni's correction for the number of pairs.

Cost: one `gradscope.gsc` per network.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from rich.console import Console
from scipy import special
from torch import nn

from gradscope.choices import Depth, Nonnegative, checked
from gradscope.coefficients.growth import MARGIN, Growth, growth
from gradscope.coefficients.gsc import gsc
from gradscope.coefficients.profiles import Profile
from gradscope.forward.state import alone, same_draws

FloatArray = npt.NDArray[np.float64]
Factory = Callable[[], nn.Module]

LEVEL = 0.95
NO_RATE = "no rate"  # in place of a verdict
MOST_PAIRS = 6  # that the text lists one by one
HEADER = ("model", "rate per layer (95 %)", "verdict", "log10 total (95 %)", "networks")


@dataclass(frozen=True, repr=False, eq=False)
class ModelComparison:
    """Growth of GSC in several models, each over several seeds; made by `gradscope.compare_models`.

    - ``frame``: tidy frame of the profiles of all networks, with the additional columns ``model`` and ``seed``.
    - ``table``: one row per model.  ``rate``, ``rate_low`` and ``rate_high`` are the growth rate per layer and its 95 %
      interval; NaN if there is no rate, and ``remarks`` says why.  ``verdict`` is that of `gradscope.Growth`, or "no
      rate".  ``total`` is log10 GSC of the first layer, as a mean over networks; ``total_low`` and ``total_high`` are
      its 95 % interval, NaN if unknown.  ``networks`` is the number of different networks.
    - ``differences``: one row per pair of models that have a rate and at least two networks each.  ``ratio`` is the
      rate of ``model`` divided by that of ``other``, with the interval ``low`` to ``high``; ``differ``: whether this
      interval excludes 1.  With probability 95 %, all these intervals contain their true ratios.
    - ``remarks``: sentences on models without a rate, on seeds that gave equal networks, and on undecided verdicts.
      For an undecided verdict, they say about how many networks would decide it.  This number assumes that the rate
      stays the same, and that the width of its interval is proportional to 1 / sqrt(number of networks).

    >>> import torch
    >>> import gradscope as gs
    >>> factory = lambda: torch.nn.Sequential(*(torch.nn.Linear(20, 20) for _ in range(8)))
    >>> gs.compare_models({"linear": factory}, torch.ones(4, 20), seeds=2)
    ModelComparison(1 model, 2 seeds)
    """

    frame: pd.DataFrame
    table: pd.DataFrame
    differences: pd.DataFrame
    seeds: tuple[int, ...]
    remarks: tuple[str, ...]

    def plot(self, *, ax: Any = None) -> Any:
        """Return Axes with log10 GSC of each model: mean and standard deviation over networks, and verdicts."""
        from gradscope import plots

        notes: dict[tuple[str, ...], str] = {(row["model"],): row["verdict"] for row in self.table.to_dict("records")}
        return plots.profile(self.frame, hue="model", notes=notes, ax=ax)

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        rows = [[cell.replace("|", r"\|") for cell in row] for row in (HEADER, *self._cells())]
        rows.insert(1, ["---"] * len(HEADER))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def to_latex(self) -> str:
        r"""Return the table in LaTeX, for the package booktabs; special characters are escaped."""
        first, *rest = [" & ".join(map(_escaped, row)) + r" \\" for row in (HEADER, *self._cells())]
        lines = [r"\begin{tabular}{lllll}", r"\toprule", first, r"\midrule", *rest, r"\bottomrule", r"\end{tabular}"]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return the table in HTML, for notebooks."""
        return pd.DataFrame(self._cells(), columns=list(HEADER)).to_html(index=False)

    def __str__(self) -> str:
        rows = [HEADER, *self._cells()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *self._difference_lines(), *self.remarks])

    def __repr__(self) -> str:
        models, seeds = len(self.table), len(self.seeds)
        return f"ModelComparison({models} model{'s' * (models != 1)}, {seeds} seed{'s' * (seeds != 1)})"

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                str(row["model"]),
                interval_text(row["rate"], row["rate_low"], row["rate_high"]),
                str(row["verdict"]),
                interval_text(row["total"], row["total_low"], row["total_high"]),
                str(row["networks"]),
            )
            for row in self.table.to_dict("records")
        ]

    def _difference_lines(self) -> Iterator[str]:
        """Sentences on pairs of models; if there are many pairs, only on those that differ, and at most six."""
        found = self.differences[self.differences["differ"]] if len(self.differences) > MOST_PAIRS else self.differences
        for row in found.head(MOST_PAIRS).to_dict("records"):
            ratio = interval_text(row["ratio"], row["low"], row["high"])
            verb = "differ" if row["differ"] else "do not differ significantly"
            yield f"The rates of {row['model']} and {row['other']} {verb}: ratio {ratio}."
        if len(self.differences) > MOST_PAIRS:
            yield f"The rates differ in {len(found)} of {len(self.differences)} pairs; .differences lists all pairs."
        if len(self.differences):
            yield "All intervals of ratios hold together with probability 95 %."


@checked
def compare_models(
    models: Mapping[str, Factory], data: Any, *, seeds: Depth | Sequence[int] = 8, margin: Nonnegative = MARGIN,
    progress: Callable[[str], None] | None = None, **options: Any,
) -> ModelComparison:  # fmt: skip
    """Return profiles, growth rates and verdicts of several models, each over several random initializations.

    Arguments:
        models: A dict from names to functions without arguments that build the model, such as a class or a lambda.
        data: As for `gradscope.gsc`, and used for all networks, so it must not be an iterator.
        seeds: Number n of networks per model, which get the seeds 0 to n - 1; or a list of seeds.
        margin: As for `gradscope.growth`.
        progress: Called with one line of text per model.  Default: lines are printed if stderr is a terminal.
        options: Options of `gradscope.gsc` (forward, layers, loss_fn, ...).  By default, ``generator`` is seeded with
            the seed of the network.

    Before each network is built, torch, Python and numpy are seeded.  Their random states are restored afterwards.  If
    a network equals that of an earlier seed, it is not measured again; a remark says so.

    Raises:
        ValueError: Models or seeds are missing, seeds repeat, ``data`` is an iterator, or a network cannot be measured.
        TypeError: A factory does not return a module.

    Cost: one `gradscope.gsc` per network.

    >>> import torch
    >>> import gradscope as gs
    >>> def network(activation):
    ...     return lambda: gs.models.MLP(depth=20, width=30, activation=activation)
    >>> data = torch.randn(8, 30, generator=torch.Generator().manual_seed(1))
    >>> found = gs.compare_models({"selu": network("selu"), "relu": network("relu")}, data, seeds=4)
    >>> found.table[["model", "networks"]]
      model  networks
    0  selu         4
    1  relu         4
    """
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not models or not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"Give at least one model and different seeds; got {len(models)} models, seeds={seeds!r}.")
    if isinstance(data, Iterator):
        raise ValueError("data is an iterator, which only the first network could read: give a batch or a DataLoader.")
    report = progress if progress is not None else _printer()
    frames, rows, slopes, remarks = [], [], {}, []
    for name, factory in models.items():
        profiles, equal = _measured(name, factory, data, numbers, options)
        if equal:
            remarks.append(_equal(name, equal, len(numbers)))
        row, remark = _row(name, list(profiles.values()), margin)
        if remark:
            remarks.append(f"{name}: {remark}")
        if row["verdict"] != NO_RATE and len(profiles) > 1:
            slopes[name] = np.array([math.log(one.growth().rate) for one in profiles.values()])
        rows.append(row)
        frames += [one.to_frame().assign(model=name, seed=seed) for seed, one in profiles.items()]
        report(f"{name}: {interval_text(row['rate'], row['rate_low'], row['rate_high'])}, {row['verdict']}")
    return ModelComparison(
        pd.concat(frames, ignore_index=True), pd.DataFrame(rows), _differences(slopes), numbers, tuple(remarks)
    )


def interval_text(value: float, low: float, high: float) -> str:
    """Return the value and its interval with as many digits as half the width of the interval supports (two).

    >>> interval_text(1.23456, 1.2, 1.27), interval_text(12.345, math.nan, math.nan), interval_text(2.0, 2.0, 2.0)
    ('1.235 (1.200 to 1.270)', '12.35', '2.000')
    """
    half = (high - low) / 2
    if math.isnan(value):
        return ""
    if not half > 1e-9 * abs(value):  # exact, or unknown
        return f"{value:.4g}" if half != 0 else f"{value:.3f}"
    digits = max(0, 1 - math.floor(math.log10(half)))
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _measured(
    name: str, factory: Factory, data: Any, seeds: Sequence[int], options: dict[str, Any]
) -> tuple[dict[int, Profile], list[int]]:
    """Profiles by seed, and the seeds whose network equals that of an earlier seed."""
    profiles: dict[int, Profile] = {}
    known: set[bytes] = set()
    equal = []
    for seed in seeds:
        with alone, same_draws(None, seed) as draws, draws:
            model = factory()
            if not isinstance(model, nn.Module):
                raise TypeError(f"The factory of {name!r} must return a torch.nn.Module, got {type(model).__name__}.")
            if (mark := _fingerprint(model)) in known:
                equal.append(seed)
                continue
            known.add(mark)
            try:
                generator = torch.Generator().manual_seed(seed)
                profiles[seed] = gsc(model, data, **{"generator": generator} | options)
            except ValueError as error:
                raise ValueError(f"{name!r} with seed {seed} cannot be measured: {error}") from error
    return profiles, equal


def _fingerprint(model: nn.Module) -> bytes:
    """A digest of all parameters and buffers."""
    digest = hashlib.blake2b()
    for key, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _equal(name: str, equal: Sequence[int], num: int) -> str:
    if len(equal) == num - 1:
        return (
            f"{name}: all {num} seeds gave the same network, so there is no spread between networks. Does the factory "
            "seed a generator itself, or load weights?"
        )
    return f"{name}: seeds {', '.join(map(str, equal))} gave networks equal to earlier ones, which count once."


def _row(name: str, profiles: Sequence[Profile], margin: float) -> tuple[dict[str, Any], str]:
    """A row of the table, and why there is no rate, or what would decide; or ""."""
    found, remark = None, ""
    try:
        found = growth(profiles, margin=margin)
        remark = f"{found.verdict}. At the present estimate, {found.advice}." if found.advice else ""
    except ValueError as error:
        remark = f"no rate. {error}"
    totals = np.array([one.log10_values[0, -1] for one in profiles])
    return {
        "model": name,
        **{key: getattr(found, key, math.nan) for key in ("rate", "rate_low", "rate_high")},
        "verdict": getattr(found, "verdict", NO_RATE),
        **dict(zip(("total", "total_low", "total_high"), _total(totals, found), strict=True)),
        "networks": len(profiles),
    }, remark


def _total(totals: FloatArray, found: Growth | None) -> tuple[float, float, float]:
    """Mean over networks and its interval; that of the probes if there is one network."""
    mean = float(totals.mean())
    if len(totals) == 1:
        return mean, getattr(found, "total_low", math.nan), getattr(found, "total_high", math.nan)
    with np.errstate(invalid="ignore"):  # a total of -inf: some network passes no gradient
        error = float(totals.std(ddof=1)) / math.sqrt(len(totals))
    half = float(special.stdtrit(len(totals) - 1, 0.5 + LEVEL / 2)) * error
    return mean, mean - half, mean + half


def _differences(slopes: Mapping[str, FloatArray]) -> pd.DataFrame:
    """Simultaneous intervals for the ratio of the rates of each pair of models."""
    rows = []
    pairs = list(combinations(slopes, 2))
    for model, other in pairs:
        both = slopes[model], slopes[other]
        difference = float(both[0].mean() - both[1].mean())
        variances = [float(own.var(ddof=1)) / len(own) for own in both]
        variance, terms = sum(variances), sum(v**2 / (len(own) - 1) for v, own in zip(variances, both, strict=True))
        freedom = variance**2 / terms if terms > 0 else 1.0
        half = float(special.stdtrit(freedom, 1 - (1 - LEVEL) / 2 / len(pairs))) * math.sqrt(variance)
        ratio = np.exp([difference, difference - half, difference + half])
        rows.append((model, other, *ratio, abs(difference) > max(half, 1e-9)))
    return pd.DataFrame(rows, columns=["model", "other", "ratio", "low", "high", "differ"]).astype({"differ": bool})


def _escaped(text: str) -> str:
    special_characters = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special_characters.get(c, "\\" + c if c in "&%$#_{}" else c) for c in text)


def _printer() -> Callable[[str], None]:
    """A function that prints a line if stderr is a terminal."""
    console = Console(stderr=True, highlight=False, markup=False)
    return console.print if console.is_terminal else lambda _: None
