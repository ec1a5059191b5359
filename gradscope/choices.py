"""Checks of arguments: `checked` compares them with the annotations of a function, which may hold ranges."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import reprlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from numbers import Integral, Number, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
import pandas as pd

MOST = 1_000_000  # items of a sequence
MOST_LISTED = 8  # names in a message
MOST_NAME = 255  # bytes of the name of a file
NUMERIC = frozenset(
    "index depth_from_output value log10_value log10_low log10_high log10_stderr_probe log10_stderr_sample "
    "stderr_sample step head rate rate_low rate_high width weight_variance bias_variance".split()
)
COMPLETE = frozenset(["layer", "quantity"])  # columns of a frame without nulls
UNFIT = (TypeError, ValueError, ArithmeticError, RuntimeError)  # what a conversion of an unfit value raises
Function = TypeVar("Function", bound=Callable[..., Any])


class ArgumentError(TypeError, ValueError):
    """An argument has a wrong type or value; both at once, because "exact" or 3 may be of the wrong type or value."""


class Range(NamedTuple):
    """In ``Annotated[kind, Range(text, test)]``: which values of this kind an argument may have."""

    text: str
    test: Callable[[Any], bool]


Known = Annotated[float, Range("a number other than NaN", lambda number: number == number)]
Finite = Annotated[float, Range("a finite number", math.isfinite)]
Positive = Annotated[float, Range("a finite number > 0", lambda number: 0 < number < math.inf)]
Nonnegative = Annotated[float, Range("a finite number >= 0", lambda number: 0 <= number < math.inf)]
Share = Annotated[float, Range("a number in (0, 1]", lambda number: 0 < number <= 1)]
Probability = Annotated[float, Range("a number in [0, 1]", lambda number: 0 <= number <= 1)]
Level = Annotated[float, Range("a number between 0 and 1, such as 0.05 or 0.95", lambda number: 0 < number < 1)]
Cosine = Annotated[float, Range("a number in [-1, 1]", lambda number: abs(number) <= 1)]
Size = Annotated[int, Range("an integer of at least 1", lambda number: number >= 1 and number is not True)]
Depth = Annotated[Size, Range("an integer from 1 to 100,000", lambda number: 1 <= number <= 100_000)]
Numbers = Annotated[npt.ArrayLike, Range("a number or an array of numbers", lambda array: array.dtype.kind in "biuf")]
FiniteNumbers = Annotated[Numbers, Range("finite numbers", lambda a: a.size and np.isfinite(a).all())]
Lengths = Annotated[Numbers, Range("finite numbers >= 0", lambda a: a.size and ((a >= 0) & np.isfinite(a)).all())]
Row = Annotated[Lengths, Range("finite numbers >= 0 in one dimension", lambda array: array.ndim <= 1)]
PathLike = Annotated[str | Path, Range("the path of a file or folder", lambda path: _possible(str(path)))]


def check_choice(name: str, choice: object, known: Iterable[str]) -> None:
    """Raise ValueError if ``choice``, the value of argument ``name``, is not in ``known``; suggest the closest name."""
    if not isinstance(choice, str) or choice not in tuple(known):
        close = get_close_matches(str(choice), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {shown(choice)}{hint}")


def require(frame: pd.DataFrame, names: Sequence[str], maker: str) -> None:
    """ValueError that names the columns that the frame lacks or has twice, or that hold nulls or no numbers."""
    if not frame.columns.is_unique:
        raise ValueError(f"The frame has the column {frame.columns[frame.columns.duplicated()][0]!r} more than once.")
    if lacking := [name for name in names if name not in frame]:
        columns = "column" if len(lacking) == 1 else "columns"
        raise ValueError(
            f"The frame lacks the {columns} {listed(lacking)}; it has {listed(frame.columns)}. Draw a frame of {maker}."
        )
    for name in COMPLETE.intersection(names):
        if frame[name].isna().any():
            raise ValueError(f"Column {name!r} of the frame must not hold nulls.")
    for name in NUMERIC.intersection(names):
        if len(known := frame[name].dropna().infer_objects()) and not pd.api.types.is_numeric_dtype(known):
            raise ValueError(f"Column {name!r} of the frame must hold numbers, got {shown(known.iloc[0])}.")


def listed(names: Iterable[object]) -> str:
    """The names in quotes, the first few of them if there are many."""
    words = [repr(name) for name in names]
    rest = len(words) - MOST_LISTED
    return ", ".join(words[:MOST_LISTED]) + (f" and {rest} more" if rest > 0 else "") if words else "none"


def checked(function: Function) -> Function:
    """Return a function that compares its arguments with its annotations, or a class whose public methods do so.

    Scalars of numpy and torch become Python numbers, arrays of torch become those of numpy, and sequences become lists.
    An annotation that is no type, such as a protocol, is not compared.  Cost: 1 to 2 us per argument.

    Raises:
        ArgumentError: An argument does not fit; the message has its name, what it must be, and its value.

    >>> @checked
    ... def half(number: Positive, digits: int | None = None) -> float:
    ...     return round(number / 2, digits)
    >>> half(np.float32(3.0), digits=1)
    1.5
    >>> half("3")
    Traceback (most recent call last):
    gradscope.choices.ArgumentError: number must be a finite number > 0, got '3'.
    """
    if isinstance(function, type):
        for name, method in list(vars(function).items()):
            if inspect.isfunction(method) and (name == "__init__" or not name.startswith("_")):
                setattr(function, name, checked(method))
        return function
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    rules: dict[str, _Rule] = {}

    @wraps(function)
    def compared(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if not rules:  # annotations may hold names that are known only when all modules are imported
            hints = get_type_hints(function, include_extras=True)
            rules.update({name: _rule(hints.get(name, Any)) for name in (*names, *hints)})
        for place, (name, value) in enumerate(zip(names, args, strict=False)):
            if type(value) not in rules[name].exact and (found := rules[name].fitting(name, value)) is not value:
                args = (*args[:place], found, *args[place + 1 :])
        for name, value in kwargs.items():
            if (rule := rules.get(name, ANY)) is not ANY and type(value) not in rule.exact:
                kwargs[name] = rule.fitting(name, value)
        return function(*args, **kwargs)

    return compared  # type: ignore[return-value]


def shown(value: object) -> str:
    """Return a short text for a value: itself if it is plain, else the name of its type."""
    plain = (str, bytes, Number, NoneType, list, tuple, dict, set, range)
    with contextlib.suppress(*UNFIT):  # an integer of more than 4300 digits has no text
        return reprlib.repr(value) if isinstance(value, plain) else type(value).__name__
    return f"a strange {type(value).__name__}"


def stacklevel() -> int:
    """Return the ``stacklevel`` at which a warning of the function that calls this one names the user's line."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("gradscope."):
        frame, level = frame.f_back, level + 1
    return level


