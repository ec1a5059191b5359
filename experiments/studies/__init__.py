"""One question a file: see `experiments.evidence.study.Study`."""
