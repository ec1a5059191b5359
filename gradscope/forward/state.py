"""Contexts that leave a model as it was, also after Ctrl-C, and a lock by which only one thread measures at a time."""

from __future__ import annotations

import random
import threading

import numpy as np
import torch

from gradscope.forward.interrupts import interruptible
from gradscope.forward.modules import Modules
from gradscope.forward.snapshot import Snapshot, cuda_devices, generator_states

# One measurement at a time in a process: threads share the model, the random state and the filters of warnings.
alone = threading.RLock()


class state_restored(interruptible):  # noqa: N801
    """Context in which a pass may change the modules; afterwards everything that a `Snapshot` holds is as before.

    The context is entered twice, as every `interruptible`: ``with alone, state_restored(modules) as state, state``.
    ``snapshot``: a snapshot of these modules, if nothing has changed them since.  Nested contexts may share it.

    Raises:
        RuntimeError: Another thread called a module that holds buffers, or changed a parameter (raised in this thread
            if autograd found the change).
        ValueError: The pass built new parameters.

    Cost: a copy of all buffers, and that of a `Snapshot`.
    """

    def __init__(self, modules: Modules, snapshot: Snapshot | None = None) -> None:
        self.modules, self.snapshot = modules, snapshot
        self.built: str | None = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if self.done:
            return
        super().__exit__(kind, error)
        if self.built is not None:
            raise ValueError(
                f"The model made {self.built!r} during the pass, so a measurement would choose its random weights: "
                "call the model once, model(x), before you measure it, so that it has all its parameters."
            )
        in_place = isinstance(error, RuntimeError) and "modified by an inplace operation" in str(error)
        if in_place and (name := self.kept.overwritten()) is not None:
            raise RuntimeError(
                f"Parameter {name!r} was changed during the measurement, by another thread or by the model: "
                "measure between two training steps, or measure a copy (copy.deepcopy(model))."
            ) from error

    def _keep(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.kept = self.snapshot or Snapshot(self.modules)
        self.inside = self.kept.active

    def _change(self) -> None:
        if not self.inside:
            self.kept.active = True
            self._replace_buffers()

    def _restore(self, kind: type[BaseException] | None) -> None:
        self.built = self.kept.restore(failed=kind is not None)
        self.kept.active = self.inside
        if self.inside:
            self._replace_buffers()

    def _replace_buffers(self) -> None:
        with torch.no_grad():
            self.kept.replace_buffers()


class same_draws(interruptible):  # noqa: N801
    """Context in which a model draws the same random numbers each time, such as dropout masks; restores the state.

    With ``modules=None``, which is for building a model, the generators of all CUDA devices are seeded.
    """

    def __init__(self, modules: Modules | None, seed: int = 0) -> None:
        self.modules, self.seed = modules, seed

    def _keep(self) -> None:
        self.before = list(generator_states(self.modules))

    def _change(self) -> None:
        devices = cuda_devices(self.modules)
        for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in devices)):
            generator.manual_seed(self.seed)
        random.seed(self.seed)
        np.random.seed(self.seed)  # noqa: NPY002 - models that draw from numpy may use its global generator

    def _restore(self, _: object) -> None:
        for restore, state in self.before:
            restore(state)
