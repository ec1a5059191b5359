"""Results of the self-tests of `gradscope.check`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import pandas as pd

from gradscope.frames import notebook

PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"


@dataclass(frozen=True)
class Check:
    """One test: ``name``, ``status`` ("passed", "FAILED" or "skipped"), and ``detail``, such as the faulty layer."""

    name: str
    status: str
    detail: str


@dataclass(frozen=True)
class Report:
    """Results of all tests of `gradscope.check`; ``print`` shows one line per test.

    >>> import torch
    >>> import gradscope as gs
    >>> report = gs.check(torch.nn.Linear(2, 2).double(), torch.eye(2).double())
    >>> report
    Report(6 checks, passed)
    >>> report.to_frame()["name"].to_list()
    ['adjoint', 'finite differences', 'independence', 'probes', 'determinism', 'left alone']
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """True if no test failed."""
        return all(check.status != FAILED for check in self.checks)

    def to_frame(self) -> pd.DataFrame:
        """Return a frame with one row per test and the columns name, status and detail."""
        return pd.DataFrame([asdict(check) for check in self.checks])

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        return "\n".join(f"{check.status:<8}{check.name:<{width + 2}}{check.detail}" for check in self.checks)

    def __repr__(self) -> str:
        failed = ", ".join(check.name for check in self.checks if check.status == FAILED)
        return f"Report({len(self.checks)} checks, {f'failed: {failed}' if failed else 'passed'})"

    def _repr_html_(self) -> str:
        """Return the verdict and a table of the tests as HTML, for notebooks."""
        return notebook(repr(self), self.to_frame())
