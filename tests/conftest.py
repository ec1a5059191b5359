"""Settings of the whole suite."""

import os
import signal

import torch

# One thread per process: small matrices do not gain from more, and the threads of two test processes on two cores would
# mostly wait for each other.  Child processes inherit the variable.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# Shells make background jobs ignore Ctrl-C, which would break the tests of it.
signal.signal(signal.SIGINT, signal.default_int_handler)
