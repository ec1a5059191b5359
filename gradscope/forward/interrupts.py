"""Ctrl-C during a measurement, which may come at any instruction: also while a context is entered or left.

Python calls the handler of SIGINT between two instructions of the main thread.  If the handler raises while a context
manager puts something in place or removes it, hooks stay in the model, or torch stays in another mode.  So an interrupt
waits until no context manager inside the measurement is being entered or left, and no module is being imported.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
import traceback
import warnings
from types import FrameType
from typing import Any, Self

import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from gradscope.memory import leave, opened

WAITS_FOR = {"__enter__", "__exit__", "__del__", "_find_and_load"}
MOST_SECONDS = 1.0  # then something blocks, and is interrupted all the same
RETRY_SECONDS = 1e-3
DEVICES = ("cpu", "cuda")  # whose autocast is restored


class interruptible:  # noqa: N801 - used like a function, as the context managers of torch are
    """Context that changes something and restores it, at whichever instruction the code inside is interrupted.

    The context is entered twice, ``with interruptible() as whole, whole``, and `_change` runs at the second entry.  So
    if an exception interrupts one exit, the other one restores all.  Signals do not interrupt the exits: they wait.
    Inside, `torch.inference_mode` is off.  Afterwards, the modes of torch and the filters of warnings are as before.
    Subclasses restore more.  Threads other than the main one are never interrupted.
    """

    ready = done = False
    handler: Any = None  # the handler of SIGINT before; None if this context has not replaced it
    frame: FrameType | None = None
    since: float | None = None  # when the interrupt came that is waiting

    def __enter__(self) -> Self:
        if not self.ready:  # nothing is changed before the second entry
            self.inference, self.mode = torch.is_inference_mode_enabled(), torch.inference_mode(False)
            self.settings = _settings()
            self._keep()
            self.ready = True
        else:
            self._handle(sys._getframe(1))
            if self.inference:
                self.mode.__enter__()
            self._change()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if self.done:
            return
        if error is not None and not isinstance(error, Exception):
            # The frames hold generators, such as that of a checkpoint, which close a context when they are freed.
            traceback.clear_frames(error.__traceback__)
        if torch.is_inference_mode_enabled() != self.inference:
            self.mode.__exit__(kind, error, None)
        self._restore(kind)
        _restore(self.settings)
        if self.handler is not None and signal.getsignal(signal.SIGINT) == self._interrupted:
            signal.signal(signal.SIGINT, self.handler)
        self.frame, self.done = None, True

    def _keep(self) -> None:
        """Remember what `_restore` needs."""

    def _change(self) -> None:
        """Make the changes that the code inside the context needs."""

    def _restore(self, kind: type[BaseException] | None) -> None:
        """Restore everything; called again if it was interrupted.  ``kind``: the type of the error inside, if any."""

    def _handle(self, frame: FrameType) -> None:
        """Handle SIGINT until the exit, unless an outer context does so, or it has no handler of Python."""
        if threading.get_ident() != threading.main_thread().ident:
            return
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and not isinstance(getattr(handler, "__self__", None), interruptible):
            self.frame, self.handler = frame, handler
            signal.signal(signal.SIGINT, self._interrupted)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        """Call the handler that was there before, at once or a little later."""
        self.since = time.monotonic() if self.since is None else self.since
        if not _waits(frame, self.frame) or time.monotonic() - self.since > MOST_SECONDS:
            self.since = None
            self.handler(number, frame)
        else:
            _thread.start_new_thread(_again, ())


class FunctionMode(TorchFunctionMode):
    """A mode that can be left after torch took it off to call a function without it, and was interrupted there."""

    def __exit__(self, *_: object) -> None:
        if _get_current_function_mode() is self:
            torch._C._pop_torch_function_stack()


def _waits(frame: FrameType | None, outermost: FrameType | None) -> bool:
    """Whether a frame, or one that called it inside of the outermost one, must not be interrupted."""
    while frame is not None and frame is not outermost:
        if frame.f_code.co_name in WAITS_FOR:
            return True
        frame = frame.f_back
    return False


def _settings() -> tuple[Any, ...]:
    """Settings of torch, numbers of modes, levels and contexts that are open, filters of warnings, saving hooks."""
    return (
        torch.is_grad_enabled(),
        [torch.is_autocast_enabled(device) for device in DEVICES],
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
        forward_ad._current_level,
        opened(),
        warnings.filters,
        _saving(),
    )


def _restore(settings: tuple[Any, ...]) -> None:
    """Close what an interrupted context has left open, and restore the other settings."""
    graded, autocast, dispatching, functions, level, reading, filters, hooks = settings
    while torch._C._len_torch_dispatch_stack() > dispatching:
        torch._C._pop_torch_dispatch_stack()
    while torch._C._len_torch_function_stack() > functions:
        torch._C._pop_torch_function_stack()
    while forward_ad._current_level > level:
        forward_ad.exit_dual_level()
    while (top := _saving()) is not None and (hooks is None or top[0] is not hooks[0]):
        torch._C._autograd._pop_saved_tensors_default_hooks()
    if opened() > reading:
        leave(reading)
    torch.set_grad_enabled(graded)
    for device, enabled in zip(DEVICES, autocast, strict=True):
        torch.set_autocast_enabled(device, enabled)
    warnings.filters = filters


def _saving() -> Any:
    """The innermost hooks of saved tensors, such as those of torch's checkpoints; None if there are none."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _again() -> None:
    """Interrupt the main thread after a pause.  A `threading.Timer` takes locks that the main thread may hold."""
    time.sleep(RETRY_SECONDS)
    _thread.interrupt_main()
