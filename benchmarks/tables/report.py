"""Tables of rows and demands for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.table import Table

from benchmarks.race.demands import Demand
from benchmarks.tables.rows import Row

PREFIXES = {"s": ((1, "s"), (1e-3, "ms"), (1e-6, "us")), "B": ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))}


def table(group: str, rows: Sequence[Row]) -> Table:
    """The table of one group: median, quartiles, and the ratio to the reference."""
    with_cases = any(row.case for row in rows)
    made = Table(title=group, title_justify="left")
    for column in (["case"] if with_cases else []) + ["what"]:
        made.add_column(column, overflow="fold")
    for column in ("median", "quartiles", "runs", "ratio", "to"):
        made.add_column(column, justify="right" if column != "to" else "left", no_wrap=column != "to")
    for row in rows:
        quartiles = (
            "" if math.isnan(row.low) else f"{_value(row.low, row.quantity)} .. {_value(row.high, row.quantity)}"
        )
        spread = "" if math.isnan(row.ratio_low) else f" [{row.ratio_low:.3g} .. {row.ratio_high:.3g}]"
        ratio = "" if math.isnan(row.ratio) else f"{row.ratio:.3g}{spread}"
        cells = [row.what, _value(row.value, row.quantity), quartiles, str(row.num), ratio, row.reference]
        made.add_row(*([row.case] if with_cases else []), *cells)
    return made


def demand_table(demands: Iterable[Demand], *, judged: bool) -> Table:
    """The table of demands, with verdicts if ``judged`` (the bounds hold for full sizes only)."""
    made = Table(title="Targets" if judged else "Targets (tiny sizes: no verdict)", title_justify="left")
    for column in ("what", "measured", "demanded", ""):
        made.add_column(column, justify="right" if column in ("measured", "demanded") else "left")
    for demand in demands:
        verdict = "" if not judged else "ok" if demand.met else "NOT MET"
        made.add_row(demand.what, f"{demand.measured:.4g}", demand.demanded, verdict)
    return made


def _value(value: float, quantity: str) -> str:
    """A number with its unit."""
    if quantity == "relative_rms":
        return f"{100 * value:.3g} %"
    if quantity not in ("seconds", "bytes"):
        return f"{value:.3g}"
    prefixes = PREFIXES["s" if quantity == "seconds" else "B"]
    factor, unit = next((pair for pair in prefixes if value >= pair[0]), prefixes[-1])
    return f"{value / factor:.3g} {unit}"
