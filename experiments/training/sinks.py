"""Optional destinations of records besides the run folder: TensorBoard and MLflow."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.files import written
from experiments.training.records import Record

MLFLOW_ID = "mlflow_run.txt"  # in the run folder: the id of the run in MLflow
FORBIDDEN = re.compile(r"[^/\w.\- ]")  # not allowed in names of MLflow metrics, such as the # of "layer#2"


class TensorBoard:
    """Event files in ``folder/tensorboard``.  Values in earlier files are discarded from step ``begin`` on."""

    def __init__(self, folder: Path, config: Mapping[str, Any], begin: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=begin)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log one scalar per value of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, error: BaseException | None = None) -> None:
        """Close the event file; ``error`` is the exception that ended the run, if any."""
        self._writer.close()


class MLflow:
    """A run in the local store ``mlruns`` beside the run folders.  The experiment is named after the sweep's folder.

    The run folder keeps the id of the MLflow run, so that a resumed run continues the same MLflow run.  MLflow cannot
    delete values: its history has two values for each step that is repeated after an interruption.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], begin: int = 0) -> None:
        # MLflow requires this variable before it writes to plain files instead of a database.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from filelock import FileLock
        from mlflow import MlflowClient

        store, sweep, self._id = folder.parent / "mlruns", folder.parent.name, folder / MLFLOW_ID
        folder.mkdir(parents=True, exist_ok=True)
        # Without the lock, two processes could both create the store or the experiment.
        with FileLock(store.with_suffix(".lock")):
            self._client = MlflowClient(tracking_uri=store.resolve().as_uri())
            known = self._client.get_experiment_by_name(sweep)
            experiment = known.experiment_id if known else self._client.create_experiment(sweep)
        self._run = self._continued() or self._begun(experiment, folder.name, config)

    def _continued(self) -> str | None:
        """The MLflow run with the id in the run folder, set to running; None if there is no id or no such run."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._id.read_text().strip()
            self._client.update_run(run, status="RUNNING")
        except (FileNotFoundError, MlflowException):
            return None
        return run

    def _begun(self, experiment: str, name: str, config: Mapping[str, Any]) -> str:
        """Create a run with the configuration as its parameters; returns its id."""
        from mlflow.entities import Param

        run: str = self._client.create_run(experiment, run_name=name).info.run_id
        written(self._id, lambda temporary: temporary.write_text(run))
        flat = pd.json_normalize(dict(config)).astype(object).iloc[0]
        self._client.log_batch(run, params=[Param(str(key), str(value)) for key, value in flat.items()])
        return run

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values as one batch of metrics."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(FORBIDDEN.sub("-", name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics)

    def close(self, error: BaseException | None = None) -> None:
        """Set the status of the run: finished, failed, or killed by the user."""
        ended = "FINISHED" if error is None else "FAILED" if isinstance(error, Exception) else "KILLED"
        self._client.set_terminated(self._run, ended)


Sink = TensorBoard | MLflow
KNOWN: dict[str, type[Sink]] = {"tensorboard": TensorBoard, "mlflow": MLflow}


def make(names: Sequence[str], folder: Path, config: Mapping[str, Any], begin: int = 0) -> list[Sink]:
    """The sinks of these names, for a run that starts or resumes at step ``begin``."""
    check(names)
    try:
        return [KNOWN[name](folder, config, begin) for name in names]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'sinks=[{", ".join(names)}] needs the extra "sinks": pip install "gradscope-toolkit[sinks]".'
        ) from error


def check(names: Sequence[str]) -> None:
    """Raises ValueError if a name is unknown."""
    if unknown := [name for name in names if name not in KNOWN]:
        raise ValueError(f"sinks must be a list of {', '.join(KNOWN)}; got {unknown[0]!r}.")


def of_record(record: Record) -> dict[str, float]:
    """The numbers of a training record by name."""
    return {name: float(value) for name, value in record.items() if name != "step" and value is not None}


def of_frame(frame: pd.DataFrame) -> dict[str, float]:
    """The numbers of a monitor record by name: ``quantity/layer``, or ``log10_quantity/layer`` for coefficients."""
    rows = frame[["quantity", "layer", "value", "log10_value"]].itertuples(index=False)
    return dict(
        (f"log10_gsc/{layer}", log10_value) if quantity == "gsc" else (f"{quantity}/{layer}", value)
        for quantity, layer, value, log10_value in rows
    )
