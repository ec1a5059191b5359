"""Experiments: one question per file, readable from top to bottom.  The package gradscope does not use Hydra."""