class _Rule(NamedTuple):
    """What an argument must be, in words, and the function that returns the fitting value, or raises `UNFIT`."""

    text: str
    convert: Callable[[Any], Any]
    exact: Collection[type] = ()  # values of these types fit as they are

    def fitting(self, name: str, value: Any) -> Any:
        __tracebackhide__ = True
        try:
            return self.convert(value)
        except UNFIT:
            raise ArgumentError(f"{name} must be {self.text}, got {shown(value)}.") from None


def _rule(kind: Any) -> _Rule:
    """The rule of an annotation."""
    origin, args = get_origin(kind), get_args(kind)
    if kind in PLAIN:
        return PLAIN[kind]
    if origin is Annotated:
        base, limits = _rule(args[0]).convert, args[1:]
        return _Rule(limits[-1].text, lambda value: _within(base(value), limits))
    if origin is np.ndarray or kind == npt.ArrayLike:
        return _Rule("an array of numbers", _array)
    if origin in (Union, UnionType):
        rules = sorted(map(_rule, args), key=lambda rule: rule.text == "None")
        exact = frozenset(kind for rule in rules for kind in rule.exact)
        return _Rule(" or ".join(rule.text for rule in rules), lambda value: _first(rules, value), exact)
    if origin is Callable:
        num = None if args[0] is Ellipsis else len(args[0])
        text = "a function" if num is None else f"a function of {num} argument{'s' * (num != 1)}"
        return _Rule(text, lambda value: _function(value, num))
    if origin is tuple and args[1:] != (Ellipsis,):
        parts = [_rule(part).convert for part in args]
        text = f"{len(args)} items, each {_rule(args[0]).text}"
        return _Rule(text, lambda value: tuple(p(item) for p, item in zip(parts, _items(value), strict=True)))
    if origin in (tuple, Sequence):
        text, convert, _ = _rule(args[0])
        text = f"a sequence such as a list, each item {text}"
        return _Rule(text, lambda value: (tuple if origin is tuple else list)(map(convert, _items(value))))
    if origin is Mapping:
        (_, key, _), (text, convert, _) = map(_rule, args)
        return _Rule(
            f"a mapping such as a dict, each value {text}",
            lambda value: {key(name): convert(item) for name, item in _need(isinstance(value, Mapping), value).items()},
        )
    own = origin or kind
    if not isinstance(own, type) or (
        getattr(own, "_is_protocol", False) and not getattr(own, "_is_runtime_protocol", False)
    ):
        return ANY
    place = "torch.nn" if own.__module__.startswith("torch.nn") else own.__module__.partition(".")[0]
    text = f"a {'' if place in ('builtins', 'collections') else f'{place}.'}{own.__name__}"
    return _Rule(text, lambda value: _need(isinstance(value, own), value), (own,))


