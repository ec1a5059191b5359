"""Gradient norms that a training logs, compared with the norm of the whole gradient."""
