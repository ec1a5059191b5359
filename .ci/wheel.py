"""Build the wheel, install it in an environment of its own, and use every command from a folder without the clone.

python .ci/wheel.py    # needs the dependencies, and the extras report and slurm, in the environment of this Python
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
OWN = {
    "my_net.py": "import gradscope as gs\n\ndef resnet(depth=8):\n    return gs.models.ResNet(depth=depth, width=4)\n",
    "conf/model/mine.yaml": "_target_: my_net.resnet\ndepth: 8\n",
    "conf/study/tiny.yaml": "# @package _global_\nsweep: tiny\nhydra: {sweeper: {params: {seed: 'range(2)'}}}\n",
}


def environment(folder: Path) -> Path:
    """An environment that sees the packages of this one, except gradscope."""
    here, packages = Path(sysconfig.get_path("purelib")), folder / "packages"
    packages.mkdir()
    for path in here.iterdir():
        if "gradscope" not in path.name and path.suffix != ".pth":
            (packages / path.name).symlink_to(path)
    venv.create(folder / "venv", with_pip=False)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n")
    return folder / "venv" / "bin"


def main(folder: Path) -> None:
    """Every assertion is a promise to somebody who has only the wheel."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], check=True)
    (wheel,) = folder.glob("*.whl")
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gradscope"}, tops

    bin, home = environment(folder), folder / "home"
    for name, text in OWN.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    variables |= {"PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}

    def run(command: str, *arguments: str, code: int = 0) -> str:
        print("$", command, *arguments, flush=True)
        done = subprocess.run([*command.split(), *arguments], cwd=home, env=variables, capture_output=True, text=True)
        said = done.stdout + done.stderr
        assert done.returncode == code and "Traceback" not in said, f"exit code {done.returncode}\n{said}"
        return said

    # Two commands from nothing to a report of a network of one's own.
    run("python -m pip install --quiet --disable-pip-version-check --no-index", f"{wheel}[report]")
    run("gradscope report my_net:resnet --input 8,3,32,32")
    assert "<html" in (home / "report.html").read_text()

    found = json.loads(run("gradscope profile my_net:resnet --input 4,3,16,16 --json"))
    assert found["verdict"] == found["growth"]["verdict"] and found["rows"][-1]["value"] == 1.0
    assert "passed" in run("python -m gradscope check my_net:resnet --input 2,3,8,8")
    assert "no module 'their_net'" in run("gradscope matrix their_net:resnet --input 2,3,8,8", code=2)

    # A sweep of one's own model and study in worker processes, and a study's own measurement in submitit's.
    assert "all 2 runs are done" in run("gradscope measure -m model=mine study=tiny launcher=processes")
    run("gradscope measure -m study=jacobian launcher=slurm_local sweep=jobs model=plane seed=0,1")
    (manifest, *_) = (home / "results" / "runs" / "tiny").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["command"].startswith("gradscope measure model=mine")
    assert "2 runs" in run("gradscope collect sweep=tiny")
    assert "Figure: results/runs/tiny/figures" in run("gradscope figures study=tiny")
    assert "tiny" in run("gradscope status tiny")
    assert "names my_net.resnet, which is not part" in run("gradscope rerun", str(manifest.parent), code=1)
    assert "Reproduced: equal bit for bit" in run("gradscope rerun --trust", str(manifest.parent))
    assert "did you mean 'model.depth'?" in run("gradscope measure model.dept=3", code=1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        main(Path(name).resolve())
    print("The wheel works.")
