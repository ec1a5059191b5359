"""``key=value`` arguments of the commands that only read and draw, checked against a dataclass of defaults."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Config = TypeVar("Config")


def parse(config: type[Config], arguments: list[str]) -> Config:
    """Defaults of the dataclass with ``key=value`` arguments over them; also ``--key=value``, ``--switch``.

    Raises:
        ValueError: Not of that form, an unknown key (the nearest is offered), or a value of the wrong type.
    """
    known = {field.name: field.default for field in fields(config)}  # type: ignore[arg-type]
    given = []
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and not equals and isinstance(known.get(key), bool):
            equals, value = "=", "true"
        if not equals and not argument.startswith("--"):
            raise ValueError(f"{argument!r} is not key=value; keys are {', '.join(known)}.")
        if key not in known:
            close = get_close_matches(key, known, n=1)
            raise ValueError(
                f"Unknown key {key!r}"
                + (f"; did you mean {close[0]!r}?" if close else f"; keys are {', '.join(known)}.")
            )
        if not equals:
            raise ValueError(f"{argument!r} needs a value: {key}=...")
        given.append(f"{key}={value}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(config), OmegaConf.from_dotlist(given))
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    result: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    return result


def run(main: Callable[[Config], None], config: type[Config]) -> None:
    """Call ``main`` with the command line's arguments, or tell what they are (``--help``); a user's mistake ends with
    one line instead of a traceback."""
    if {"--help", "-h"} & {*sys.argv[1:]}:
        print(described(main, config))
        return
    try:
        main(parse(config, sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")


def described(main: Callable[[Config], None], config: type[Config]) -> str:
    """What the command does, and its keys with their defaults."""
    keys = [f"  {field.name}={field.default}" for field in fields(config)]  # type: ignore[arg-type]
    text = inspect.cleandoc(sys.modules[main.__module__].__doc__ or "")
    return "\n".join([text, "", inspect.cleandoc(config.__doc__ or ""), *keys])
