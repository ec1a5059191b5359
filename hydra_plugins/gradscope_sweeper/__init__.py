"""Hydra finds the sweeper of the experiments here."""
