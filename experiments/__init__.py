"""Experiments.  Each study answers one question.  Only experiments use Hydra; the package gradscope does not."""
