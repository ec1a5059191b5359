"""The plan of a launch: its runs, each once, with the digests of their configurations."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from experiments.runs import names


@dataclass(frozen=True)
class Planned:
    """A run that a launch will execute, given by its overrides."""

    overrides: tuple[str, ...]
    sweep: Path
    digest: str
    rerun: bool


def place(config: DictConfig) -> Path:
    """The folder of a sweep.  Exits if the name of the sweep depends on values that only a single run has."""
    try:
        return Path(config.results) / config.sweep
    except OmegaConfBaseException as error:
        sys.exit(_unresolved(error))


def combinations(arguments: Sequence[str], loader: ConfigLoader) -> list[tuple[str, ...]]:
    """The overrides of every run of a sweep: all combinations of the values given for each key."""
    values: dict[str, list[str]] = {}
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(arguments)):
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
            if not values[key]:
                raise HydraException(f"{override.input_line} gives no value, so the sweep has no runs.")
        else:
            raise HydraException(f"{override.input_line}: intervals need a sweeper that searches, such as Optuna's.")
    return list(itertools.product(*values.values()))


def planned(jobs: Sequence[Sequence[str]], master: DictConfig, loader: ConfigLoader) -> list[Planned]:
    """The runs with these overrides, each once.  Exits if Hydra cannot compose or resolve a run's configuration."""
    runs: dict[tuple[Path, str], Planned] = {}
    for job in jobs:
        try:
            run = _planned(tuple(job), loader.load_sweep_config(master, list(job)))
        except OmegaConfBaseException as error:
            sys.exit(f"{_unresolved(error)} ({' '.join(job)})")
        except ValueError as error:
            sys.exit(f"Error: {error}")
        runs.setdefault((run.sweep, run.digest), run)
    return list(runs.values())


def _planned(job: tuple[str, ...], config: DictConfig) -> Planned:
    try:
        key = names.digest(config)
    except InterpolationResolutionError:  # only ${hydra:...} needs this, which is slow
        hydra, before = HydraConfig.instance(), HydraConfig.instance().cfg
        hydra.set_config(config)
        try:
            key = names.digest(config)
        finally:
            hydra.cfg = before
    names.check(config)
    return Planned(job, Path(config.results) / config.sweep, key, config.rerun)


def _unresolved(error: OmegaConfBaseException) -> str:
    return f"Error: {error.full_key}: {str(error).splitlines()[0]}"


class Composer:
    """Hydra's `ConfigLoader`, but faster: runs that differ only in plain values share one composition."""

    def __init__(self, loader: ConfigLoader) -> None:
        self.loader = loader
        self.known: dict[tuple[Any, ...], DictConfig] = {}
        self.groups: dict[str, bool] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Composer, (self.loader,)

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The configuration of one run, equal to the one that Hydra composes."""
        overrides = OverridesParser.create(config_loader=self.loader).parse_overrides(sweep_overrides)
        values = [override for override in overrides if self._is_plain(override)]
        choices = tuple(override.input_line for override in overrides if override not in values)
        key = (id(master_config), choices, tuple(override.key_or_group for override in values))
        if key not in self.known:
            self.known[key] = self.loader.load_sweep_config(master_config, sweep_overrides)
            return copy.deepcopy(self.known[key])
        config = copy.deepcopy(self.known[key])
        try:
            for override in values:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:  # a value of a wrong type: Hydra's own error explains this
            return self.loader.load_sweep_config(master_config, sweep_overrides)
        task = [override for override in overrides if not override.is_hydra_override()]
        with flag_override(config.hydra, ["struct", "readonly"], [False, False]):
            config.hydra.overrides.task = [override.input_line for override in task]
            form = config.hydra.job.config.override_dirname
            lines = sorted(
                str(override.input_line) for override in task if override.key_or_group not in form.exclude_keys
            )
            config.hydra.job.override_dirname = form.item_sep.join(lines).replace("=", form.kv_sep)
        return config

    def _is_plain(self, override: Override) -> bool:
        """Whether the override sets an existing key to a value that is neither a list nor a mapping."""
        name = override.key_or_group
        if name not in self.groups:  # asked only once, because Hydra reads its search path for each answer
            self.groups[name] = bool(self.loader.get_group_options(name))
        return (
            not (override.is_add() or override.is_force_add() or override.is_delete() or override.is_hydra_override())
            and override.package is None
            and override.value_type is ValueType.ELEMENT
            and not isinstance(override.value(), (dict, list))
            and not self.groups[name]
        )
