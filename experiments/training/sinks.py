"""Where records go besides the run folder: TensorBoard and MLflow, both off unless asked for."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from experiments.files import written
from experiments.training.records import Record

# Quantities whose logarithm is what one looks at.
LOGARITHMIC = ("gsc",)
MLFLOW_ID = "mlflow_run.txt"  # in the run folder: which run it is in MLflow
FORBIDDEN = re.compile(r"[^/\w.\- ]")  # in the name of a metric of MLflow; the second call of a layer is "name#2"


class Sink(Protocol):
    """Takes named numbers of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record them."""

    def close(self, error: BaseException | None = None) -> None:
        """No more will come; ``error``: what ended the run before its time."""


class TensorBoard:
    """Event files in ``folder/tensorboard``; what earlier ones hold from step ``begin`` on counts no more."""

    def __init__(self, folder: Path, config: Mapping[str, Any], begin: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=begin)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar each."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, error: BaseException | None = None) -> None:
        """Close the event file."""
        self._writer.close()


class MLflow:
    """A run of the experiment named like the sweep's folder, in the local store ``mlruns`` beside the run folders.

    Its id stands in the run folder, so that a run that goes on is the same one there.  Steps that are taken a second
    time then have two values in its history, for MLflow forgets none.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], begin: int = 0) -> None:
        # MLflow asks for this word before it writes plain files, which need no database.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from filelock import FileLock
        from mlflow import MlflowClient

        store, sweep, self._id = folder.parent / "mlruns", folder.parent.name, folder / MLFLOW_ID
        folder.mkdir(parents=True, exist_ok=True)
        # Two processes that find neither store nor experiment would both make them.
        with FileLock(store.with_suffix(".lock")):
            self._client = MlflowClient(tracking_uri=store.resolve().as_uri())
            known = self._client.get_experiment_by_name(sweep)
            experiment = known.experiment_id if known else self._client.create_experiment(sweep)
        self._run = self._continued() or self._begun(experiment, folder.name, config)

    def _continued(self) -> str | None:
        """The run whose id was kept, running again; None where there is none, or the store has lost it."""
        from mlflow.exceptions import MlflowException

        if not self._id.is_file():
            return None
        run = self._id.read_text().strip()
        try:
            self._client.update_run(run, status="RUNNING")
        except MlflowException:
            return None
        return run

    def _begun(self, experiment: str, name: str, config: Mapping[str, Any]) -> str:
        """A new run, with the configuration as its parameters."""
        from mlflow.entities import Param

        run: str = self._client.create_run(experiment, run_name=name).info.run_id
        written(self._id, lambda temporary: temporary.write_text(run))
        self._client.log_batch(run, params=[Param(key, str(value)) for key, value in _flat(config).items()])
        return run

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One batch of metrics."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(FORBIDDEN.sub("-", name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics)

    def close(self, error: BaseException | None = None) -> None:
        """The run is finished, or failed, or was killed by its user."""
        ended = "FINISHED" if error is None else "FAILED" if isinstance(error, Exception) else "KILLED"
        self._client.set_terminated(self._run, ended)


KNOWN: dict[str, type[TensorBoard] | type[MLflow]] = {"tensorboard": TensorBoard, "mlflow": MLflow}


def make(names: Sequence[str], folder: Path, config: Mapping[str, Any], begin: int = 0) -> list[Sink]:
    """The sinks of these names, for a run that begins, or goes on, at step ``begin``.

    Raises:
        ValueError: An unknown name.
        ModuleNotFoundError: Its package is not installed.
    """
    check(names)
    made: list[Sink] = []
    for name in names:
        try:
            made.append(KNOWN[name](folder, config, begin))
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f'sinks=[{name}] needs a package of its own: pip install "gradscope-toolkit[sinks]".'
            ) from error
    return made


def check(names: Sequence[str]) -> None:
    """ValueError where there is no sink of a name."""
    if unknown := [name for name in names if name not in KNOWN]:
        raise ValueError(f"sinks must be among {', '.join(KNOWN)}; got {unknown[0]!r}.")


def of_record(record: Record) -> dict[str, float]:
    """The numbers of a record of training."""
    return {name: float(value) for name, value in record.items() if name != "step" and value is not None}


def of_frame(frame: pd.DataFrame) -> dict[str, float]:
    """The numbers of a record of the monitor: ``quantity/layer``; log10 of coefficients."""
    rows = frame[["quantity", "layer", "value", "log10_value"]].itertuples(index=False)
    return {
        f"log10_{quantity}/{layer}" if quantity in LOGARITHMIC else f"{quantity}/{layer}": log
        if quantity in LOGARITHMIC
        else value
        for quantity, layer, value, log in rows
    }


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
