"""Sinks that write event files of TensorBoard, or runs of MLflow; both need the extra ``sinks``."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd

from gradscope.choices import PathLike, checked
from gradscope.files import written
from gradscope.sinks.delivery import Values, allowed

MOST_METRICS, MOST_PARAMS = 1000, 100  # that MLflow accepts at once
_numbers = itertools.count()  # distinguish the event files of one process


@checked
class TensorBoard:
    """Writes scalars to an event file in ``folder``; each record is on disk when `write` returns.

    Arguments:
        folder: The folder that ``tensorboard --logdir`` shows.
        begin: The step at which a run begins or resumes.  TensorBoard then discards the values in earlier files of the
            folder for this step and later ones.  If None, all values are kept.

    Raises:
        ModuleNotFoundError: The package ``tensorboard`` is missing.

    >>> import tempfile, gradscope as gs
    >>> sink = gs.sinks.TensorBoard(tempfile.mkdtemp())
    >>> sink.write(3, {"loss": 0.5})
    >>> sink.close()
    """

    def __init__(self, folder: PathLike, begin: int | None = None) -> None:
        import tensorboard.summary.writer.record_writer  # noqa: F401 - a missing package is reported before training

        self.folder, self.begin = Path(folder), begin
        self._file: BinaryIO | None = None

    def write(self, step: int, values: Values) -> None:
        """Write one scalar per value, as one event.

        Raises:
            OSError: The event could not be written.  The next call begins a new file, because the present one may end
                in the middle of the event.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        events = [Event(step=int(step), summary=summary)]
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            place = f"{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
            self._file = (self.folder / f"events.out.tfevents.{place}").open("xb")
            if self.begin is not None:
                events.insert(0, Event(step=self.begin, session_log=SessionLog(status=SessionLog.START)))
            events.insert(0, Event(file_version="brain.Event:2"))
        try:
            for event in events:
                event.wall_time = time.time()
                RecordWriter(self._file).write(event.SerializeToString())
            self._file.flush()
        except OSError:
            self.begin = None  # the next file must not discard what this one holds
            with contextlib.suppress(OSError):
                self.close()
            raise

    def close(self, error: BaseException | None = None) -> None:
        """Close the event file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


@checked
class MLflow:
    """Writes metrics to a run of MLflow, which is created together with this object.

    Arguments:
        store: A folder for a local store, or the URI of a tracking server.
        experiment: Name of the experiment, which is created if it does not exist.
        name: Name of the run.
        config: Parameters of the run; nested names are joined by dots.
        id_file: File that keeps the id of the run.  If the file exists, its run is continued.

    MLflow cannot delete values.  If a step is run again after an interruption, the history has its old and new value.
    To write to the active run of ``mlflow.start_run``, give the module mlflow itself as a sink.

    Raises:
        ModuleNotFoundError: The package ``mlflow-skinny`` or ``filelock`` is missing.

    >>> import tempfile, gradscope as gs
    >>> sink = gs.sinks.MLflow(tempfile.mkdtemp(), "mine", config={"lr": 0.1})
    >>> sink.write(3, {"loss": 0.5})
    >>> sink.close()
    """

    def __init__(
        self,
        store: str | Path = "mlruns",
        experiment: str = "gradscope",
        *,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        id_file: Path | None = None,
    ) -> None:
        # MLflow requires this variable before it writes to plain files instead of a database.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from filelock import FileLock
        from mlflow import MlflowClient

        self._id = id_file
        local = None if "://" in str(store) else Path(store)
        uri = str(store) if local is None else local.resolve().as_uri()
        # Without the lock, two processes could both create the store or the experiment.
        with contextlib.nullcontext() if local is None else FileLock(local.with_suffix(".lock")):
            self._client = MlflowClient(tracking_uri=uri)
            known = self._client.get_experiment_by_name(experiment)
            number = known.experiment_id if known else self._client.create_experiment(experiment)
        self._run = self._continued() or self._begun(number, name, config or {})

    def _continued(self) -> str | None:
        """The run with the id in the file, set to running; None if there is no id or no such run."""
        from mlflow.exceptions import MlflowException

        if self._id is None or not self._id.is_file():
            return None
        try:
            run = self._id.read_text().strip()
            self._client.update_run(run, status="RUNNING")
        except MlflowException:
            return None
        return run

    def _begun(self, experiment: str, name: str | None, config: Mapping[str, Any]) -> str:
        """Create a run with the configuration as its parameters; returns its id."""
        from mlflow.entities import Param

        run: str = self._client.create_run(experiment, run_name=name).info.run_id
        if self._id is not None:
            written(self._id, lambda temporary: temporary.write_text(run))
        flat = pd.json_normalize(dict(config)).astype(object)
        params = [Param(str(key), str(column.iloc[0])) for key, column in flat.items()]
        for begin in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(run, params=params[begin : begin + MOST_PARAMS])
        return run

    def write(self, step: int, values: Values) -> None:
        """Log the values of a step as metrics."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value in allowed(values).items()]
        for begin in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._run, metrics[begin : begin + MOST_METRICS])

    def close(self, error: BaseException | None = None) -> None:
        """Set the status of the run: finished, or after an ``error`` failed, or killed by the user."""
        ended = "FINISHED" if error is None else "FAILED" if isinstance(error, Exception) else "KILLED"
        self._client.set_terminated(self._run, ended)
