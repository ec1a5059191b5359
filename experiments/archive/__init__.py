"""Collect the results of runs in tables, store reference results, label networks, and compare tables."""
