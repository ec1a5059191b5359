"""Hydra looks for plugins in this place only; what this one does is in `experiments.composing`."""

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ComposedSweeper(BasicSweeper):
    """Hydra's own sweeper, whose launcher composes configurations through `experiments.composing.Composer`."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """As of Hydra's plugins."""
        from experiments.composing import Composer

        context = HydraContext(config_loader=Composer(hydra_context.config_loader), callbacks=hydra_context.callbacks)
        super().setup(hydra_context=context, task_function=task_function, config=config)
