"""The command ``gradscope`` prints what the library computes; errors are one sentence with exit code 2."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import gradscope as gs
from gradscope.command import completion, experiments, measurements
from gradscope.command.main import MEASUREMENTS, main, parser
from gradscope.command.subject import INPUT_STREAM
from tests.helpers import ROOT, seeded

MODULE = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(*[part for _ in range(8) for part in (nn.Linear(6, 6), nn.Tanh())])

def bent():
    model = mlp()
    model[5] = nn.Hardtanh()
    return model

def gpt():
    return nn.Sequential(nn.Embedding(11, 4), nn.Flatten(), nn.Linear(12, 2))

class Needy(nn.Module):
    def __init__(self, width):
        super().__init__()

class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient

class Faulty(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.two(Wrong.apply(self.one(x)))

def broken():
    raise RuntimeError("no weights")

ready = nn.Linear(3, 2)
number = 3
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Exit code, stdout and stderr of the command in a folder that holds `MODULE` as own_net.py."""
    (tmp_path / "own_net.py").write_text(MODULE)
    (tmp_path / "half.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("own_net", "half"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    def run(*arguments):
        try:
            code = main(arguments)
        except SystemExit as ended:
            code = ended.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def twin(seed=0, dtype=torch.float32):
    """The model and input of ``own_net:mlp --input 5,6``, built by hand."""
    torch.manual_seed(seed)
    model = nn.Sequential(*[part for _ in range(8) for part in (nn.Linear(6, 6), nn.Tanh())])
    return model.to(dtype), torch.randn(5, 6, generator=seeded(seed + INPUT_STREAM)).to(dtype)


def test_profile_prints_the_numbers_and_the_verdict_of_gsc(command):
    code, out, err = command("profile", "own_net:mlp", "--input", "5,6", "--seed", "3")
    expected = gs.gsc(*twin(3))
    assert (code, err) == (0, "") and str(expected) in out
    for layer, value in zip(expected.layers, expected.log10_values[:, -1], strict=True):
        assert any(line.split()[:3:2] == [layer, f"{value:.4f}"] for line in out.splitlines())


def test_weights_and_input_are_independent():
    assert not torch.equal(torch.randn(4, generator=seeded(INPUT_STREAM)), torch.randn(4, generator=seeded(0)))


@pytest.mark.parametrize(
    "other, code, first", [("own_net:mlp", 0, None), ("bfloat16", 0, None), ("own_net:bent", 1, "5")]
)
def test_diff_names_the_layer_that_differs(command, tmp_path, other, code, first):
    options = ("--input", "5,6", "--probes", "2")
    found, out, _ = command("diff", "own_net:mlp", other, *options, "--json")
    assert found == code and json.loads(out)["first"] == first
    found, out, _ = command("diff", "own_net:mlp", other, *options, "--out", "new/page.html")
    assert found == code and "Written: new/page.html" in out and (tmp_path / "new" / "page.html").is_file()


def test_json_is_one_object_with_the_rows_of_the_frame(command):
    code, out, _ = command("profile", "own_net:mlp", "--input", "5,6", "--json", "--dtype", "float64")
    found = json.loads(out)
    expected = gs.gsc(*twin(dtype=torch.float64))
    assert code == 0 and found["verdict"] == expected.growth().verdict
    assert [row["log10_value"] for row in found["rows"]] == pytest.approx(expected.log10_values[:, -1], rel=1e-12)
    assert found["growth"]["rate"] == pytest.approx(expected.growth().rate)


def test_json_has_null_for_nan_and_text_for_infinity():
    content = {"a": [float("nan"), float("inf"), np.float64(2.0)], "b": pd.NA, "c": np.int64(3), "d": (True, None)}
    assert measurements._plain(content) == {"a": [None, "inf", 2.0], "b": None, "c": 3, "d": [True, None]}


@pytest.mark.parametrize("kind", ["csv", "parquet", "png"])
@pytest.mark.parametrize("name", ["profile", "matrix"])
def test_out_writes_what_is_printed(command, tmp_path, name, kind):
    code, out, _ = command(name, "own_net:mlp", "--input", "5,6", "--layers", "0,8,14", "--out", f"new/file.{kind}")
    assert code == 0 and f"Written: new/file.{kind}" in out
    path = tmp_path / "new" / f"file.{kind}"
    if kind == "png":
        assert path.read_bytes()[1:4] == b"PNG"
    else:
        measure = gs.gsc if name == "profile" else gs.gsc_matrix
        expected = measure(*twin(), layers=["0", "8", "14"]).to_frame()
        assert np.allclose(gs.frames.load(path)["log10_value"], expected["log10_value"])


def test_matrix_has_a_row_per_source_and_a_column_per_target(command):
    code, out, _ = command("matrix", "own_net:mlp", "--input", "5,6", "--layers", "0,8,14")
    expected = gs.gsc_matrix(*twin(), layers=["0", "8", "14"])
    assert code == 0 and out.splitlines()[0].split() == list(expected.targets)
    assert f"{expected.log10_values[1, -1]:.3f}" in out


def test_check_ends_with_code_1_if_a_derivative_is_wrong(command):
    assert command("check", "own_net:mlp", "--input", "5,6")[0] == 0
    code, out, _ = command("check", "own_net:Faulty", "--input", "4,3")
    assert code == 1 and "FAILED" in out
    code, out, _ = command("check", "own_net:Faulty", "--input", "4,3", "--json")
    assert code == 1 and json.loads(out)["passed"] is False


def test_data_and_token_ids(command, tmp_path):
    x = twin()[1].double().numpy()
    np.savez(tmp_path / "batch.npz", x=x, labels=np.arange(5))
    np.savez(tmp_path / "many.npz", a=x, b=x)
    given = command("profile", "own_net:mlp", "--data", "batch.npz", "--json")[1]
    drawn = command("profile", "own_net:mlp", "--input", "5,6", "--json")[1]
    assert json.loads(given)["rows"] == json.loads(drawn)["rows"]
    assert "an array x or only one array, got a, b" in command("profile", "own_net:mlp", "--data", "many.npz")[2]
    code, out, _ = command("profile", "own_net:gpt", "--input", "4,3", "--input-ids", "11", "--json")
    assert code == 0 and json.loads(out)["samples"] == 4


def test_a_module_is_measured_as_it_is(command):
    code, out, _ = command("profile", "own_net:ready", "--input", "4,3", "--json")
    assert code == 0 and json.loads(out)["growth"] is None and "no_growth" in out


WRONG = {
    "own_net.mlp": "is not MODULE:FACTORY",
    "own_net.py:mlp": "is not MODULE:FACTORY",
    "own_nets:mlp": "There is no module 'own_nets' in ",
    "half:mlp": "ModuleNotFoundError: No module named 'nothing_of_this_name' (half.py, line 1)",
    "own_net:mpl": "own_net has no 'mpl'; did you mean 'mlp'?",
    "own_net:Needy": "own_net:Needy cannot be called without arguments: TypeError: ",
    "own_net:broken": "RuntimeError: no weights (own_net.py, line ",
    "own_net:number": "own_net:number must be or return a torch.nn.Module, got int.",
}


@pytest.mark.parametrize("model", WRONG)
def test_an_error_is_one_sentence_with_code_2(command, model):
    code, out, err = command("profile", model, "--input", "4,3")
    assert (code, out) == (2, "") and WRONG[model] in err
    assert err.startswith("gradscope profile: error: ") and err.count("\n") == 1 and len(err) < 400


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--input", "4,x"], "'4,x' is not a shape such as 8,3,32,32"),
        ([], "one of the arguments --input --data is required"),
        (["--input", "4,7"], "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        (["--input", "4,6", "--out", "a.txt"], "A frame is saved as .parquet or .csv, got 'a.txt'."),
        (["--input", "4,6", "--device", "warp"], "--device warp cannot be used here"),
        (["--data", "none.npz"], "--data none.npz cannot be read"),
        (["--input", "4,6", "--probes", "some"], "probes"),
    ],
)
def test_wrong_arguments_end_with_code_2(command, arguments, said):
    code, out, err = command("profile", "own_net:mlp", *arguments)
    assert (code, out) == (2, "") and said in err and "Traceback" not in err


