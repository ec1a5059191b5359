"""``key=value`` arguments: parsing for commands without Hydra, and arguments that a study adds to a Hydra command."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from types import ModuleType
from typing import Any, TypeVar

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config import errors
from experiments.program import CONF, conf_folders, program

Config = TypeVar("Config")


def parse(config: type[Config], arguments: Sequence[str], positional: str | None = None) -> Config:
    """An instance of a dataclass.  Arguments ``key=value``, ``--key=value`` or ``--switch`` replace the defaults.

    ``positional``: the key whose value may be given alone, without ``key=``, as a name or a path.
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
            near = errors.nearest(key, known)
            hint = f"did you mean {near!r}?" if near else f"keys are {', '.join(known)}."
            raise ValueError(f"Unknown key {key!r}; {hint}")
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
    """Call ``main`` with the command-line arguments, or print help (``--help``).  User errors give no traceback."""
    if {"--help", "-h"} & {*sys.argv[1:]}:
        keys = [f"  {field.name}={field.default}" for field in fields(config)]  # type: ignore[arg-type]
        print("\n".join([_help(sys.modules[main.__module__]), "", inspect.cleandoc(config.__doc__ or ""), *keys]))
        return
    try:
        main(parse(config, sys.argv[1:], positional))
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")


def run_hydra(main: Callable[[], Any]) -> None:
    """Call a command of Hydra with the command-line arguments; the user's folder ``conf`` is searched first.

    An error of the configuration ends it with one sentence.
    """
    if {"--help", "-h"} & {*sys.argv[1:]}:
        print(f"{_help(sys.modules[main.__module__])}\n")
    Plugins.instance().register(OwnFolder)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises its errors instead of printing them
    try:
        sys.argv[1:] = with_study_defaults(sys.argv[1:])
        main()
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"Error: {errors.sentence(error)}")


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


def with_study_defaults(arguments: Sequence[str]) -> list[str]:
    """The arguments, changed so that a key given by the user replaces the values that the study sweeps for this key."""
    study = next((item.split("=", 1)[1] for item in arguments if item.startswith("study=")), None)
    paths = [folder / "study" / f"{study}.yaml" for folder in conf_folders()]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return list(arguments)
    params = yaml.safe_load(path.read_text()).get("hydra", {}).get("sweeper", {}).get("params", {})
    given = _keys(arguments)
    sweeps = bool({"-m", "--multirun"} & set(arguments))
    if not given & params.keys() or not (sweeps or params.keys() <= given):
        return list(arguments)
    kept = [f"{key}={value}" for key, value in params.items() if key not in given]
    return [*arguments, "hydra.sweeper.params=null", *kept]


def refuse_part_of_study() -> None:
    """Raise ValueError if a study that sweeps is started without ``-m`` and without a value for each swept key."""
    info = HydraConfig.get()
    missing = [key for key in info.sweeper.get("params") or {} if key not in _keys(info.overrides.task)]
    if info.mode is RunMode.RUN and missing:
        raise ValueError(
            f"study={info.runtime.choices['study']} sweeps {', '.join(missing)}: add -m to execute all of its runs, or "
            f"give one value for each ({' '.join(f'{key}=...' for key in missing)})."
        )


def _keys(arguments: Sequence[str]) -> set[str]:
    return {item.lstrip("+").split("=", 1)[0] for item in arguments}
