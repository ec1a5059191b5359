"""Ways to interrupt a measurement: at a chosen instruction, or by signals of another process at random moments."""

from __future__ import annotations

import _thread
import contextlib
import dis
import functools
import inspect
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

Run = Callable[[], Any]
CLEANING = {"__enter__", "__exit__", "close", "remove", "_restore", "_changed", "_keep_all", "_replace_buffers"}
# Python looks for signals after these instructions only.  Where a lock is taken or given back it does not.  A signal
# raises at the instruction, but a trace at the next one, which counts only if both have the same handler.
CHECKED = {dis.opmap[name] for name in ("RESUME", "CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD") if name in dis.opmap}
SENDER = """
import os, sys, time
for line in sys.stdin:
    for delay in map(float, line.split()):
        time.sleep(delay)
        os.kill(os.getppid(), 2)
    print("sent", flush=True)
"""


def measured(run: Run) -> Any:
    """Run; only below this function does a signal interrupt."""
    return run()


def interrupt(number: int, frame: FrameType | None) -> None:
    """The handler of SIGINT during the campaign: like Python's, but late signals do not interrupt the campaign."""
    while frame is not None:
        if frame.f_code is measured.__code__:
            raise KeyboardInterrupt
        frame = frame.f_back


class Instructions:
    """Counts the instructions of Python by function while a measurement runs, and interrupts it at one of them.

    ``scope``: parts of file names; functions of other files are not counted.  ``cleaning``: only functions that enter,
    leave or restore.  ``action``: what happens at the ``at``-th instruction of the function ``where``.
    """

    def __init__(self, scope: tuple[str, ...], *, cleaning: bool = False) -> None:
        self.scope, self.cleaning = scope, cleaning
        self.num: Counter[CodeType] = Counter()
        self.last: dict[int, int] = {}  # the offset of the last instruction, by the identity of the frame
        self.counts: Counter[CodeType] = Counter()
        self.where: CodeType | None = None
        self.at, self.action, self.happened = 0, _raise, ""

    def count(self, run: Run) -> None:
        """Count the instructions of an undisturbed measurement."""
        self.where = None
        self._traced(run)
        self.counts = self.num.copy()

    def choose(self, chance: random.Random, action: Run) -> None:
        """Choose a function, one of its instructions, and what happens there; none if the trace counted nothing."""
        self.where, self.action, self.happened = None, action, ""
        if self.counts:  # a measurement that is refused at once may enter no context
            self.where = chance.choice(list(self.counts))
            self.at = chance.randint(1, self.counts[self.where])

    def run(self, run: Run) -> Any:
        """Run with this trace, below `measured`."""
        return self._traced(lambda: measured(run))

    def _traced(self, run: Run) -> Any:
        self.num, self.last = Counter(), {}
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            return run()
        finally:
            sys.settrace(before)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if event == "call":
            known = any(part in code.co_filename for part in self.scope)
            if not known or (self.cleaning and not _cleans(code)):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            self.last.pop(id(frame), None)
        elif event == "opcode":
            here, before = frame.f_lasti, self.last.get(id(frame))
            self.last[id(frame)] = here
            if before is None or code.co_code[before] not in CHECKED or _handler(code, before) != _handler(code, here):
                return self._trace
            self.num[code] += 1
            if code is self.where and self.num[code] == self.at:
                sys.settrace(None)
                self.happened = f"{code.co_qualname}:{frame.f_lineno}"
                self.action()
        return self._trace


@functools.cache
def _handlers(code: CodeType) -> list[tuple[int, int, int]]:
    """The ranges of instructions that have a handler, with the place of the handler."""
    return [(entry.start, entry.end, entry.target) for entry in dis._parse_exception_table(code)]  # type: ignore[attr-defined]


def _handler(code: CodeType, offset: int) -> int | None:
    """Where an exception goes that an instruction raises; None: to the caller."""
    return next((target for start, end, target in _handlers(code) if start <= offset < end), None)


def _cleans(code: CodeType) -> bool:
    """Whether a function enters, leaves or restores something; also the generators of context managers."""
    generates = code.co_flags & inspect.CO_GENERATOR and code.co_name != "<genexpr>"
    return code.co_name in CLEANING or bool(generates)


def _raise() -> None:
    raise KeyboardInterrupt


ACTIONS: dict[str, Run] = {"raised": _raise, "interrupt_main": _thread.interrupt_main}
OWN = ("gradscope/", "contextlib.py")
ALL = ("/",)


@contextlib.contextmanager
def sender() -> Iterator[Callable[[Run, list[float]], Any]]:
    """Another process that sends SIGINT after given delays; yields a function that runs a measurement under them."""
    command, pipe = [sys.executable, "-c", SENDER], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        came, out = process.stdin, process.stdout

        def run(measurement: Run, delays: list[float]) -> Any:
            came.write(" ".join(map(str, delays)) + "\n")
            came.flush()
            try:
                return measured(measurement)
            finally:
                out.readline()  # until then signals come, which do not interrupt here

        yield run


def handling() -> contextlib.AbstractContextManager[Any]:
    """Handle SIGINT as during the campaign."""
    stack = contextlib.ExitStack()
    stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, interrupt))
    return stack
