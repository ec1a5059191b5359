"""The command ``gradscope``: measure a model of one's own, or run the experiments, from any folder."""
