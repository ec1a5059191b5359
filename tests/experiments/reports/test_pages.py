"""What every page of a study has: its order, words, captions, and how to run it again."""

from types import SimpleNamespace

import pandas as pd
import pytest

from experiments.archive.tables import Collected
from experiments.evidence.study import Claim
from experiments.reports import pages

FIGURES = [("first_one", "a/first_one.png"), ("second", "a/second.png")]


def collected(seconds=600.0, num_threads=1, gpu=None, metrics=None):
    hardware = {"machine": "x86_64", "cpu": "A CPU", "num_threads": num_threads, "gpu": gpu}
    config = {"model": {"depth": [10, 200, 50], "width": 64}, "measurement": {"learning_rate": 0.02}}
    manifest = {"runs": 4, "seconds": seconds, "hardware": hardware, "versions": {"torch": "2"}, "commit": "abc"}
    return Collected(pd.DataFrame({"seed": [0, 0, 1, 2]}), metrics, manifest | {"config": config})


def asked(num_claims=2, **attributes):
    parts = {"QUESTION": "Is it so?", "METHOD": "It is measured.", "HOW_SURE": "Quite."}
    made = [Claim(f"claim {number}", True, "1 is 1") for number in range(num_claims)]
    return SimpleNamespace(**parts | {"claims": lambda _: made, "answer": lambda _: "The answer."} | attributes)


def page(study, found=None):
    return pages.page("vanishing", study, found or collected(), FIGURES)


def order(text, *parts):
    places = [text.index(part) for part in parts]
    return places == sorted(places)


def test_the_answer_and_the_main_figure_come_first():
    few, many = page(asked(pages.FEW_CLAIMS)), page(asked(pages.FEW_CLAIMS + 1))
    assert order(
        few, "# Is it so?", "The answer.", "**GSC**", "| claim 0 |", "first_one.png", "## Method", "second.png"
    )
    assert order(many, "The answer.", "first_one.png", "## Method", "second.png", "## Claims", "| claim 0 |", "Quite.")
    assert order(many, "## How sure", "## Run it again") and "## Claims" not in few


def test_a_caption_is_shown_and_its_first_sentence_read():
    text = page(asked(CAPTIONS={"first_one": "Lines fall. Each is a seed."}))
    assert "![Lines fall](a/first_one.png)\n\n*Lines fall. Each is a seed.*" in text
    assert "![second](a/second.png)\n\n*second*" in text
    assert "![first one](a/first_one.png)" in page(asked())


@pytest.mark.parametrize(
    ("seconds", "num_threads", "threads", "words"),
    [
        (600.0, 1, "1 thread a run", "about 5 minutes on two cores"),
        (600.0, 2, "2 threads a run", "about 10 minutes on two cores"),
        (600.0, [2, 1], "1 or 2 threads a run", "about 10 minutes on two cores"),
        (120.0, 1, "1 thread a run", "about 1 minute on two cores"),
        (40.0, 1, "1 thread a run", "less than a minute on two cores"),
    ],
)
def test_how_to_run_it_again_and_how_long_it_takes(seconds, num_threads, threads, words):
    text = page(asked(), collected(seconds, num_threads))
    assert "python -m experiments.measure -m study=vanishing launcher=processes\n" in text
    assert threads in text and f"This takes {words}" in text
    trained = page(asked(), collected(seconds, num_threads, gpu="H100", metrics=pd.DataFrame()))
    assert "python -m experiments.train -m" in trained and "two cores" not in trained


def test_numbers_of_the_method_are_those_of_the_configuration():
    method = "{num_seeds} seeds, depth {model.depth}, width {model.width}, rate {measurement.learning_rate}, R^{-l}"
    text = page(asked(METHOD=method))
    assert "3 seeds, depth 10, 50 and 200, width 64, rate 0.02, R^{-l}" in text
    for field in ("model.nothing", "model.width.more", "nothing"):
        with pytest.raises(ValueError, match=f"no key '{field}', which the text of a study names"):
            page(asked(HOW_SURE=f"See {{{field}}}."))


def test_identities_are_counted_apart():
    claims = [
        Claim("a", True, "1"),
        Claim("b", True, "2", identity=True),
        Claim("c", False, "3", identity=True),
        Claim("d", None, "4"),
        Claim("e", None, "5", identity=True),
    ]
    study = asked(claims=lambda _: claims)
    assert [claim.verdict for claim in claims] == ["supported", "checked", "contradicted", "undecided", "undecided"]
    text = pages.index({"one": (study, collected())})
    assert "| [one](one.md) | Is it so? | 1 | 1 | 2 | 1 |" in text and "- [one](one.md): c. 3." in text
    assert "| b | **checked** | 2 |" in page(study) and "*Checked*: an identity" in page(study)
    assert "*Checked*" not in page(asked())
