"""Two processes of ``torch.distributed`` that run functions of a test file, once for all tests of the file."""

import pickle
import subprocess
import sys
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT

GLOO = torch.distributed.is_available() and torch.distributed.is_gloo_available()
needs_gloo = pytest.mark.skipif(not GLOO, reason="this torch has no torch.distributed with gloo")


def both(file: str, *functions: str, folder: Path) -> dict[str, list]:
    """What each function of a test file returns in the two processes."""
    module = ".".join(Path(file).relative_to(ROOT).with_suffix("").parts)
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.processes", str(rank), str(folder), module, *functions],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=170)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    found = [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(2)]
    return {name: [one[name] for one in found] for name in functions}


def main(rank: str, folder: str, module: str, *functions: str) -> None:
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/store", timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=store, rank=int(rank), world_size=2, timeout=timeout)
    found = {name: getattr(import_module(module), name)() for name in functions}
    Path(folder, rank).write_bytes(pickle.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
