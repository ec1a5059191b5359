"""Cotangents pulled back through a recorded forward pass."""
