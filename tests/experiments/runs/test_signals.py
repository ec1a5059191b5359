"""A signal ends a single run also during one long call of C code, where Python runs no handler."""

import signal
import subprocess
import sys
import time

import pytest

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