def _possible(path: str) -> bool:
    """Whether a file may have this path: systems refuse an empty one, a null character, and names of over 255 bytes."""
    return path != "" and "\0" not in path and all(len(os.fsencode(part)) <= MOST_NAME for part in Path(path).parts)


def _within(value: Any, limits: Sequence[Range]) -> Any:
    return _need(all(limit.test(value) for limit in limits), value)


def _need(fits: object, value: Any) -> Any:
    if not fits:
        raise TypeError
    return value


def _first(rules: Sequence[_Rule], value: Any) -> Any:
    for rule in rules:
        try:
            return rule.convert(value)
        except UNFIT:
            continue
    raise TypeError


def _function(value: Any, num: int | None) -> Any:
    signature = None
    with contextlib.suppress(TypeError, ValueError):  # a function written in C need not have a signature
        called = value.forward if hasattr(value, "_forward_hooks") else value  # a module passes its arguments on
        signature = inspect.signature(called) if num is not None else None
    _need(getattr(getattr(value, "forward", None), "__name__", "") != "_forward_unimplemented", value)
    return _need(callable(value) and (signature is None or signature.bind(*[None] * (num or 0))), value)


def _items(value: Any) -> Sequence[Any]:
    value = value.tolist() if getattr(value, "ndim", None) == 1 else value
    return _need(isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value) <= MOST, value)


def _number(value: Any) -> Any:
    value = value.item() if not isinstance(value, Number) and getattr(value, "ndim", None) == 0 else value
    return _need(isinstance(value, Number), value)


def _integer(value: Any) -> Any:
    if type(value) is int and abs(value) < 2**63:
        return value
    number = _number(value)
    whole = isinstance(number, Integral) or (isinstance(number, Real) and float(number).is_integer())
    return number if isinstance(number, bool) else _need(whole and abs(int(number)) < 2**63, int(number))


def _real(value: Any) -> Any:
    number = value if type(value) is float else _number(value)
    return number if type(number) is int and abs(number) < 1e300 else float(_need(isinstance(number, Real), number))


def _array(value: Any) -> Any:
    value = value.detach().cpu() if hasattr(value, "detach") else value
    short = hasattr(value, "dtype") or not hasattr(value, "__len__") or len(value) <= MOST
    found = np.asarray(_need(short and value is not None, value))
    large = found.dtype.kind == "O" or found.dtype.char == "Q"  # an integer from 2**63 on, which torch does not take
    return found.astype(np.float64) if large else _need(found.dtype.kind in "biufc", found)


ANY = _Rule("anything", lambda value: value)
PLAIN: dict[Any, _Rule] = {
    Any: ANY,
    NoneType: _Rule("None", lambda value: _need(value is None, value), (NoneType,)),
    int: _Rule("an integer", _integer),
    float: _Rule("a number", _real, (float,)),
    bool: _Rule("True or False", lambda value: bool(_need((number := _number(value)) in (0, 1), number)), (bool,)),
    str: _Rule("a string", lambda value: _need(isinstance(value, str) and value.encode() is not None, value)),
    Path: _Rule("a path", lambda value: Path(_need(isinstance(value, os.PathLike), value))),
}
