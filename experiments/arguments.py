"""``key=value`` arguments of the commands that only read and draw, checked against a dataclass of defaults."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Config = TypeVar("Config")


def parse(config: type[Config], arguments: list[str]) -> Config:
    """Defaults of the dataclass with ``key=value`` arguments over them.

    Raises:
        ValueError: Not of that form, an unknown key (the nearest is offered), or a value of the wrong type.
    """
    known = [field.name for field in fields(config)]  # type: ignore[arg-type]
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals:
            raise ValueError(f"{argument!r} is not key=value; keys are {', '.join(known)}.")
        if key not in known:
            close = get_close_matches(key, known, n=1)
            raise ValueError(
                f"Unknown key {key!r}"
                + (f"; did you mean {close[0]!r}?" if close else f"; keys are {', '.join(known)}.")
            )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(config), OmegaConf.from_dotlist(arguments))
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    result: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    return result


def run(main: Callable[[Config], None], config: type[Config]) -> None:
    """Call ``main`` with the command line's arguments; a user's mistake ends with one line instead of a traceback."""
    try:
        main(parse(config, sys.argv[1:]))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"Error: {error}")
