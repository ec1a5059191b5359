"""The sweeper and the launcher of the experiments, in the package where Hydra looks for plugins."""
