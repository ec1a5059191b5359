"""Which position, which residual block and which attention head: quantities of transformers."""
