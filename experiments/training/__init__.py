"""The training loop of the experiments, with its records and checkpoints."""
