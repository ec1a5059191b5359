"""`capture(model, data)`: the Jacobians between the layers of one forward pass."""
