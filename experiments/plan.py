"""What a launch of a sweep sets out to do: its runs, each once, with the digests of their configurations."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from experiments import launches
from experiments.guard import ON_ERROR
from experiments.run import digest


@dataclass(frozen=True)
class Planned:
    """A run that a launch sets out to do."""

    overrides: tuple[str, ...]
    sweep: Path
    digest: str
    rerun: bool


def place(config: DictConfig) -> Path:
    """The folder of a sweep.

    Raises:
        SystemExit: It depends on what is known of a single run only.
    """
    try:
        return Path(config.results) / config.sweep
    except OmegaConfBaseException as error:
        sys.exit(_unresolved(error))


def planned(jobs: Sequence[Sequence[str]], master: DictConfig, loader: ConfigLoader) -> list[Planned]:
    """The runs with these overrides; composing them all shows at once whether Hydra can.

    Raises:
        ConfigCompositionException: It cannot.
        SystemExit: There are none; a value cannot be resolved; a name or ``on_error`` is wrong.
    """
    if not jobs:
        sys.exit("The sweep has no runs: a glob(...) that matches nothing, or a range(...) without numbers?")
    runs: dict[tuple[Path, str], Planned] = {}
    for job in jobs:
        try:
            run = _of_configuration(tuple(job), loader.load_sweep_config(master, list(job)))
        except OmegaConfBaseException as error:
            sys.exit(f"{_unresolved(error)} ({' '.join(job)})")
        except ValueError as error:
            sys.exit(f"Error: {error}")
        runs.setdefault((run.sweep, run.digest), run)
    return list(runs.values())


def _of_configuration(job: tuple[str, ...], config: DictConfig) -> Planned:
    try:
        key = digest(config)
    except InterpolationResolutionError:  # ${hydra:...} asks Hydra, which takes ten times as long to tell
        hydra, before = HydraConfig.instance(), HydraConfig.instance().cfg
        hydra.set_config(config)
        try:
            key = digest(config)
        finally:
            hydra.cfg = before
    launches.check_name(config.sweep)
    if config.on_error not in ON_ERROR:
        raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, got {config.on_error!r}.")
    return Planned(job, Path(config.results) / config.sweep, key, config.rerun)


def _unresolved(error: OmegaConfBaseException) -> str:
    return f"Error: {error.full_key}: {str(error).splitlines()[0]}"
