"""On a terminal, `experiments.rerun` asks before it imports code that is not part of this package."""

import os
import pty
import shutil
import sys
import threading

import pytest

from experiments import measure, rerun
from experiments.files import write_json
from experiments.runs import manifest
from gradscope import frames
from tests.experiments.example_runs import CHOICES, configured


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """The folder of a measurement whose manifest names a module beside it, which leaves a file when it is imported."""
    place = tmp_path_factory.mktemp("foreign")
    cfg = configured("measure", "data.batch_size=8", "probes=2")
    content = manifest(cfg, CHOICES, 1.0)
    content["config"]["measurement"] = {"_target_": "elsewhere.measured"}
    frames.save(measure.measure_seeds(cfg, CHOICES)[1], place / "run" / "frame.parquet")
    write_json(place / "run" / "manifest.json", content)
    code = "import pathlib\npathlib.Path(__file__).with_name('imported').touch()\n"
    (place / "elsewhere.py").write_text(f"{code}def measured(**_):\n    raise RuntimeError('it ran')\n")
    return place


def answered(folder, answer, *arguments):
    """What a terminal shows if ``rerun`` is called there and a person has typed an answer."""
    ours, theirs = pty.openpty()
    os.write(ours, answer)
    seen = []
    reader = threading.Thread(target=_read, args=(ours, seen))
    reader.start()
    with pytest.MonkeyPatch.context() as patch, os.fdopen(theirs) as stdin, os.fdopen(os.dup(theirs), "w") as stdout:
        patch.setattr(sys, "stdin", stdin)
        patch.setattr(sys, "stdout", stdout)
        patch.syspath_prepend(folder.parent)
        patch.delitem(sys.modules, "elsewhere", raising=False)
        try:
            rerun.again(folder, *arguments)
        except Exception as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        sys.modules.pop("elsewhere", None)
    reader.join()
    os.close(ours)
    return b"".join(seen).decode()


def _read(terminal, seen):
    try:
        while part := os.read(terminal, 1 << 16):
            seen.append(part)
    except OSError:  # what Linux raises when the other side has closed the terminal
        pass


@pytest.mark.parametrize("answer", [b"n\n", b"\n", b"yesterday\n", b"\x04"], ids=["n", "nothing", "other", "end"])
def test_nothing_is_imported_without_a_yes(foreign, answer):
    seen = answered(foreign / "run", answer)
    assert "names elsewhere.measured. Importing and running this code can do anything. Go on? [y/N]" in seen
    assert "ValueError: The manifest names elsewhere.measured" in seen and "add --trust" in seen
    assert not (foreign / "imported").exists()


@pytest.mark.parametrize("answer", [b"y\n", b"Yes\n"])
def test_a_yes_imports_and_runs_the_code(foreign, answer, tmp_path):
    place = shutil.copytree(foreign, tmp_path / "copy")
    seen = answered(place / "run", answer)
    assert "Go on? [y/N]" in seen and "it ran" in seen
    assert (place / "imported").exists()


def test_with_trust_there_is_no_question(foreign, tmp_path):
    place = shutil.copytree(foreign, tmp_path / "copy")
    seen = answered(place / "run", b"", True)
    assert "Go on?" not in seen and "it ran" in seen and (place / "imported").exists()


def test_the_question_shows_no_control_characters(foreign, tmp_path):
    place = shutil.copytree(foreign, tmp_path / "copy")
    content = rerun.read_json(place / "run" / "manifest.json")
    content["config"]["measurement"]["_target_"] = "else\x1b[2Jwhere.measured"
    write_json(place / "run" / "manifest.json", content)
    question, refused, _ = answered(place / "run", b"n\n").partition("ValueError")
    assert r"names else\x1b[2Jwhere.measured. Importing" in question and refused and "\x1b" not in question
