"""What a launch of a sweep sets out to do: its runs, each once, with the digests of their configurations."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from experiments.runs import names
from experiments.runs.launches import ON_ERROR
from experiments.runs.names import digest

# Values that replace what was there; a mapping would be merged into the value of another run.
PLAIN = (ValueType.ELEMENT,)


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
    names.check_name(config.sweep)
    if config.on_error not in ON_ERROR:
        raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, got {config.on_error!r}.")
    return Planned(job, Path(config.results) / config.sweep, key, config.rerun)


def _unresolved(error: OmegaConfBaseException) -> str:
    return f"Error: {error.full_key}: {str(error).splitlines()[0]}"


class Composer(ConfigLoader):
    """A `ConfigLoader` that remembers, for each set of choices, the configuration of the first run that made them."""

    def __init__(self, loader: ConfigLoader) -> None:
        self.loader = loader
        self.known: dict[tuple[Any, ...], DictConfig] = {}
        self.groups: dict[str, bool] = {}

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """As Hydra composes it, or a copy of such a configuration with this run's values."""
        overrides = OverridesParser.create(config_loader=self.loader).parse_overrides(sweep_overrides)
        values = [override for override in overrides if self._is_value(override)]
        chosen = tuple(override.input_line for override in overrides if override not in values)
        key = (id(master_config), chosen, tuple(override.key_or_group for override in values))
        if key not in self.known:
            self.known[key] = self.loader.load_sweep_config(master_config, sweep_overrides)
            return copy.deepcopy(self.known[key])
        config = copy.deepcopy(self.known[key])
        try:
            for override in values:
                OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:  # a wrong type; Hydra says so in two lines
            return self.loader.load_sweep_config(master_config, sweep_overrides)
        with flag_override(config.hydra, ["struct", "readonly"], [False, False]):
            task = [override for override in overrides if not override.is_hydra_override()]
            config.hydra.overrides.task = [override.input_line for override in task]
            options = config.hydra.job.config.override_dirname
            config.hydra.job.override_dirname = get_overrides_dirname(
                task, options.exclude_keys, options.item_sep, options.kv_sep
            )
        return config

    def _is_value(self, override: Override) -> bool:
        """Whether it only gives a key that exists another plain value."""
        return (
            not (override.is_add() or override.is_force_add() or override.is_delete() or override.is_hydra_override())
            and override.package is None
            and override.value_type in PLAIN
            and not isinstance(override.value(), (dict, list))
            and not self._is_group(override.key_or_group)
        )

    def _is_group(self, name: str) -> bool:
        if name not in self.groups:  # Hydra reads its search path anew each time it is asked
            self.groups[name] = bool(self.loader.get_group_options(name))
        return self.groups[name]

    def __getstate__(self) -> dict[str, Any]:
        """A process that it is sent to begins anew."""
        return {"loader": self.loader, "known": {}, "groups": {}}

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Hydra's own."""
        return self.loader.load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)

    def get_search_path(self) -> Any:
        """Hydra's own."""
        return self.loader.get_search_path()

    def get_sources(self) -> Any:
        """Hydra's own."""
        return self.loader.get_sources()

    def list_groups(self, parent_name: str) -> list[str]:
        """Hydra's own."""
        return self.loader.list_groups(parent_name)

    def get_group_options(
        self,
        group_name: str,
        results_filter: ObjectType | None = ObjectType.CONFIG,
        config_name: str | None = None,
        overrides: list[str] | None = None,
    ) -> list[str]:
        """Hydra's own."""
        return self.loader.get_group_options(group_name, results_filter, config_name, overrides)

    def compute_defaults_list(self, config_name: str | None, overrides: list[str], run_mode: RunMode) -> Any:
        """Hydra's own."""
        return self.loader.compute_defaults_list(config_name, overrides, run_mode)
