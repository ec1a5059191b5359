"""The commands that measure models: ``report``, ``check``, ``profile``, ``matrix`` and ``diff``."""

from __future__ import annotations

import argparse
import importlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

import gradscope as gs
from gradscope.command.subject import DTYPES, made, subject


def report(given: argparse.Namespace) -> int:
    """Write the HTML page about the model; return the exit code."""
    write = importlib.import_module("gradscope.report.page").report
    path = write(*subject(given), given.out or "report.html")
    _print(given, {"report": str(path)}, f"Report: {path}")
    return 0


def check(given: argparse.Namespace) -> int:
    """Print the tests of the measurement itself; return 1 if one failed."""
    given.dtype = given.dtype or "float64"  # float32 cannot tell small faults from rounding
    found = gs.check(*subject(given))
    _print(given, {"passed": found.passed, "checks": [asdict(test) for test in found.checks]}, str(found))
    return int(not found.passed)


def profile(given: argparse.Namespace) -> int:
    """Print GSC of every layer with respect to one target, with the verdict; return the exit code."""
    found = gs.gsc(*subject(given), target=given.target, **_options(given))
    rows = found.rows_to()[["layer", "depth_from_output", "log10_value", "log10_low", "log10_high"]]
    rows.columns = pd.Index(["layer", "depth", "log10 GSC", "low", "high"])
    _measured(given, found, rows.to_string(index=False, float_format="{:.4f}".format, na_rep="unknown"))
    return 0


def matrix(given: argparse.Namespace) -> int:
    """Print GSC between all pairs of layers, with the verdict; return the exit code."""
    found = gs.gsc_matrix(*subject(given), **_options(given))
    table = pd.DataFrame(found.log10_values, index=pd.Index(found.sources, name="log10 GSC"), columns=found.targets)
    text = table.to_string(float_format="{:.3f}".format, na_rep="", max_cols=12, max_rows=40)
    _measured(given, found, text)
    return 0


def diff(given: argparse.Namespace) -> int:
    """Print what differs between two models; return 1 if something does."""
    model, x = subject(given)
    dtype = DTYPES.get(given.other)
    change = (
        (lambda copy: copy.to(dtype)) if dtype else made(given.other, given.seed).to(given.device).train(model.training)
    )
    found = gs.diff(model, change, x, probes=_probes(given))
    path = given.out and Path(given.out)
    if path:
        path = found.report(path) if path.suffix == ".html" else _write(found, path)
    content = {
        "models": [given.model, given.other], "seed": given.seed, "first": found.first, "equal": found.equal,
        "headline": found.headline, "only_first": found.matching.only_first, "only_second": found.matching.only_second,
        "out": path and str(path), "rows": found.to_frame().dropna(axis=1, how="all").to_dict("records"),
    }  # fmt: skip
    _print(given, content, "\n".join([str(found), *([f"Written: {path}"] if path else [])]))
    return int(not found.equal)


def _options(given: argparse.Namespace) -> dict[str, Any]:
    return {"layers": given.layers and given.layers.split(","), "probes": _probes(given), "rtol": given.rtol}


def _probes(given: argparse.Namespace) -> int | str:
    found: str = given.probes
    return int(found) if found.isdecimal() else found


def _measured(given: argparse.Namespace, found: gs.Matrix, table: str) -> None:
    """Print a result as table or JSON, and write it to ``--out``."""
    try:
        growth, reason = asdict(found.growth()), None
    except ValueError as error:
        growth, reason = None, str(error)
    written = given.out and str(_write(found, Path(given.out)))
    content = {
        "model": given.model, "seed": given.seed, "samples": found.num_samples, "reduction": found.reduction,
        "relative_error": found.relative_error, "verdict": growth and growth["verdict"], "growth": growth,
        "no_growth": reason, "remarks": list(found.remarks), "out": written,
        "rows": found.to_frame().dropna(axis=1, how="all").to_dict("records"),
    }  # fmt: skip
    _print(given, content, "\n".join([table, "", str(found), *([f"Written: {written}"] if written else [])]))


def _write(found: gs.Matrix | gs.Difference, path: Path) -> Path:
    if path.suffix != ".png":
        return found.save(path)
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots()
    path.parent.mkdir(parents=True, exist_ok=True)
    found.plot(ax=ax)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return path


def _print(given: argparse.Namespace, content: dict[str, Any], text: str) -> None:
    print(json.dumps(_plain(content), allow_nan=False) if given.json else text)


def _plain(value: Any) -> Any:
    """A value as JSON has it: NaN becomes null, an infinity a string."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and math.isinf(value) else value
