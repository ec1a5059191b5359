"""Optional destinations of a run's records besides its folder: TensorBoard, MLflow, wandb and trackio."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.training.records import Record
from gradscope.sinks import MLflow, Sinks, TensorBoard

# In the run folder: what names the run in MLflow, wandb and trackio.
MLFLOW_ID, TRACKED = "mlflow_run.txt", "{}_run.txt"


class Tracker:
    """A run of ``wandb`` or ``trackio``, whose project is named after the sweep's folder.

    What names the run (``key``: wandb's id, trackio's name) is kept in the run folder, and a resumed run continues it.
    """

    def __init__(self, package: str, key: str, folder: Path, config: Mapping[str, Any], begin: int) -> None:
        kept = folder / TRACKED.format(package)
        known = {key: kept.read_text()} if begin and kept.is_file() else {}
        self._run = importlib.import_module(package).init(
            **{"project": folder.parent.name, "name": folder.name, "config": dict(config)} | known,
            resume="allow" if known else "never",
        )
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(str(getattr(self._run, key)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step."""
        self._run.log(dict(values), step=step)

    def close(self, error: BaseException | None = None) -> None:
        """Finish the run."""
        self._run.finish()


def _mlflow(folder: Path, config: Mapping[str, Any], begin: int) -> MLflow:
    """A run in the local store ``mlruns`` beside the run folders; a resumed run continues its MLflow run."""
    store, id_file = folder.parent / "mlruns", folder / MLFLOW_ID
    return MLflow(store, folder.parent.name, name=folder.name, config=config, id_file=id_file)


# Name of a sink -> the package that it needs, and what makes it for (folder, configuration, first step) of a run.
KNOWN: dict[str, tuple[str, Callable[[Path, Mapping[str, Any], int], Any]]] = {
    "tensorboard": ("gradscope-toolkit[sinks]", lambda folder, _, begin: TensorBoard(folder / "tensorboard", begin)),
    "mlflow": ("gradscope-toolkit[sinks]", _mlflow),
    "wandb": ("wandb", lambda *run: Tracker("wandb", "id", *run)),
    "trackio": ("trackio", lambda *run: Tracker("trackio", "name", *run)),
}


def make(names: Sequence[str], folder: Path, config: Mapping[str, Any], begin: int = 0) -> Sinks:
    """The sinks of these names, for a run that starts or resumes at step ``begin``."""
    check(names)
    made = []
    for name in names:
        package, sink = KNOWN[name]
        try:
            made.append(sink(folder, config, begin))
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f'sinks=[{", ".join(names)}] needs a package that is missing: pip install "{package}".'
            ) from error
    return Sinks(made)


def check(names: Sequence[str]) -> None:
    """Raises ValueError if a name is unknown."""
    if unknown := [name for name in names if name not in KNOWN]:
        raise ValueError(f"sinks must be a list of {', '.join(KNOWN)}; got {unknown[0]!r}.")


def of_record(record: Record) -> dict[str, float]:
    """The numbers of a training record by name."""
    return {name: float(value) for name, value in record.items() if name != "step" and value is not None}
