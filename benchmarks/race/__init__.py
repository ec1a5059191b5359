"""Parts of the comparison with other tools: networks, contestants, errors and targets."""
