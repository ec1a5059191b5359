"""Hydra finds plugins only in this package; the code of this one is in `experiments.runs.plan` and `sweep`."""

import sys
from typing import Any, cast

from hydra.core.config_loader import ConfigLoader
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ComposedSweeper(Sweeper):
    """Runs all combinations of values, like Hydra's own sweeper, but as one `experiments.runs.sweep.Sweep`."""

    def __init__(self, max_batch_size: int | None, params: dict[str, str] | None = None) -> None:
        self.max_batch_size, self.params = max_batch_size, params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        from experiments.runs.plan import Composer

        self.loader = cast(ConfigLoader, Composer(hydra_context.config_loader))
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(config_loader=self.loader, callbacks=hydra_context.callbacks),
            task_function=task_function,
            config=config,
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Execute all runs; the exit code says whether all are done."""
        from experiments.runs import slurm
        from experiments.runs.plan import combinations
        from experiments.runs.sweep import Sweep
        from experiments.runs.workers import most_at_once, num_processes

        assert self.config is not None and self.launcher is not None
        jobs = combinations([*(f"{key}={value}" for key, value in self.params.items()), *arguments], self.loader)
        if self.max_batch_size is not None and not (isinstance(self.max_batch_size, int) and self.max_batch_size > 0):
            sys.exit(f"Error: hydra.sweeper.max_batch_size must be a positive number, got {self.max_batch_size!r}.")
        try:
            num_processes()
            slurm.check(self.launcher)
        except ValueError as error:
            sys.exit(f"Error: {error}")
        at_once = self.max_batch_size or most_at_once(self.launcher)
        Sweep(self.config, self.launcher, at_once).run(jobs, self.loader)
