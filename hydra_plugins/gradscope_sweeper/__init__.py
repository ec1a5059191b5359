"""Hydra finds the sweeper and the launcher of the experiments here."""
