"""The README's code runs, and its commands and links exist."""

import re

import matplotlib as mpl

from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()


def test_the_code_of_the_readme_runs(capsys):
    mpl.use("Agg")
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(code, names)
    names["test_gradients_neither_explode_nor_vanish"]()
    assert names["profile"].growth().verdict == "exploding"
    assert "exploding" in capsys.readouterr().out
    assert len(names["frame"]) == 51
    assert names["matrix"].log10_values.shape == (51, 51)


def test_the_loop_of_the_training_page_runs():
    mpl.use("Agg")
    names: dict = {}
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    exec(code[1], names)
    assert set(names["frame"]["step"]) == {0, 2}


def test_commands_and_links_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make (demo|test|setup)\b", README)) <= set(targets)
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / link).exists(), link
    for study in re.findall(r"study=(\w+)", README):
        assert (ROOT / "conf" / "study" / f"{study}.yaml").is_file() or study in ("mine", "all", "NAME")
