"""How much of its depth a trained network uses."""
