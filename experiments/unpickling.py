"""Reads pickled numpy arrays without ever running what a pickle asks for: a data file must not run code."""

from __future__ import annotations

import codecs
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt


class PickledArray:
    """Stands in for numpy's array and dtype, and keeps what a pickle hands to them."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class ArrayUnpickler(pickle.Unpickler):
    """Admits plain values and numpy arrays; every other global is refused before it is imported.

    Numpy's own functions stay out as well: with forged dtype flags, a pickle of nothing but an array makes numpy take
    bytes of the file for addresses of objects.
    """

    ADMITTED: ClassVar[dict[str, Callable[..., object]]] = {
        "numpy.core.multiarray._reconstruct": PickledArray,
        "numpy._core.multiarray._reconstruct": PickledArray,
        "numpy.ndarray": PickledArray,
        "numpy.dtype": PickledArray,
        "_codecs.encode": codecs.encode,  # how protocol 2 spells bytes
    }

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of an admitted global, or an UnpicklingError that names the forbidden one."""
        if f"{module}.{name}" not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it asks for the forbidden global {module}.{name}, which could run code")
        return self.ADMITTED[f"{module}.{name}"]


def decode(array: PickledArray) -> npt.NDArray[np.uint8]:
    """The bytes of a pickled uint8 array; any other dtype is a TypeError."""
    _, shape, dtype, fortran, raw = array.state
    if dtype.args[0] not in ("u1", b"u1"):
        raise TypeError(f"data has dtype {dtype.args[0]!r}, expected uint8")
    return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
