"""Hydra looks for plugins in this place only; what this one does is in `experiments.runs.plan` and `.sweeping`."""

import itertools
import sys
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ComposedSweeper(BasicSweeper):
    """Hydra's own sweeper, whose launcher composes configurations through `experiments.runs.plan.Composer`, and whose
    runs are those of an `experiments.runs.sweep.Sweep`."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """As of Hydra's plugins."""
        from experiments.runs.plan import Composer

        context = HydraContext(config_loader=Composer(hydra_context.config_loader), callbacks=hydra_context.callbacks)
        super().setup(hydra_context=context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> Any:
        """As of Hydra's plugins; every run is looked at in the end, and exit codes say whether all are done."""
        from experiments.runs.sweep import Sweep
        from experiments.runs.workers import most_at_once, num_processes

        assert self.hydra_context is not None and self.config is not None and self.launcher is not None
        loader = self.hydra_context.config_loader
        parser = OverridesParser.create(config_loader=loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        jobs = list(itertools.chain.from_iterable(self.split_arguments(overrides, None)))
        if self.max_batch_size is not None and not (isinstance(self.max_batch_size, int) and self.max_batch_size > 0):
            sys.exit(f"Error: hydra.sweeper.max_batch_size must be a positive number, got {self.max_batch_size!r}.")
        try:
            num_processes()
        except ValueError as error:
            sys.exit(f"Error: {error}")
        at_once = self.max_batch_size or most_at_once(self.launcher)
        Sweep(self.config, self.launcher, at_once).carry_out(jobs, loader)