def test_traceback_shows_the_exception(command):
    with pytest.raises(ValueError, match="must be or return"):
        main(["profile", "own_net:number", "--input", "4,3", "--traceback"])


@pytest.mark.parametrize("name", ["report", "check", "profile", "matrix", "completion"])
def test_help_has_examples(command, name):
    code, out, _ = command(name, "--help")
    assert code == 0 and f"gradscope {name}" in out.split("examples:")[1]


def test_the_examples_of_measurements_can_be_parsed():
    for name, (_, examples) in MEASUREMENTS.items():
        for example in examples:
            assert parser().parse_args([name, *example.replace("'", "").split()]).command == name


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_bash_completes_commands_options_and_keys(command, shell):
    code, script, _ = command("completion", shell)
    assert code == 0
    if shell == "zsh":
        assert script.startswith("autoload")
        return

    def completed(*words):
        line = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _gradscope 2>/dev/null"
        bash = ["bash", "-c", f'{script}\n{line}\necho "${{COMPREPLY[@]}}"']
        return subprocess.run(bash, capture_output=True, text=True).stdout.split()

    assert completed("gradscope", "pro") == ["profile"]
    assert completed("gradscope", "profile", "--in") == ["--input", "--input-ids"]
    assert completed("gradscope", "measure", "study=vani") == ["study=vanishing"]
    assert completed("gradscope", "train", "train.ep") == ["train.epochs="]
    assert completed("gradscope", "status", "wa") == ["watch="]


def test_the_experiments_are_run_as_from_the_clone(tmp_path):
    """In a folder of one's own: its ./conf is searched first, its modules are found, and results are written there."""
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "own_model.py").write_text(MODULE)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text("_target_: own_model.mlp\n")
    command = [sys.executable, "-m", "gradscope", "measure", "model=mine", "data.shape=[6]", "sweep=s"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (manifest,) = (tmp_path / "results" / "runs" / "s").glob("*/manifest.json")
    content = json.loads(manifest.read_text())
    assert content["choices"]["model"] == "mine"
    assert content["command"] == "gradscope measure model=mine 'data.shape=[6]' sweep=s"


def test_a_copy_without_experiments_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(experiments, "__file__", str(tmp_path / "gradscope" / "command" / "experiments.py"))
    with pytest.raises(FileNotFoundError, match="The experiments are missing beside"):
        experiments.place()
