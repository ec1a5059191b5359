"""One study per file or folder: `experiments.studies.NAME.STUDY`, an `experiments.evidence.study.Study`."""
