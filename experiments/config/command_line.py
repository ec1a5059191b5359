"""Start a command: with ``key=value`` arguments of its own, or with Hydra.  User errors end it with one sentence."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config import errors, overrides
from experiments.program import CONF, conf_folders, program, world_size
from gradscope.files import printable

Config = TypeVar("Config")


def parse(config: type[Config], arguments: Sequence[str], positional: str | None = None) -> Config:
    """An instance of a dataclass.  Arguments ``key=value``, ``--key=value`` or ``--switch`` replace the defaults.

    ``positional``: the key whose value may be given alone, without ``key=``, as a name or a path.
    """
    known = {field.name: field.default for field in fields(config)}  # type: ignore[arg-type]
    switches, plain = list[str](), dict[str, str | None]()
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and not equals and isinstance(known.get(key), bool):
            equals, value = "=", "true"
        if positional and not argument.startswith("--") and (not equals or (key not in known and "/" in argument)):
            plain[positional] = _text(argument)
            continue
        if not equals and not argument.startswith("--"):
            raise ValueError(f"{argument!r} is not key=value; keys are {', '.join(known)}.")
        if key not in known:
            near = errors.nearest(key, known)
            hint = f"did you mean {near!r}?" if near else f"keys are {', '.join(known)}."
            raise ValueError(f"Unknown key {key!r}; {hint}")
        if not equals:
            raise ValueError(f"{argument!r} needs a value: {key}=...")
        if isinstance(known[key], bool):
            switches.append(f"{key}={value}")
        else:
            plain[key] = _text(value)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(config), OmegaConf.from_dotlist(switches), plain)
        result: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    return result


def _text(value: str) -> str | None:
    """A text as it is, also if it has a meaning in YAML; null is None, and quotes around the whole text are dropped."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    return None if value == "null" else value.replace("${", "\\${")


def run(main: Callable[[Config], None], config: type[Config], positional: str | None = None) -> None:
    """Call ``main`` with the command-line arguments, or print help (``--help``).  User errors give no traceback."""
    if {"--help", "-h"} & {*sys.argv[1:]}:
        keys = [f"  {field.name}={field.default}" for field in fields(config)]  # type: ignore[arg-type]
        print("\n".join([_help(sys.modules[main.__module__]), "", inspect.cleandoc(config.__doc__ or ""), *keys]))
        return
    _refuse_torchrun("")
    try:
        main(parse(config, sys.argv[1:], positional))
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {printable(error)}")


def run_hydra(main: Callable[[], Any]) -> None:
    """Call a command of Hydra with the command-line arguments; the user's folder ``conf`` is searched first.

    An error of the configuration ends it with one sentence.
    """
    name = Path(inspect.getfile(inspect.unwrap(main))).stem  # of the file in conf/, too
    if {"--help", "-h"} & {*sys.argv[1:]}:
        print(f"{_help(sys.modules[main.__module__])}\n")
    _refuse_torchrun(name)
    Plugins.instance().register(OwnFolder)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises its errors instead of printing them
    try:
        sys.argv[1:] = overrides.with_study_defaults(overrides.checked(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"Error: {error}")
    try:
        main()
    except Exception as error:
        text = errors.sentence(error, name, overrides.only(sys.argv[1:]))
        if text is None:
            raise
        sys.exit(f"Error: {text}")


def _refuse_torchrun(name: str) -> None:
    if name != "train" and world_size() > 1:
        sys.exit("Error: only train uses several processes: start this command without torchrun.")


class OwnFolder(SearchPathPlugin):
    """Puts the user's folder of configurations before that of the experiments."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra before it reads a configuration."""
        for folder in conf_folders():
            if folder != CONF:
                search_path.prepend("user", f"file://{folder}", anchor="main")


def _help(module: ModuleType) -> str:
    """What a command does, with examples."""
    return inspect.cleandoc(module.__doc__ or "").replace("python -m experiments.", program(""))
