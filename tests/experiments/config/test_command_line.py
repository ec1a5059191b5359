"""Errors of a configuration name the nearest key of this configuration, and the user's folder of them is searched."""

import sys

import pytest

from experiments import collect, figures, measure, program, status
from experiments.config import command_line, overrides

NEAREST = {
    ("model.dept=3",): "Unknown key 'model.dept'; did you mean 'model.depth'?",
    ("modle=mlp",): "Unknown key 'modle'; did you mean 'model'?",
    ("depth=3",): "Unknown key 'depth'; did you mean 'model.depth'?",
    ("lancher=serial",): "Unknown key 'lancher'; did you mean 'launcher'?",
    ("hydra.sweeper=foo",): "'hydra.sweeper=foo': choose an option of hydra.sweeper with a slash, hydra/sweeper=foo.",
    ("hydra/launcher=foo",): "hydra/launcher has no option 'foo'; options are basic, ",
    ("hydra/sweeper=null",): "'hydra/sweeper=null': Config group override must be a string or a list. Got NoneType",
    ("hydra.run.dir=null",): "'hydra.run.dir=null': hydra.run.dir needs a value and cannot be null.",
    ("hydra.job.num=x",): "'hydra.job.num=x': hydra.job.num must be a whole number.",
    ("hydra.run.dir=/proc/x",): "'hydra.run.dir=/proc/x': cannot write to /proc/x: No such file",
    ("hydra.sweper.params=3",): "Unknown key 'hydra.sweper'; did you mean 'hydra.sweeper'?",
    ("model=resnet", "model.dept=3"): "Unknown key 'model.dept'; did you mean 'model.depth'?",
    ("model=resnet", "model.activation=relu"): "Unknown key 'model.activation'; keys of model are _target_, depth, ",
    ("-m", "model=mlp,resnet", "model.activation=relu"): "Unknown key 'model.activation'; keys of model are _target_",
    ("-m", "seeed=1,2"): "Unknown key 'seeed'; did you mean 'seed'?",
    ("-m", "hydra.launcher.n_jobs=1", "launcher=processes", "seeed=1,2"): "Unknown key 'seeed'; did you mean 'seed'?",
    ("-m", "seeed=1,2", "hydra/sweeper=basic"): "Unknown key 'seeed'; did you mean 'seed'?",
    ("-m", "study=architecture"): "study has no option 'architecture'; did you mean 'architectures'?",
    ("model=mpl",): "model has no option 'mpl'; did you mean 'mlp'?",
    ("model.depth=deep",): "'model.depth=deep': model.depth must be a whole number.",
    ("model.depth",): "'model.depth' is not key=value",
}


@pytest.mark.parametrize("arguments", NEAREST, ids=" ".join)
def test_an_unknown_key_has_the_nearest_one_beside_it(arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["measure", *arguments, f"results={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        command_line.run_hydra(measure.main)
    said = f"{ended.value.code}{''.join(capsys.readouterr())}"
    assert said.startswith(f"Error: {NEAREST[arguments]}") and "+" not in said and "\n" not in said


def test_the_users_folder_is_searched_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert program.conf_folders() == [program.CONF]
    (tmp_path / "conf" / "study").mkdir(parents=True)
    assert program.conf_folders() == [tmp_path / "conf", program.CONF]
    (tmp_path / "conf" / "study" / "mine.yaml").write_text("hydra: {sweeper: {params: {seed: '1,2', mode: eval}}}")
    given = overrides.with_study_defaults(["study=mine", "seed=3", "-m"])
    assert given == ["hydra.sweeper.params=null", "mode=eval", "study=mine", "seed=3", "-m"]
    monkeypatch.chdir(program.CONF.parent)
    assert program.conf_folders() == [program.CONF]


def test_messages_name_the_command_that_the_user_has(monkeypatch):
    monkeypatch.delenv(program.PROGRAM, raising=False)
    assert program.program("collect") == "python -m experiments.collect"
    monkeypatch.setenv(program.PROGRAM, "gradscope ")
    assert program.program("collect") == "gradscope collect"


AS_IT_IS = ("a #b", "a: b", "a=b", "007", "1e3", "[a]", "${x}", "null ", "d'q", "true")


@pytest.mark.parametrize("text", AS_IT_IS)
def test_a_text_is_taken_as_it_is(text):
    for argument in (f"results={text}", f"--results={text}", f"results='{text}'", f'results="{text}"'):
        assert command_line.parse(collect.Config, [argument, "csv=true"]) == collect.Config(results=text, csv=True)
    assert command_line.parse(status.Config, [f"r/{text}"], positional="sweep").sweep == f"r/{text}"


def test_null_is_no_text():
    assert command_line.parse(figures.Config, ["study=null", "sweep='null'"]) == figures.Config()
