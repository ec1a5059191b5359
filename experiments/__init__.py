"""Experiments.  Each study answers one question.  Only experiments use Hydra; the package gradscope does not."""

import os

from experiments.program import PARENT, TORCHRUN, end_with, end_with_torchrun

# A worker process still has to import torch, and the process that launched it may be killed meanwhile.
if PARENT in os.environ:
    end_with(int(os.environ.pop(PARENT)))
if TORCHRUN in os.environ:
    end_with_torchrun()
