"""Rows and tables of benchmark results, how times are taken, and where they come from."""
