"""What every page of a study has: its order, words, captions, and how to run it again."""

import pandas as pd
import pytest

from experiments.archive.tables import Collected
from experiments.evidence.study import Claim, Study
from experiments.reports import pages

FIGURES = [("first_one", "a/first_one.png"), ("second", "a/second.png")]


def collected(seconds=600.0, num_threads=1, gpu=None, metrics=None):
    hardware = {"machine": "x86_64", "cpu": "A CPU", "num_threads": num_threads, "gpu": gpu}
    config = {"model": {"depth": [10, 200, 50], "width": 64}, "measurement": {"learning_rate": 0.02}}
    manifest = {"runs": 4, "seconds": seconds, "hardware": hardware, "versions": {"torch": "2"}, "commit": "abc"}
    return Collected(pd.DataFrame({"seed": [0, 0, 1, 2]}), metrics, manifest | {"config": config})


CLAIMS = (Claim("claim 0", True, "1 is 1"),)


def asked(claims=CLAIMS, **parts):
    texts = {"question": "Is it so?", "use": "Do it.", "method": "It is measured.", "how_sure": "Quite."}
    functions = {"claims": lambda _: list(claims), "answer": lambda _: "The answer.", "figures": lambda _: {}}
    return Study(**texts | functions | parts)


def page(study, found=None):
    return pages.page("vanishing", study, found or collected(), study.claims(None), FIGURES)


def test_the_answer_comes_first_and_details_are_folded():
    text = page(asked(details=lambda _: "| a | table |"))
    parts = [
        "# Is it so?", "The answer.", "first_one.png", "## What to do", "Do it.", "## How it was found",
        "It is measured.", "Quite.", "<summary>1 claims: 1 supported</summary>", "claim 0", "| a | table |",
        "second.png", "**GSC**", "study=vanishing",
    ]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert text.count("<details>") == text.count("</details>") == 5
    assert "## What to do" not in page(asked(use="")) and "All results" not in page(asked())


def test_a_caption_is_shown_and_its_first_sentence_read():
    text = page(asked(captions={"first_one": "Lines fall. Each is a seed."}))
    assert "![Lines fall](a/first_one.png)\n\n*Lines fall. Each is a seed.*" in text
    assert "![second](a/second.png)\n\n*second*" in text


@pytest.mark.parametrize(
    ("seconds", "num_threads", "threads", "words"),
    [
        (600.0, 1, "1 thread per run", "about 5 minutes on two cores"),
        (600.0, 2, "2 threads per run", "about 10 minutes on two cores"),
        (600.0, [2, 1], "1 or 2 threads per run", "about 10 minutes on two cores"),
        (120.0, 1, "1 thread per run", "about 1 minute on two cores"),
        (40.0, 1, "1 thread per run", "less than a minute on two cores"),
    ],
)
def test_how_to_run_it_again_and_how_long_it_takes(seconds, num_threads, threads, words):
    text = page(asked(), collected(seconds, num_threads))
    assert "python -m experiments.measure -m study=vanishing launcher=processes\n" in text
    assert threads in text and f"The runs take {words}" in text
    trained = page(asked(), collected(seconds, num_threads, gpu="H100", metrics=pd.DataFrame()))
    assert "python -m experiments.train -m" in trained and "two cores" not in trained


def test_commits_of_runs_that_differ_are_listed():
    several = collected()
    several.manifest["commit"] = ["b" * 40, "a" * 40]
    assert "commits aaaaaaaaaa and bbbbbbbbbb." in page(asked(), several)


def test_numbers_of_the_method_are_those_of_the_configuration():
    method = "{num_seeds} seeds, depth {model.depth}, width {model.width}, rate {measurement.learning_rate}, R^{-l}"
    text = page(asked(method=method))
    assert "3 seeds, depth 10, 50 and 200, width 64, rate 0.02, R^{-l}" in text
    for field in ("model.nothing", "model.width.more", "nothing"):
        with pytest.raises(ValueError, match=f"no key '{field}'"):
            page(asked(how_sure=f"See {{{field}}}."))


def test_identities_are_counted_apart():
    claims = [
        Claim("a", True, "1"),
        Claim("b", True, "2", identity=True),
        Claim("c", False, "3", identity=True),
        Claim("d", None, "4"),
        Claim("e", None, "5", identity=True),
    ]
    assert [claim.verdict for claim in claims] == ["supported", "checked", "contradicted", "undecided", "undecided"]
    text = pages.index({"one": ("Is it so?", "Yes, 7 of 8.", claims)})
    assert "**[Is it so?](one.md)** Yes, 7 of 8." in text and "| [one](one.md) | 1 | 1 | 2 | 1 |" in text
    assert "- **checked**: b.\n  Measured: 2." in page(asked(claims)) and "*Checked*" in page(asked(claims))
    assert "*Checked*" not in page(asked())
