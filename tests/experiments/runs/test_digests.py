"""The digests of three configurations are fixed: a change would give every run on every disk another folder."""

import pytest

from experiments.runs import names
from tests.experiments.example_runs import composed


@pytest.mark.parametrize(
    "command, overrides, digest",
    [
        ("measure", [], "6c26176dedb5"),
        ("measure", ["study=architectures", "model=relu", "seed=0"], "c9c6084b9501"),  # the first run of the study
        ("train", [], "a283052efff3"),
    ],
)
def test_the_digests_of_three_configurations_do_not_change(command, overrides, digest):
    assert names.digest(composed(command, *overrides)) == digest
