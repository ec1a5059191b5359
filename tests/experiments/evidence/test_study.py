"""What holds for every study: its parts, its page, and the means that it quotes."""

import ast
import functools
import importlib
import inspect
import math
import re
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import yaml

from experiments import figures
from experiments.archive import reference
from experiments.evidence import study
from experiments.evidence.study import Claim
from experiments.reports import pages
from gradscope import frames
from gradscope.frames import observed
from tests.helpers import ROOT

STUDIES = study.names()


def written(name, collected, figures):
    """The page of a study."""
    asked = study.find(name)
    claims = decided(name) if collected is published(name) else asked.claims(collected)
    return pages.page(name, asked, collected, claims, figures)


@functools.cache
def published(name):
    return reference.load(ROOT / "results" / study.results(name))


@functools.cache
def decided(name):
    """The claims of a study about its published results."""
    return study.find(name).claims(published(name))


def shown(name):
    """The figures of a page, by name, and where it finds them."""
    text = (ROOT / "docs" / "studies" / f"{name}.md").read_text()
    return {Path(path).stem: path for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)}


def assert_same_text(written, computed):
    """The same words, and the same numbers but for a last digit: powers and sums round in their own way on each CPU."""
    number = r"-?\d+\.\d+(?:e[-+]\d+)?"
    assert re.split(number, written) == re.split(number, computed)
    pairs = zip(re.findall(number, written), re.findall(number, computed), strict=True)
    for ours, theirs in pairs:
        last_digit = 10.0 ** (Decimal(ours).as_tuple().exponent)
        assert abs(float(ours) - float(theirs)) < 1.01 * last_digit or max(map(abs, map(float, (ours, theirs)))) < 1e-12


def test_a_page_is_compared_digit_by_digit():
    assert_same_text("rate 1.071 (2.1e-08) of 8", "rate 1.072 (2.2e-08) of 8")
    for other in ("rate 1.073 (2.1e-08) of 8", "rate 1.071 (2.3e-08) of 8", "rate 1.071 (2.1e-08) of 9", "1.071"):
        with pytest.raises(AssertionError):
            assert_same_text("rate 1.071 (2.1e-08) of 8", other)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_keeps_its_contract(name):
    asked, collected = study.find(name), published(name)
    assert asked.question.endswith("?") and asked.method.strip() and asked.how_sure.strip() and asked.use.strip()
    assert not re.search(r"\d\.\d{2,}", asked.how_sure), "numbers of a page are read from the frame"
    claims, answer = decided(name), asked.answer(collected)
    assert all(isinstance(claim, Claim) and claim.holds in (True, False, None) for claim in claims)
    assert len({claim.says for claim in claims}) == len(claims) > 0
    assert all(re.search(r"\d", claim.because) for claim in claims), "a claim is decided by numbers"
    assert len(re.findall(r"[.!?](?=\s|$)", answer.strip())) <= 3, "an answer has at most three sentences"
    text = answer + "".join(claim.because for claim in claims)
    text += asked.details(collected) if asked.details else ""
    assert not re.search(r"\bnan\b", text)
    assert not re.search(r"\((\S+) to \1\)", text), "the ends of an interval are printed with digits that differ"
    for row in re.findall(r"^\|.*\|$", text, re.M):
        assert row.count("|") <= 8, "a table has at most seven columns"
    assert set(asked.captions) == set(shown(name)), "every figure of a page has a caption"


def test_a_study_has_one_name():
    """The five lists of studies agree. A configuration that is no study says so in its first comment."""
    files = {path.stem: path.read_text() for path in (ROOT / "conf" / "study").glob("*.yaml")}
    configured = {name for name, text in files.items() if "# Not a study" not in text}
    assert configured == set(STUDIES)
    assert {yaml.safe_load(files[name])["sweep"] for name in STUDIES} == set(map(study.results, STUDIES))
    for name in STUDIES:
        assert yaml.safe_load(files[name])["sweep"] == study.results(name)
    pages_of = {path.stem for path in (ROOT / "docs" / "studies").glob("*.md")} - {"README"}
    tests_of = {path.stem for path in (ROOT / "tests" / "experiments" / "studies").glob("test_study_*.py")}
    assert pages_of == set(STUDIES) and tests_of == {f"test_study_{name}" for name in STUDIES}
    published_sweeps = {path.parent.name for path in (ROOT / "results").glob("*/data.csv")}
    assert published_sweeps & set(STUDIES) == {name for name in STUDIES if study.find(name).results is None}
    assert published_sweeps <= set(files), "every sweep with reference results has a configuration"


def test_comparisons_with_a_bound_are_methods():
    files = (ROOT / "experiments" / "studies").rglob("*.py")
    assert not [path for path in files if "else False if" in path.read_text()]


def typed(source):
    """Numbers typed in the texts of a study: sizes, counts, and decimals of two digits or more."""
    texts_of = ("method", "how_sure", "use", "captions")
    named = [
        node
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.FunctionDef) and node.name in ("claims", "answer", "details"))
        or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").lower() in texts_of)
        or (isinstance(node, ast.keyword) and node.arg in texts_of)
    ]
    inside = [part for node in named for part in ast.walk(node)]
    forms = {id(part) for node in inside if isinstance(node, ast.FormattedValue) and node.format_spec
             for part in ast.walk(node.format_spec)}  # fmt: skip
    texts = [n.value for n in inside if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in forms]
    number = r"\d\.\d{2,}|\b(?:depth|width) \d+|\b\d+ (?:seeds|runs|samples|layers|steps|initializations)"
    return [found for text in texts for found in re.findall(number, re.sub(r"arXiv:\S+", "", text))]


