"""Ctrl-C at any instruction of a measurement leaves nothing behind."""

import signal
import threading
import time

import pytest
import torch

import gradscope as gs
from benchmarks.interrupts import FAILURES, TRACED, campaign
from gradscope.forward import interrupts
from gradscope.forward.interrupts import interruptible

MEASUREMENTS = ("gsc", "J v", "first_nonfinite", "lsuv", "attention")


class Slow:
    """A context that receives Ctrl-C while it is left, and then restores something."""

    restored = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        signal.raise_signal(signal.SIGINT)
        self.restored = True


@pytest.fixture
def waiting():
    """Wait for an interrupt, but not for ever."""

    def wait():
        end = time.monotonic() + 5
        while time.monotonic() < end:
            time.sleep(1e-3)
        raise AssertionError("nothing was interrupted")

    return wait


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_interrupts_at_instructions_drawn_at_random(name):
    rows = list(campaign(6 * len(TRACED), seed=1, only=f"^{name}$", ways=tuple(TRACED)))
    assert [row for row in rows if any(row[failure] for failure in FAILURES)] == []
    assert sum(row["ended"] == "interrupted" for row in rows) > len(rows) / 2


def test_an_interrupt_waits_until_a_context_is_left(waiting):
    slow, handler = Slow(), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible() as whole, whole:
        with slow:
            pass
        waiting()
    assert slow.restored  # without `interruptible`, it would not be
    assert signal.getsignal(signal.SIGINT) == handler


def test_an_interrupt_of_the_exit_comes_after_it(waiting):
    class Exited(interruptible):
        def _restore(self, _):
            signal.raise_signal(signal.SIGINT)

    mode = torch.is_grad_enabled()
    with pytest.raises(KeyboardInterrupt):
        with Exited() as whole, whole:
            torch.set_grad_enabled(not mode)
        waiting()
    assert torch.is_grad_enabled() == mode


class Interrupted(torch.nn.MultiheadAttention):
    """Ctrl-C while torch has taken off the innermost mode, and before it can put it on again."""

    def forward(self, x):
        without_mode = torch.overrides._pop_mode_temporarily()
        without_mode.__enter__()
        raise KeyboardInterrupt


@pytest.mark.parametrize("measurement", [gs.attention, gs.residual])
def test_a_mode_that_was_off_when_interrupted(measurement):
    with pytest.raises(KeyboardInterrupt):
        measurement(Interrupted(4, 2), torch.ones(2, 3, 4))
    assert torch._C._len_torch_function_stack() == 0


def test_a_context_that_blocks_is_interrupted_after_a_while(monkeypatch, waiting):
    class Blocking:
        def __enter__(self):
            signal.raise_signal(signal.SIGINT)
            waiting()

        def __exit__(self, *_):
            raise AssertionError("was never entered")

    monkeypatch.setattr(interrupts, "MOST_SECONDS", 0.05)
    with pytest.raises(KeyboardInterrupt), interruptible() as whole, whole, Blocking():
        pass


def test_a_handler_of_the_caller_is_called_once_and_stays():
    called = []

    def own(number, frame):
        called.append(number)

    before = signal.signal(signal.SIGINT, own)
    try:
        with interruptible() as outer, outer, interruptible() as inner, inner:
            with Slow():
                pass
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.1)
        assert called == [signal.SIGINT] * 2
        assert signal.getsignal(signal.SIGINT) is own
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interruptible() as whole, whole:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_leaves_the_handler_alone():
    found = []

    def run():
        with interruptible() as whole, whole:
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]
