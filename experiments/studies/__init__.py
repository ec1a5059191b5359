"""Each file or folder defines one study: `experiments.studies.NAME.STUDY`, an `experiments.evidence.study.Study`."""
