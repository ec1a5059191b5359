"""Runs of a sweep in several processes of this machine, through joblib.

Hydra's own joblib launcher sends the configuration of the sweep and all that Hydra knows with every run, sets Hydra up
anew for it, and has the run's configuration sent back, which takes several times as long as a small measurement.  Here
a process is set up once.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import cloudpickle
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_joblib_launcher._core import process_joblib_cfg
from omegaconf import DictConfig, open_dict

# In a worker: what it was sent last, by its name.
_here: dict[str, Shared] = {}


@dataclass(frozen=True)
class Shared:
    """What all runs of a launch have in common."""

    context: HydraContext
    config: DictConfig
    task: TaskFunction

    def sent(self) -> Sent:
        """To workers, with the state of Hydra in this process."""
        return Sent(uuid4().hex, cloudpickle.dumps((self, Singleton.get_state())))

    def carry_out(self, number: int, overrides: Sequence[str]) -> JobReturn:
        """One run, as Hydra's launchers do it; returned without configurations, which nobody asks for."""
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.id = f"{config.hydra.job.name}_{number}"
            config.hydra.job.num = number
        HydraConfig.instance().set_config(config)
        returned = run_job(
            hydra_context=self.context,
            task_function=self.task,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        returned.cfg = returned.hydra_cfg = None
        return returned


@dataclass(frozen=True)
class Sent:
    """A `Shared` on its way, pickled once for all runs."""

    name: str
    content: bytes

    def carry_out(self, number: int, overrides: Sequence[str]) -> JobReturn:
        """One run in this process, which is set up by the first."""
        if self.name not in _here:
            _here.clear()
            setup_globals()
            shared, state = pickle.loads(self.content)
            Singleton.set_state(state)
            _here[self.name] = shared
        return _here[self.name].carry_out(number, overrides)


def launch(shared: Shared, options: dict[str, Any], runs: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Carry out runs, given by their overrides and numbered from ``first``.  ``options``: of `joblib.Parallel`."""
    from joblib import Parallel, delayed

    options = options | {"backend": "loky"}  # Hydra's state is that of a process, so threads cannot be
    process_joblib_cfg(options)
    sent = shared.sent()
    returns: list[JobReturn] = Parallel(**options)(
        delayed(sent.carry_out)(number, overrides) for number, overrides in enumerate(runs, first)
    )
    return returns
