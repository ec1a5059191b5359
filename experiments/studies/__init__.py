"""One question a file: see `experiments.study.Study`."""
