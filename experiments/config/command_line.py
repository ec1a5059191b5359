"""``key=value`` arguments: those of the commands without Hydra, and what a study adds to Hydra's."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Config = TypeVar("Config")


def parse(config: type[Config], arguments: Sequence[str], positional: str | None = None) -> Config:
    """The defaults of a dataclass with ``key=value``, ``--key=value`` or ``--switch`` arguments over them.

    ``positional``: the key of an argument that is a plain name or a path.

    Raises:
        ValueError: An argument has another form, an unknown key (the nearest is offered), or a value of a wrong type.
    """
    known = {field.name: field.default for field in fields(config)}  # type: ignore[arg-type]
    given, plain = [], {}
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and not equals and isinstance(known.get(key), bool):
            equals, value = "=", "true"
        if positional and not argument.startswith("--") and (not equals or (key not in known and "/" in argument)):
            plain[positional] = argument
            continue
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
        merged = OmegaConf.merge(OmegaConf.structured(config), OmegaConf.from_dotlist(given), plain)
        result: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    return result


def run(main: Callable[[Config], None], config: type[Config], positional: str | None = None) -> None:
    """Call ``main`` with the arguments of the command line, or print them (``--help``).

    A user's mistake ends the program with one line instead of a traceback.
    """
    if {"--help", "-h"} & {*sys.argv[1:]}:
        print(described(main, config))
        return
    try:
        main(parse(config, sys.argv[1:], positional))
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")


def described(main: Callable[[Config], None], config: type[Config]) -> str:
    """The help of a command: what it does, and its keys with their defaults."""
    keys = [f"  {field.name}={field.default}" for field in fields(config)]  # type: ignore[arg-type]
    text = inspect.cleandoc(sys.modules[main.__module__].__doc__ or "")
    return "\n".join([text, "", inspect.cleandoc(config.__doc__ or ""), *keys])


def with_study_defaults(arguments: Sequence[str], conf: Path) -> list[str]:
    """The arguments, in which a key given by the user replaces the same key in a study's sweep.

    Hydra's own sweeper would keep the later of two values; other sweepers need exactly one.
    """
    study = next((item.split("=", 1)[1] for item in arguments if item.startswith("study=")), None)
    path = conf / "study" / f"{study}.yaml"
    if study is None or not path.is_file():
        return list(arguments)
    params = yaml.safe_load(path.read_text()).get("hydra", {}).get("sweeper", {}).get("params", {})
    given = {item.lstrip("+").split("=", 1)[0] for item in arguments}
    sweeps = bool({"-m", "--multirun"} & set(arguments))
    if not given & params.keys() or not (sweeps or params.keys() <= given):
        return list(arguments)
    kept = [f"{key}={value}" for key, value in params.items() if key not in given]
    return [*arguments, "hydra.sweeper.params=null", *kept]


def refuse_part_of_study() -> None:
    """Check that a study that sweeps is started as a sweep, or with one value of each key that it sweeps.

    Raises:
        ValueError: It was started without ``-m`` and would be a single run with default values.
    """
    info = HydraConfig.get()
    given = {item.lstrip("+").split("=", 1)[0] for item in info.overrides.task}
    missing = [key for key in info.sweeper.get("params") or {} if key not in given]
    if info.mode is RunMode.RUN and missing:
        study = dict(info.runtime.choices)["study"]
        raise ValueError(
            f"study={study} sweeps {', '.join(missing)}: add -m to execute all of its runs, or "
            f"give one value of each ({' '.join(f'{key}=...' for key in missing)})."
        )
