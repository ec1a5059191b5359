"""The residual stream: sums ``x + f(x)``, what is written into the stream, and which way gradients take."""