def test_typed_numbers_are_found():
    texts = 'method=f"On 32 samples of depth {depth}, width 7, {x:.3f}, arXiv:1712.05577"'
    assert typed(f'def claims(): return "0.29"\nSTUDY = Study({texts})\n') == ["0.29", "32 samples", "width 7"]


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_types_no_numbers(name):
    assert not typed(inspect.getsource(importlib.import_module(f"{study.PACKAGE}.{name}")))


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_is_what_its_frame_says(name):
    """And so is every figure that it shows."""
    folder = ROOT / "docs" / "studies"
    text = (folder / f"{name}.md").read_text()
    drawn = shown(name)
    assert drawn and all((folder / path).is_file() for path in drawn.values())
    assert_same_text(text, written(name, published(name), list(drawn.items())))


def test_the_index_counts_the_claims():
    text = (ROOT / "docs" / "studies" / "README.md").read_text()
    asked = {name: study.find(name) for name in STUDIES}
    studies = {name: (one.question, one.answer(published(name)).strip(), decided(name)) for name, one in asked.items()}
    assert_same_text(text, pages.index(studies))
    for name, (question, _, claims) in studies.items():
        verdicts = [claim.verdict for claim in claims]
        counts = " | ".join(str(verdicts.count(word)) for word in study.VERDICTS)
        assert f"**[{question}]({name}.md)** " in text and f"| [{name}]({name}.md) | {counts} |" in text


def test_the_numbers_of_a_page_follow_the_frame():
    collected = published("architectures")
    frame = collected.frame.copy()
    frame["log10_value"] = frame["log10_value"].where(frame["quantity"] != "gsc", 0.0)
    frame["value"] = frame["value"].where(frame["quantity"] != "gsc", 1.0)
    text = written("architectures", replace(collected, frame=frame), [])
    explodes, neither = re.search(r"\*X\* explodes\*\*(.*?)\*X\* neither explodes(.*?)\n\n\*\*", text, re.S).groups()
    assert "| selu | contradicted | 1 " in explodes and "| relu | supported | 1 " in neither


def test_all_studies_are_those_with_reference_results():
    each = figures.every(figures.Config(study="all", reference=str(ROOT / "results")))
    folders = {path.parent.name for path in (ROOT / "results").glob("*/data.csv")}
    assert set(each) == {study.reader(name) for name in folders} | set(STUDIES)
    assert study.reader("alexnet") == "trained_alexnet" and study.reader("phase_diagram") == "phase_diagram"
    assert {cfg.results for cfg in each.values()} == {""}  # never the runs of this machine
    with pytest.raises(ValueError, match="publish="):
        figures.main(figures.Config(study="all", publish=True))


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_draws_from_its_frame_alone(name, monkeypatch):
    import torch

    monkeypatch.setattr(torch.nn.Module, "__call__", None)  # whatever it measures would fail
    drawn = study.find(name).figures(published(name))
    assert drawn
    for figure in drawn.values():
        assert figure.axes
        plt.close(figure)


def test_a_sweep_without_a_study():
    assert study.find("phase_diagram") is None and study.results("phase_diagram") == "phase_diagram"
    everything = published("phase_diagram")
    assert study.condensed("phase_diagram", everything) is everything
    assert study.condensed("architectures", everything) is everything


def test_observed_numbers_are_rows_of_a_tidy_frame(tmp_path):
    frame = observed(
        "loss", [0.5, -1.0, math.inf], stderr=[0.1, 0, 0], index=[0, 1, 2], step=[0, 10, 20], num_samples=7
    )
    frames.check(frame)
    assert frame["step"].tolist() == [0, 10, 20]
    assert frame["log10_value"].isna().all()
    assert frame["stderr_sample"].tolist() == [0.1, 0, 0]
    saved = frames.load(frames.save(frame, tmp_path / "x.parquet"))
    pd.testing.assert_frame_equal(saved, frame)


def test_numbers_without_a_logarithm_survive_publishing(tmp_path):
    rows = observed("loss", [0.123456789012, -3e20], stderr=[0.0123, 0.0], step=[1, 2])
    frame = pd.concat([rows, published("architectures").frame.head(3)[list(frames.COLUMNS)]], ignore_index=True)
    frame = frame.assign(model="mlp", seed=0)
    reference.save(replace(published("architectures"), frame=frame, metrics=None), tmp_path)
    again = reference.load(tmp_path).frame
    np.testing.assert_allclose(again["value"], frame["value"], rtol=1.2e-4)  # of log10 four decimals are kept
    np.testing.assert_allclose(again["value"].head(2), frame["value"].head(2), rtol=1e-9)
    np.testing.assert_allclose(again["stderr_sample"].head(2), [0.012, 0.0])
    assert again["step"].head(2).tolist() == [1, 2]
