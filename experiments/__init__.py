"""Experiments: one question a file, readable top to bottom; the only place that knows Hydra."""
