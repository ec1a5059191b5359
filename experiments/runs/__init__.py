"""Runs and sweeps: names of run folders, locks, states of runs, and the processes that execute runs."""

from experiments.runs.launches import active, ended
from experiments.runs.locks import confirm, locked
from experiments.runs.names import PLACE_KEYS, folder, folders
from experiments.runs.one_run import explained, run_once
from experiments.runs.origin import cpu, manifest, provenance
from experiments.runs.outcomes import (
    DONE,
    FAILED,
    FRAMES,
    HALF_DONE,
    METRICS,
    MISSING,
    RUNNING,
    Known,
    Outcome,
    Status,
    finished,
    states,
)  # fmt: skip
from experiments.runs.signals import Interrupted

__all__ = [
    "DONE", "FAILED", "FRAMES", "HALF_DONE", "METRICS", "MISSING", "PLACE_KEYS", "RUNNING", "Interrupted", "Known",
    "Outcome", "Status", "active", "confirm", "cpu", "ended", "explained", "finished", "folder", "folders", "locked",
    "manifest", "provenance", "run_once", "states",
]  # fmt: skip
