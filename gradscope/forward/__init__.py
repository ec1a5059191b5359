"""One forward pass, recorded as a graph of layers."""
