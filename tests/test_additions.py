"""The table of CONTRIBUTING.md: a toy measure, model, data set and study, added to a copy of the repository.

What is added are whole files, and lines at the end of those files that the table names.
"""

import math
import shutil
import subprocess
import sys
from textwrap import dedent

import pandas as pd
import pytest

from tests.helpers import ROOT

DEPTH, SLOPE, RIGHT = 4, 3.0, 4.0

# Added files, and after "+" lines that are added to files of the repository.
MEASURE = {
    "gradscope/measures/toy.py": '''
        """The largest pre-activation."""

        from dataclasses import dataclass
        from typing import ClassVar

        from torch import Tensor

        from gradscope.estimates import Estimate
        from gradscope.measures.samples import sample_mean


        @dataclass(frozen=True)
        class LargestPreactivation:
            """Mean over samples of the largest pre-activation of a layer."""

            quantity: ClassVar[str] = "largest_preactivation"
            of: ClassVar[str] = "preactivations"

            def __call__(self, preactivations: Tensor) -> Estimate:
                return sample_mean(preactivations.flatten(1).amax(dim=1))
        ''',
    "+gradscope/measures/__init__.py": """
        from gradscope.measures.toy import LargestPreactivation

        __all__ += ["LargestPreactivation"]
        """,
    "+gradscope/measures/measuring.py": """
        from gradscope.measures import LargestPreactivation

        PREACTIVATION_MEASURES += (LargestPreactivation(),)
        """,
}
MODEL = {
    "gradscope/models/toy.py": '''
        """A network that stretches one of two features."""

        import torch
        from torch import nn


        class Toy(nn.Sequential):
            """x -> relu(diag(slope, 1) x), ``depth`` times."""

            def __init__(self, depth: int, slope: float):
                linears = [nn.Linear(2, 2, bias=False) for _ in range(depth)]
                for linear in linears:
                    linear.weight.data = torch.diag(torch.tensor([slope, 1.0]))
                super().__init__(*(module for linear in linears for module in (linear, nn.ReLU())))
        ''',
    "+gradscope/models/__init__.py": """
        from gradscope.models.toy import Toy

        __all__ += ["Toy"]
        """,
    "conf/model/toy.yaml": f"""
        _target_: gradscope.models.toy.Toy
        depth: {DEPTH}
        slope: {SLOPE}
        """,
}
DATA = {
    "+experiments/data/batches.py": '''
        def toy(batch_size: int, shape: tuple[int, ...], *, right: float, generator: torch.Generator) -> Tensor:
            """The same two features for every sample, (batch_size, 2)."""
            return torch.tensor([[1.0, right]]).repeat(batch_size, 1)
        ''',
    "+experiments/data/__init__.py": """
        from experiments.data.batches import toy

        __all__ += ["toy"]
        """,
    "conf/data/toy.yaml": f"""
        _target_: experiments.data.toy
        batch_size: 5
        right: {RIGHT}
        """,
}
STUDY = {
    "conf/study/toy.yaml": """
        # @package _global_
        defaults:
          - override /model: toy
          - override /data: toy

        sweep: toy
        statistics: [largest_preactivation]

        hydra:
          sweeper:
            params:
              seed: range(2)
              model.slope: 1,3
        """,
    "experiments/studies/toy.py": '''
        """Does a stretched feature explode?"""

        import matplotlib.pyplot as plt
        from matplotlib.figure import Figure

        from experiments.archive.tables import Collected
        from experiments.evidence.means import mean
        from experiments.evidence.study import Claim, Study

        LARGE = 0.5


        def total(collected: Collected, slope: float):
            frame = collected.frame
            rows = frame[(frame["quantity"] == "gsc") & (frame["index"] == 0) & (frame["slope"] == slope)]
            return mean(rows["log10_value"])


        def claims(collected: Collected) -> list[Claim]:
            """One claim that the data support, and one that they contradict."""
            one, three = total(collected, 1), total(collected, 3)
            return [
                Claim("Slope 3 explodes", three.low > LARGE, f"log10 GSC {three}"),
                Claim("Slope 1 explodes", one.low > LARGE, f"log10 GSC {one}"),
            ]


        def figures(collected: Collected) -> dict[str, Figure]:
            """GSC of both slopes."""
            figure, ax = plt.subplots()
            ax.plot([1, 3], [total(collected, slope).value for slope in (1, 3)])
            return {"toy": figure}


        def answer(collected: Collected) -> str:
            """The larger of the two."""
            return f"Yes, to log10 GSC = {total(collected, 3).value:.3f}."


        STUDY = Study(
            question="Does a stretched feature explode?",
            answer=answer,
            method="Depth {model.depth}, exact.",
            how_sure="Nothing here is random.",
            claims=claims,
            figures=figures,
            captions={"toy": "log10 GSC against the slope."},
        )
        ''',
}

