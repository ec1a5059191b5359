"""Wrong arguments of a Hydra command: one sentence that names the culprit and the way out; options in any place."""

import pytest

from experiments import measure
from experiments.config import overrides
from experiments.runs import names
from tests.experiments.commands import run_main

WRONG = {
    "matrix_layers.0=x": "'matrix_layers.0=x': matrix_layers is one value without parts; .* matrix_layers=[...]",
    "statistics.a=x": "statistics is one value without parts; give it as a whole, statistics=[...]",
    "data.shape.0=3": "data.shape is one value without parts",
    "model.depth.x=3": "model.depth is one value without parts; give it as a whole, model.depth=...",
    "model.depth=deep": "'model.depth=deep': model.depth must be a whole number.",
    "matrix_layers={a:1}": "matrix_layers must be a list, as in key=[a,b].",
    "data.shape=[a]": "each part of data.shape must be a whole number.",
    "matrix=maybe": "matrix must be true or false.",
    "seed=null": "seed needs a value and cannot be null.",
    "seed=1,2": "'seed=1,2' gives several values: add -m to run each of them, or write seed=[1,2] for one list.",
    "model.depth=range(3)": "'model.depth=range(3)' gives several values: add -m to run each of them.",
    "model.depth=choice(": "brackets ( and ) do not match.",
    "data.shape=[3,8": "brackets [ and ] do not match.",
    "sweep='a": "a quote ' is not closed. If it belongs to the value, write the value between \" and \".",
    "sweep=ä": "needs two pairs of quotes, for the shell and for the value: \"sweep='ä'\".",
    "=3": "'=3' has no key: write key=value, such as seed=3.",
    "+=3": "'+=3' has no key",
    "seed = 3": "'seed ' is not the name of a key; write key=value without spaces, as in seed=3.",
    "model..depth=3": "'model..depth' is not the name of a key",
    "model.depth": "'model.depth' is not key=value.",
    "~seed": "only keys inside of a group can be removed; give seed another value, seed=...",
    "~sed": "Unknown key 'sed'; did you mean 'seed'?",
    "~model.depth": "this key cannot be removed; give it another value, model.depth=...",
    "~model.dept": "Unknown key 'model.dept'; did you mean 'model.depth'?",
    "+seed=1": "seed exists already; leave out the sign before it.",
    "+model=relu": "model exists already",
    "model=null": "model needs one of its options, such as alexnet_a.",
    "model=mlp.yaml": "model takes the name of a file in conf/model, as in model=mlp.",
    "study=/home/me/mine.yaml": "as in study=mine. Copy a file from elsewhere to conf/study in the current folder.",
    "study=architecture": "study has no option 'architecture'; did you mean 'architectures'?",
    "study=conf/study/architecture": "study has no option 'conf/study/architecture'; ",
    "study=alexnet": "does not fit python -m experiments.measure (Key 'train' not in 'MeasureConfig'); is it for "
                     "python -m experiments.train?",
    "launcher.n=3": "launcher is a group of options and has no keys; choose an option, such as launcher=processes.",
    "--foo": "Unknown option '--foo'; options are -m, ",
    "--multirun=3": "Unknown option '--multirun=3'",
    "data=folder": "data.path needs a value: data.path=...",
    "seed=${nosuch}": "seed: Interpolation key 'nosuch' not found",
    "sweep=": "sweep needs a name",
    "model._target_=nosuch.x": "cannot be imported (ModuleNotFoundError: No module named 'nosuch')",
    "data._target_=os.path": "data._target_=os.path is a module, not a function or class.",
    "measurement=3": "measurement needs a function or class, as in +measurement._target_=",
    "measurement._target_=a.b": "measurement has no _target_ yet: add it with a plus sign, +measurement._target_=",
    "+model.detph=3": "model._target_=MLP takes no detph; did you mean 'depth'?",
    "seeds=1.5": "seeds must be a positive number or a list of different whole numbers, got 1.5.",
    "num_threads=0": "num_threads must be a positive number or null, got 0.",
    "seed=99999999999999999999": "seed must have at most 64 bits",
    "model=custom": "model._target_ needs a value: model._target_=...",
    "-m model=glob(zzz*)": "model=glob(zzz*) gives no value, so the sweep has no runs.",
    "-m seed=1,": "'seed=1,': the value cannot be read. Several values are 1,2 or range(3)",
    "-m seed=range(0)": "seed=range(0) gives no value, so the sweep has no runs.",
    "-m seed=1,2 model.depth=3,deep": "'model.depth=deep': model.depth must be a whole number.",
    "-m matrix_layers.0=x,y": "matrix_layers is one value without parts",
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_override_ends_in_one_sentence(text, capsys, monkeypatch, tmp_path):
    arguments = [text] if " = " in text else text.split()
    said, code = run_main(measure.main, capsys, monkeypatch, *arguments, f"results={tmp_path}")
    said = said.partition("\nTraceback: ")[0].strip()  # the file in the run's folder
    assert code == 1 and said.startswith("Error: ") and len(said) <= 400 and "\n" not in said, said
    for part in WRONG[text].split(".*"):
        assert part.strip() in said, said
    # Hydra recommends + for every unknown key; only this one may be added.
    assert "+" not in said.replace(repr(text), "").replace("+measurement._target_=", "")


@pytest.mark.parametrize("place", range(4))
def test_options_stand_anywhere(place, capsys, monkeypatch, tmp_path):
    given = ["seed=0,1", "model.depth=2", "model.width=3", f"results={tmp_path}"]
    said, code = run_main(measure.main, capsys, monkeypatch, *given[:place], "-m", *given[place:])
    assert code is None and "all 2 runs are done" in said, said
    assert len(names.folders(tmp_path / "measure")) == 2


def test_the_value_of_an_option_is_no_override():
    assert overrides.checked(["--cfg", "job", "seed=1", "-m"]) == ["seed=1", "--cfg", "job", "-m"]


def test_keys_of_a_class_of_ones_own_need_no_sign(capsys, monkeypatch, tmp_path):
    said, code = run_main(
        measure.main, capsys, monkeypatch, "model=custom", "model._target_=torch.nn.Linear", "model.in_features=4",
        "model.out_features=3", "data.shape=[4]", "data.batch_size=5", f"results={tmp_path}",
    )  # fmt: skip
    assert code is None and "in_features=4" in said, said
