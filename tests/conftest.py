"""Settings of the whole suite."""

import os
import signal

import torch

# One thread each: small matrices gain nothing from more, and two test processes on two cores with torch's default
# number of threads wait for each other's threads most of the time.  Child processes inherit the variable.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# A shell ignores Ctrl-C on behalf of its jobs in the background, and tests of it would see nothing of it there.
signal.signal(signal.SIGINT, signal.default_int_handler)