# As ``python -m`` runs them, in one process, because importing torch takes longer than all of them.
COMMANDS = """
import runpy, sys
for command in ("measure -m study=toy", "collect sweep=toy", "figures study=toy publish=true"):
    sys.argv = ["", *command.split()[1:]]
    try:
        runpy.run_module(f"experiments.{command.split()[0]}", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        assert not ended.code, (command, ended.code)
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the repository's code with all additions, after the commands of the new study."""
    root = tmp_path_factory.mktemp("extended")
    for folder in ("gradscope", "experiments", "hydra_plugins", "conf"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in (MEASURE | MODEL | DATA | STUDY).items():
        with (root / path.lstrip("+")).open("a" if path.startswith("+") else "x") as file:
            file.write(("\n" if path.startswith("+") else "") + dedent(text).lstrip("\n"))
    ended = subprocess.run([sys.executable, "-c", COMMANDS], cwd=root, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return root


@pytest.fixture(scope="module")
def rows(extended):
    return pd.read_parquet(extended / "results" / "runs" / "toy" / "data")


@pytest.mark.slow
@pytest.mark.parametrize("slope", [1.0, SLOPE])
def test_coefficients_of_the_toy_model_on_the_toy_data_are_their_closed_form(rows, slope):
    """After j layers the features are (slope^j, right), and the Jacobian to the output is diag(slope^(L - j), 1)."""
    found = rows[(rows["quantity"] == "gsc") & (rows["slope"] == slope) & (rows["seed"] == 0)].set_index("layer")

    def squared(j):
        return slope ** (2 * j) + RIGHT**2

    for j, layer in enumerate(["input", *(str(2 * i + 1) for i in range(DEPTH))]):
        expected = (slope ** (2 * (DEPTH - j)) + 1) / 2 * squared(j) / squared(DEPTH)
        assert found["log10_value"][layer] == pytest.approx(math.log10(expected), abs=1e-6)
    assert set(found["num_probes"]) == {0} and set(rows["seed"]) == {0, 1}


@pytest.mark.slow
def test_the_toy_measure_is_a_quantity_of_the_frame(rows):
    found = rows[(rows["quantity"] == "largest_preactivation") & (rows["slope"] == SLOPE) & (rows["seed"] == 1)]
    values = found.sort_values("index")["value"].tolist()
    assert values == pytest.approx([max(SLOPE**j, RIGHT) for j in range(1, DEPTH + 1)])


@pytest.mark.slow
def test_the_toy_study_has_results_and_a_page_with_its_numbers(extended):
    page = (extended / "docs" / "studies" / "toy.md").read_text()
    expected = math.log10((SLOPE ** (2 * DEPTH) + 1) / 2 * (1 + RIGHT**2) / (SLOPE ** (2 * DEPTH) + RIGHT**2))
    assert f"GSC = {expected:.3f}" in page and f"Depth {DEPTH}" in page
    assert "supported" in page and "contradicted" in page
    assert (extended / "results" / "toy" / "toy.png").is_file()


def test_the_table_names_every_file_that_was_added_to():
    table = (ROOT / "CONTRIBUTING.md").read_text()
    for additions in (MEASURE, MODEL, DATA, STUDY):
        for path in additions:
            path = path.lstrip("+")
            assert path in table or path.rpartition("/")[0] + "/" in table.replace("toy", "NAME"), path
