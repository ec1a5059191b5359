"""`report(model, data, path)`: measure a model, and write one self-contained HTML page to send to a colleague."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from gradscope.backward.cotangents import Probes
from gradscope.checks.against_theory import compare as compared
from gradscope.checks.comparison import Comparison
from gradscope.checks.report import FAILED, Report
from gradscope.checks.self_check import check as self_test
from gradscope.choices import PathLike, checked
from gradscope.coefficients.growth import Growth
from gradscope.coefficients.gsc import gsc, gsc_matrix
from gradscope.coefficients.profiles import Profile
from gradscope.forward.inputs import Forward, LossFunction, as_batch, stream
from gradscope.forward.interrupts import interruptible
from gradscope.forward.modules import unwrap
from gradscope.measures.measuring import GRADIENT_MEASURES, measure
from gradscope.monitor.monitor import Monitor
from gradscope.report import sections, words
from gradscope.report.sections import Section
from gradscope.report.writing import require_packages, write

# What a measurement raises if a model does not allow it; the page then holds the reason.
REFUSED = (ValueError, TypeError, ArithmeticError, NotImplementedError, RuntimeError)
# What the page says then, before the reason.
ACTIVATIONS, GRADIENTS = "Statistics of activations are missing.", "Statistics of gradients are missing."
PAIRS, COMPARISON = "Pairs of layers were not measured.", "Layers were not compared."
TESTS = "The self-test did not run."


@checked
def report(
    model: nn.Module,
    data: Any,
    path: PathLike = "report.html",
    *,
    forward: Forward | None = None,
    loss_fn: LossFunction | None = None,
    probes: Probes = "auto",
    generator: torch.Generator | None = None,
    matrix: bool = True,
    check: bool | Report = True,
    compare: bool | Comparison = True,
    monitor: Monitor | pd.DataFrame | None = None,
    title: str | None = None,
) -> Path:
    """Measure a model, write one self-contained HTML page about it, and return the path of the page.

    The page begins with the verdict on the growth of GSC, the rate with its interval, and advice.  Then follow:

    - GSC of every layer with its interval, predicted GSC if mean-field theory covers the network, and GSC of all pairs
      of layers;
    - a table of all layers that can be sorted and filtered;
    - the results of `gradscope.check` and `gradscope.compare`;
    - remarks on the measurement, its settings and the software.

    The page needs no internet connection and is smaller than 2 MB.  If a measurement is impossible for the model, the
    page gives the reason instead.

    Arguments:
        model, data, forward, probes, generator: As for `gradscope.gsc`; ``data`` must be one batch.  The target of GSC
            is the model's output, even if ``loss_fn`` is given.
        path: The file to write.
        loss_fn: As for `gradscope.measure`.  With a loss, ``data`` is a pair (inputs, labels), and the table of layers
            also has statistics of gradients.
        matrix: Whether to measure GSC of all pairs of layers.
        check, compare: Whether to run `gradscope.check` and `gradscope.compare`.  A result of an earlier run can be
            given instead; the page then shows it.
        monitor: A `Monitor`, or its frame.  The page then shows GSC during training and the monitor's warnings.
        title: Title of the page; by default it contains the name of the model's class.

    Cost: that of `gradscope.gsc`, `gradscope.gsc_matrix`, `gradscope.measure`, `gradscope.check` and
    `gradscope.compare` together.  The first report of a Python process takes a few seconds more.

    Raises:
        ImportError: The packages of ``pip install "gradscope-toolkit[report]"`` are missing.
        ValueError, TypeError: GSC cannot be measured (see `gradscope.gsc`), or ``data`` is a stream of batches.

    >>> import tempfile, torch
    >>> import gradscope as gs
    >>> model = gs.models.MLP(depth=8, width=8, generator=torch.Generator().manual_seed(0))
    >>> x = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    >>> path = gs.report(model, x, tempfile.mkdtemp() + "/report.html", matrix=False, check=False)
    >>> "Gradients" in path.read_text() and path.stat().st_size < 2_000_000
    True
    """
    require_packages()
    if stream(data, forward=forward, loss_fn=loss_fn) is not None:
        raise ValueError(
            f"A report describes one batch, but data is a stream of batches ({type(data).__name__}): give one batch, "
            "such as next(iter(loader)); without loss_fn=, leave out its labels."
        )
    batch = as_batch(data, forward=forward, loss_fn=loss_fn)
    training = sections.monitored(monitor)
    inputs, own = data if loss_fn is None else data[0], unwrap(model)
    options: dict[str, Any] = {"forward": forward, "probes": probes, "generator": generator}
    about: dict[str, Any] = {"forward": forward, "loss_fn": loss_fn}
    refused: dict[str, str] = {}  # why the model does not allow a measurement
    begin = time.perf_counter()
    with interruptible() as whole, whole, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        profile = gsc(model, inputs, **options)
        pairs = _tried(lambda: gsc_matrix(model, inputs, **options), PAIRS, refused) if matrix else None
        parts = [_tried(lambda: measure(model, inputs, forward=forward), ACTIVATIONS, refused)]
        if loss_fn is not None:
            of_gradients = partial(measure, model, data, **about, measures=GRADIENT_MEASURES)
            parts.append(_tried(of_gradients, GRADIENTS, refused))
        measured = [part for part in parts if part is not None]
        statistics = pd.concat(measured, ignore_index=True) if measured else None
        tests = check if isinstance(check, Report) else None
        if check is True:
            tests = _tried(lambda: self_test(model, data, **about), TESTS, refused)
        comparison = compare if isinstance(compare, Comparison) else None
        if compare is True:
            comparison = _tried(lambda: compared(model, inputs, **options), COMPARISON, refused)
    seconds = time.perf_counter() - begin
    notes = dict.fromkeys(str(each.message) for each in caught)

    rows, predicted = profile.rows_to(), sections.theory(comparison)
    growth, reason = _growth(profile)
    kind, headline, facts = words.verdict(rows, growth, reason)
    given = {**about, "generator": generator, "check": check, "compare": compare, "matrix": matrix, "monitor": monitor}
    changed = {name: value for name, value in given.items() if value is not None and value is not True}
    made = [
        ("Call", words.call(own, Path(path).name, changed | ({} if probes == "auto" else {"probes": probes}))),
        ("Random numbers", f"seed {generator.initial_seed()}" if generator else "fixed seed: same call, same numbers"),
        ("Device", ", ".join(sorted({str(tensor.device) for tensor in batch.samples}))),
        *words.versions(),
        ("Time", f"{seconds:.1f} s for all measurements"),
    ]
    lacking = [refused[what] for what in (ACTIVATIONS, GRADIENTS) if what in refused]
    rest = [*words.basis(profile, own, batch.samples, growth is not None), *(("Warning", text) for text in notes)]
    page = [
        sections.profile(rows, predicted),
        *_section(pairs, sections.pairs, sections.PAIRS, refused.get(PAIRS)),
        sections.layers(rows, statistics, predicted, lacking),
        *training,
        *_section(comparison, sections.comparison, sections.COMPARED, refused.get(COMPARISON)),
        *_section(tests, sections.self_test, sections.TESTS, refused.get(TESTS)),
        Section("What the numbers rest on", facts=rest),
        Section("How this page was made", facts=made),
    ]
    name, size = type(own).__name__, sum(parameter.numel() for parameter in own.parameters())
    layers, samples = (
        f"{num} {word}{'s' * (num != 1)}" for num, word in ((len(rows) - 1, "layer"), (batch.size, "sample"))
    )
    line = f"{name}, {layers}, {size:,} parameters, batch of {samples}"
    return write(
        Path(path),
        title or f"Gradients of {name}",
        line,
        headline,
        kind,
        [*_alerts(tests, None if training else comparison), *facts],
        page,
    )


def _tried(call: Callable[[], Any], what: str, refused: dict[str, str]) -> Any:
    """The result of a measurement; None if the model does not allow it, with the reason in ``refused``."""
    try:
        return call()
    except REFUSED as error:
        text = str(error)
        if what == ACTIVATIONS:  # the rest says how else to call gs.measure
            text = f"{text.partition('. ')[0].rstrip('.')}."
        refused[what] = f"{what} {text}"
        return None


def _section(result: Any, shown: Callable[[Any], Section], title: str, reason: str | None) -> list[Section]:
    """The section on a result, or one with the reason why there is none; nothing if it was not asked for."""
    return [shown(result)] if result is not None else [Section(title, [reason])] if reason else []


def _growth(result: Profile) -> tuple[Growth | None, str]:
    try:
        return result.growth(), ""
    except ValueError as error:
        return None, str(error)


def _alerts(tests: Report | None, comparison: Comparison | None) -> list[tuple[str, str]]:
    """What a reader must know before the numbers."""
    found = []
    if tests and not tests.passed:
        failed = ", ".join(each.name for each in tests.checks if each.status == FAILED)
        found.append(("Beware", f"The self-test failed ({failed}), so numbers of this page may be wrong."))
    if comparison and comparison.deviations:
        first = comparison.deviations[0]
        found.append(("Odd layer", f"{first.layer}: {first.text}."))
    return found
