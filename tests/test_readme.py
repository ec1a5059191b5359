"""The code of the README and of the docs runs, its printed numbers are right, and commands and links exist."""

import re

import matplotlib as mpl
import pytest

from tests.helpers import ROOT

PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "results/README.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
NUMBER = r"-?\d+\.\d+"


def text(page):
    return (ROOT / page).read_text()


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE)


def names_of_headings(page):
    """As GitHub makes them from headings: lower case, hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", text(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(page, capsys, monkeypatch, tmp_path):
    """All blocks of a page, one after the other in one namespace; of what it shows, numbers are compared."""
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    if any("import transformers" in code for code in blocks(page, "python")):
        pytest.importorskip("transformers", reason="the extra 'zoo' is not installed")
    names: dict = {}
    for code in blocks(page, "python"):
        exec(code, names)
    for test in [value for name, value in names.items() if name.startswith("test_")]:
        test()
    shown = [float(number) for block in blocks(page, "text") for number in re.findall(NUMBER, block)]
    printed = [float(number) for number in re.findall(NUMBER, capsys.readouterr().out)]
    assert printed[: len(shown)] == pytest.approx(shown, rel=1e-3)
    assert bool(shown) == bool(blocks(page, "text"))


def test_the_readme_is_short_and_shows_output():
    assert len(text("README.md").splitlines()) <= 120
    assert blocks("README.md", "text")


@pytest.mark.parametrize("page", PAGES)
def test_links_commands_and_studies_exist(page):
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", text(page)):
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not heading or heading in names_of_headings(target.resolve().relative_to(ROOT)), link
    targets = re.findall(r"^(\w+):", text("Makefile"), re.MULTILINE)
    assert set(re.findall(r"\bmake (\w+)  ", text(page))) <= set(targets)
    for study in re.findall(r"\bstudy=(\w+)", text(page)):
        assert (ROOT / "conf" / "study" / f"{study}.yaml").is_file() or study in ("mine", "toy", "all", "NAME")
    for module in re.findall(r"python -m ((?:experiments|benchmarks)\.[a-z_]+)", text(page)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
