"""Hydra looks for plugins in this place only; what this one does is in `experiments.runs.workers`."""

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher


class ProcessesLauncher(JoblibLauncher):
    """Hydra's joblib launcher, whose processes are set up once instead of for every run."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """As of Hydra's plugins."""
        from experiments.runs.workers import Shared, launch

        assert self.hydra_context is not None and self.config is not None and self.task_function is not None
        shared = Shared(self.hydra_context, self.config, self.task_function)
        return launch(shared, self.joblib, job_overrides, initial_job_idx)
