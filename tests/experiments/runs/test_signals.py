"""A signal ends a single run also during one long call of C code, where Python runs no handler."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from experiments.program import PARENT, TORCHRUN
from tests.helpers import ROOT

LONG = """
import hashlib
from experiments.runs import explained
with explained(True):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, without the interpreter's lock
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_within_a_long_call(number):
    with subprocess.Popen(
        [sys.executable, "-c", LONG], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(1)  # the call has begun
        process.send_signal(number)
        try:
            said = process.communicate(timeout=60)[1]  # the call itself takes minutes
        finally:
            process.kill()
    assert process.returncode == 128 + number
    assert said.strip().startswith("Interrupted within a long computation: the same command resumes")


def test_a_process_ends_with_its_parent_also_while_it_starts():
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    code = f"import os, time, experiments; assert '{PARENT}' not in os.environ; print('imported'); time.sleep({{}})"
    for parent, seconds, returned in ((os.getpid(), 1.5, 0), (int(ended.stdout), 600, -signal.SIGKILL)):
        process = subprocess.run(
            [sys.executable, "-c", code.format(seconds)], cwd=ROOT, env={**os.environ, PARENT: str(parent)}, timeout=240
        )
        assert process.returncode == returned


def test_a_process_of_a_torchrun_that_has_ended_ends_at_once():
    with socket.create_server(("127.0.0.1", 0)) as store:
        address = store.getsockname()
        given = {TORCHRUN: "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": address[0]}
        command = [sys.executable, "-c", "import experiments; print('imported')"]
        options = {"cwd": ROOT, "env": {**os.environ, **given, "MASTER_PORT": str(address[1])}, "timeout": 240}
        assert subprocess.run(command, capture_output=True, text=True, **options).stdout == "imported\n"
    ended = subprocess.run(command, capture_output=True, text=True, **options)
    assert ended.returncode == 1 and ended.stderr == "torchrun has ended, so this process ends, too.\n"
