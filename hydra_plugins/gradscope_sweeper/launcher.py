"""Hydra finds plugins only in this package; the code of this one is in `experiments.runs.workers`."""

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher


class ProcessesLauncher(JoblibLauncher):
    """Hydra's joblib launcher, except that its processes are set up once instead of for every run."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Called by the sweeper with the overrides of all runs."""
        from experiments.runs.workers import Setup, launch

        assert self.hydra_context is not None and self.config is not None and self.task_function is not None
        setup = Setup(self.hydra_context, self.config, self.task_function)
        return launch(setup, self.joblib, job_overrides, initial_job_idx)
