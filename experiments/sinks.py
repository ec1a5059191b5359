"""Where records go besides the run folder: TensorBoard and MLflow, both off unless asked for."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from experiments.records import Record

# Quantities whose logarithm is what one looks at.
LOGARITHMIC = ("gsc",)


class Sink(Protocol):
    """Takes named numbers of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record them."""

    def close(self) -> None:
        """No more will come."""


class TensorBoard:
    """Event files in ``folder/tensorboard``."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar each."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class MLflow:
    """A run of the experiment named like the sweep's folder, in the local store ``mlruns`` beside the run folders."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        # MLflow asks for this word before it writes plain files, which need no database.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(tracking_uri=(folder.parent / "mlruns").resolve().as_uri())
        sweep = folder.parent.name
        known = self._client.get_experiment_by_name(sweep)
        experiment = known.experiment_id if known else self._client.create_experiment(sweep)
        self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id
        params = [Param(key, str(value)) for key, value in _flat(config).items()]
        self._client.log_batch(self._run, params=params)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One batch of metrics."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._run, [Metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        """The run is finished."""
        self._client.set_terminated(self._run)


KNOWN: dict[str, type[TensorBoard] | type[MLflow]] = {"tensorboard": TensorBoard, "mlflow": MLflow}


def make(names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> list[Sink]:
    """The sinks of these names, for a run.

    Raises:
        ValueError: An unknown name.
        ModuleNotFoundError: Its package is not installed.
    """
    made: list[Sink] = []
    for name in names:
        if name not in KNOWN:
            raise ValueError(f"sinks must be among {', '.join(KNOWN)}; got {name!r}.")
        try:
            made.append(KNOWN[name](folder, config))
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f'sinks=[{name}] needs a package of its own: pip install "gradscope-toolkit[sinks]".'
            ) from error
    return made


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
