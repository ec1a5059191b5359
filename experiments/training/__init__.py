"""The training loop of the reference workload, with its records and checkpoints."""
