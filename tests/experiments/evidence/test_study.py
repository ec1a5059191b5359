"""What holds for every study: its parts, its page, and the means that it quotes."""

import ast
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
from scipy import stats

from experiments import figures
from experiments.archive import reference
from experiments.evidence import study
from experiments.evidence.means import geometric_mean, mean
from experiments.evidence.study import Claim
from experiments.reports import pages
from gradscope import frames
from gradscope.frames import observed
from tests.helpers import ROOT

STUDIES = study.names()


def published(name):
    return reference.load(ROOT / "results" / study.results(name))


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
    asked = study.find(name)
    assert asked.QUESTION.endswith("?") and asked.METHOD.strip() and asked.HOW_SURE.strip()
    assert not re.search(r"\d\.\d{2,}", asked.HOW_SURE), "numbers of a page are read from the frame"
    settings = yaml.safe_load((ROOT / "conf" / "study" / f"{name}.yaml").read_text())
    assert settings["sweep"] == study.results(name)
    claims = asked.claims(published(name))
    assert all(isinstance(claim, Claim) and claim.holds in (True, False, None) for claim in claims)
    assert len({claim.says for claim in claims}) == len(claims) > 0
    assert all(re.search(r"\d", claim.because) for claim in claims), "a claim is decided by numbers"
    assert not re.search(r"\bnan\b", asked.answer(published(name)) + "".join(claim.because for claim in claims))
    assert set(getattr(asked, "CAPTIONS", {})) <= set(shown(name)), "a caption is of a figure of the page"


def typed(source):
    """Numbers that stand in the words of a study: sizes, counts, and decimals of two digits or more."""
    words = ("METHOD", "HOW_SURE", "CAPTIONS", "claims", "answer")
    named = [
        node
        for node in ast.parse(source).body
        if (isinstance(node, ast.FunctionDef) and node.name in words)
        or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in words)
    ]
    inside = [part for node in named for part in ast.walk(node)]
    forms = {id(part) for node in inside if isinstance(node, ast.FormattedValue) and node.format_spec
             for part in ast.walk(node.format_spec)}  # fmt: skip
    texts = [n.value for n in inside if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in forms]
    number = r"\d\.\d{2,}|\b(?:depth|width) \d+|\b\d+ (?:seeds|runs|samples|layers|steps|initializations)"
    return [found for text in texts for found in re.findall(number, re.sub(r"arXiv:\S+", "", text))]


def test_typed_numbers_are_found():
    source = (
        'METHOD = f"On 32 samples of depth {{d}}, width 7, {x:.3f}, arXiv:1712.05577"\ndef claims(): return "0.29"\n'
    )
    assert typed(source) == ["32 samples", "width 7", "0.29"]


@pytest.mark.parametrize("name", [name for name in STUDIES if "{num_seeds}" in study.find(name).METHOD])
def test_a_study_that_fills_numbers_in_types_none(name):
    assert not typed(inspect.getsource(study.find(name)))


@pytest.mark.parametrize("name", STUDIES)
def test_the_page_is_what_its_frame_says(name):
    """And so is every figure that it shows."""
    folder = ROOT / "docs" / "studies"
    text = (folder / f"{name}.md").read_text()
    drawn = shown(name)
    assert drawn and all((folder / path).is_file() for path in drawn.values())
    assert_same_text(text, pages.page(name, study.find(name), published(name), list(drawn.items())))


def test_the_index_counts_the_claims():
    text = (ROOT / "docs" / "studies" / "README.md").read_text()
    studies = {name: (study.find(name), published(name)) for name in STUDIES}
    assert_same_text(text, pages.index(studies))
    for name, (asked, collected) in studies.items():
        verdicts = [claim.verdict for claim in asked.claims(collected)]
        counts = " | ".join(str(verdicts.count(word)) for word in study.VERDICTS)
        assert f"| [{name}]({name}.md) | {asked.QUESTION} | {counts} |" in text


def test_the_numbers_of_a_page_follow_the_frame(tmp_path):
    asked, collected = study.find("architectures"), published("architectures")
    frame = collected.frame.copy()
    frame["log10_value"] = frame["log10_value"].where(frame["quantity"] != "gsc", 0.0)
    frame["value"] = frame["value"].where(frame["quantity"] != "gsc", 1.0)
    path = pages.write("architectures", asked, replace(collected, frame=frame), [], tmp_path)
    text = path.read_text()
    assert "| selu explodes | **contradicted** | rate 1.000 (1.000 to 1.000) a layer, mean field" in text
    assert "**supported**" in text.split("| relu neither explodes")[1].splitlines()[0]


def test_all_studies_are_those_with_reference_results(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(figures, "_make", lambda cfg: made.append((cfg.study, cfg.results)))
    figures.main(figures.Config(study="all", reference=str(ROOT / "results"), pages=str(tmp_path)))
    folders = {path.parent.name for path in (ROOT / "results").glob("*/data.csv")}
    assert {name for name, _ in made} == {study.reader(name) for name in folders} | set(STUDIES)
    assert study.reader("alexnet") == "trained_alexnet" and study.reader("phase_diagram") == "phase_diagram"
    assert {results for _, results in made} == {""}  # never the runs of this machine
    with pytest.raises(ValueError, match="study=all draws the reference results; sweep="):
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


def test_a_study_without_a_module_is_none():
    assert study.find("no_such_study") is None
    assert study.results("phase_diagram") == "phase_diagram"
    assert len(inspect.signature(study.find("architectures").claims).parameters) == 1


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


def test_a_mean_has_the_interval_of_student(monkeypatch):
    values = [1.0, 2.0, 4.0]
    found = mean(values)
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem(values))
    assert (found.value, found.low, found.high, found.num) == pytest.approx((7 / 3, low, high, 3))
    assert f"{mean([1.5, 1.5]):.2f}" == "1.50 (1.50 to 1.50)"
    assert f"{mean([1.5]):.1f}" == "1.5 (one seed)"
    wider = mean(values, comparisons=4)
    low, high = stats.t.interval(1 - 0.05 / 4, 2, loc=7 / 3, scale=stats.sem(values))
    assert (wider.value, wider.low, wider.high) == pytest.approx((7 / 3, low, high))
    assert geometric_mean([1.0, 10.0], comparisons=4).low < geometric_mean([1.0, 10.0]).low
    logarithmic = geometric_mean([1.0, 10.0, 100.0])
    assert logarithmic.value == pytest.approx(10.0)
    assert math.log10(logarithmic.high) - 1 == pytest.approx(stats.t.ppf(0.975, 2) / math.sqrt(3))
    with pytest.raises(ValueError, match=r"A mean needs numbers, got \[nan\]"):
        mean([math.nan])
    with pytest.raises(ValueError, match=r"needs positive numbers, got \[0.0, 1.0\]"):
        geometric_mean([0.0, 1.0])
