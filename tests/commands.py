"""Commands of the experiments as processes that do not import torch, pandas and Hydra again.

A server imports them once and forks for each command.  Otherwise every start would cost several seconds of CPU.
"""

import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
NUMBER = struct.Struct("q")
PRELOADED = (
    "experiments.collect", "experiments.figures", "experiments.measure", "experiments.rerun", "experiments.status",
    "experiments.train", "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper",
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher", "optuna", "seaborn", "sklearn.datasets", "submitit",
    "torch.fx.experimental.symbolic_shapes",
)  # fmt: skip


class Command:
    """``python -m MODULE ARGUMENTS`` in a session of its own; used like `subprocess.Popen`."""

    def __init__(self, module: str, *arguments: str, merged: bool = False, **environment: str) -> None:
        self.module = module
        self.returncode: int | None = None
        self._out = tempfile.TemporaryFile()  # noqa: SIM115  `wait` reads and closes both files
        self._err = self._out if merged else tempfile.TemporaryFile()  # noqa: SIM115
        self._status, status = os.pipe()
        request = {
            "module": module,
            "arguments": arguments,
            "environment": {**os.environ, "COLUMNS": "160", "NO_COLOR": "1", **environment},
        }
        files = [self._out.fileno(), self._err.fileno(), status]
        socket.send_fds(_server()[0], [json.dumps(request).encode()], files)
        os.close(status)
        (self.pid,) = NUMBER.unpack(os.read(self._status, NUMBER.size))

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        if self.returncode is None:
            os.set_blocking(self._status, False)
            try:
                (self.returncode,) = NUMBER.unpack(os.read(self._status, NUMBER.size))
            except BlockingIOError:
                return None
            os.close(self._status)
            self._out.seek(0)
            self._err.seek(0)
            with self._out, self._err:
                self._said = self._out.read().decode(), self._err.read().decode()
        return self.returncode

    def wait(self, timeout: float = 240) -> int:
        begin = time.monotonic()
        while (code := self.poll()) is None:
            if time.monotonic() > begin + timeout:
                raise subprocess.TimeoutExpired(self.module, timeout)
            time.sleep(0.01)
        return code

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """What was written to stdout (``merged``: and to stderr), and to stderr, once the command has ended."""
        self.wait(timeout)
        return self._said


def run(module: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    command = Command(module, *arguments, merged=False, **environment)
    out, err = command.communicate()
    return command.wait(), out, err


@cache
def _server() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.commands", str(there.fileno())], cwd=ROOT, stdin=subprocess.DEVNULL,
        pass_fds=[there.fileno()], start_new_session=True,
    )  # fmt: skip
    there.close()
    return here, process


def _serve(requests: socket.socket) -> tuple[str, list[str]]:
    """Fork for every request; returns in the process of a command: the module and the arguments."""
    for name in PRELOADED:
        try:
            __import__(name)
        except ImportError:  # an extra that is not installed
            continue
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, (*files,), _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            sys.exit()
        if os.fork():
            for file in files:
                os.close(file)
            continue
        # The child watches the command, its own child, and reports its number and its exit code.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        out, err, status = files
        pid = os.fork()
        if pid:
            os.close(out)
            os.close(err)
            os.write(status, NUMBER.pack(pid))
            os.write(status, NUMBER.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
            os._exit(0)
        os.setsid()
        os.dup2(out, 1)
        os.dup2(err, 2)
        for file in (*files, requests.fileno()):
            os.close(file)
        request = json.loads(message)
        os.environ.clear()
        os.environ.update(request["environment"])
        return request["module"], request["arguments"]


if __name__ == "__main__":
    module, sys.argv[1:] = _serve(socket.socket(fileno=int(sys.argv[1])))
    sys.modules.pop(module, None)  # as if it had not been imported before
    runpy.run_module(module, run_name="__main__", alter_sys=True)
