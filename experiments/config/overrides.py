"""The arguments of a Hydra command: put in Hydra's order, and refused in one sentence before Hydra reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException
from hydra.types import RunMode

from experiments.config.errors import groups, nearest
from experiments.program import conf_folders

SWEEP = ("-m", "--multirun")
# Options of Hydra, and those of them that take the next argument as their value.
VALUED = ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--info", "-i")
OPTIONS = (*SWEEP, *VALUED, "--resolve", "--run", "-r", "--help", "-h", "--hydra-help", "--version")
# Groups of Hydra's own options, which are chosen with a slash.
OWN = re.compile(r"hydra\.(sweeper|launcher|job_logging|hydra_logging|help|hydra_help|env)")
KEY = re.compile(r"(\+{1,2}|~)?[A-Za-z_$]\w*([./@:][A-Za-z0-9_]\w*)*", re.ASCII)
PAIRS = (("(", ")"), ("[", "]"), ("{", "}"))


def checked(arguments: Sequence[str]) -> list[str]:
    """The arguments with all overrides before all options, because Hydra's parser cannot mix them.

    Raises:
        ValueError: An option is unknown, or an override cannot be read or has no key.
    """
    given = only(arguments)
    options = [item for item in arguments if item not in given]
    for item in options:
        name, equals, _ = item.partition("=")
        if name.startswith("-") and (name not in OPTIONS or (equals and name not in VALUED)):
            hint = "-m runs all combinations of values, --cfg job prints the configuration"
            raise ValueError(f"Unknown option {item!r}; options are {', '.join(OPTIONS)}: {hint}.")
    sweeps = any(item in SWEEP for item in options)
    for item in given:
        _check(parsed(item), sweeps)
    return [*given, *options]


def only(arguments: Sequence[str]) -> list[str]:
    """The overrides among the arguments."""
    before = ["", *arguments]
    pairs = zip(before, arguments, strict=False)
    return [item for last, item in pairs if not item.startswith("-") and last not in VALUED]


def parsed(item: str) -> Override:
    """An override.  ValueError says which part of it cannot be read."""
    key, equals, value = item.partition("=")
    if not key.lstrip("+~"):
        raise ValueError(f"{item!r} has no key: write key=value, such as seed=3.")
    if not KEY.fullmatch(key):
        raise ValueError(f"{item!r}: {key!r} is not the name of a key; write key=value without spaces, as in seed=3.")
    try:
        return OverridesParser.create().parse_overrides([item])[0]
    except OverrideParseException as error:
        if not equals:
            raise ValueError(f"{item!r} is not key=value.") from error
        for opening, closing in PAIRS:
            if value.count(opening) != value.count(closing):
                raise ValueError(f"{item!r}: brackets {opening} and {closing} do not match.") from error
        if odd := [quote for quote in ("'", '"') if value.count(quote) % 2]:
            other = "'" if odd[0] == '"' else '"'
            raise ValueError(
                f"{item!r}: a quote {odd[0]} is not closed. If it belongs to the value, write the value between "
                f"{other} and {other}."
            ) from error
        quoted = f"{key}='{value.strip()}'" if "'" not in value else f"{key}=..."
        raise ValueError(
            f"{item!r}: the value cannot be read. Several values are 1,2 or range(3); a text with special characters "
            f'needs two pairs of quotes, for the shell and for the value: "{quoted}".'
        ) from error


def _check(override: Override, sweeps: bool) -> None:
    key, line = override.key_or_group, str(override.input_line)
    value = line.partition("=")[2]
    if override.is_delete() and "." not in key:
        known = [*groups(), *(name for name in _top())]
        near = None if key in known else nearest(key, known)
        raise ValueError(
            f"Unknown key {key!r}; did you mean {near!r}?" if near else
            f"{line!r}: only keys inside of a group can be removed; give {key} another value, {key}=..."
        )  # fmt: skip
    if OWN.fullmatch(key) and not value.startswith("{"):
        raise ValueError(
            f"{line!r}: choose an option of {key} with a slash, {key.replace('.', '/')}={value or 'NAME'}."
        )
    if override.is_sweep_override() and not sweeps:
        whole = "" if "(" in value else f", or write {key}=[{value}] for one list"
        raise ValueError(f"{line!r} gives several values: add -m to run each of them{whole}.")
    if key in groups() and (value.endswith((".yaml", ".yml")) or value.startswith((".", "/"))):
        raise ValueError(
            f"{line!r}: {key} takes the name of a file in conf/{key}, as in {key}={PurePosixPath(value).stem}. "
            f"Copy a file from elsewhere to conf/{key} in the current folder."
        )
    if key in groups() and value == "null":
        raise ValueError(f"{line!r}: {key} needs one of its options, such as {groups()[key][0]}.")


def _top() -> list[str]:
    """The keys at the top level of all commands."""
    texts = [(conf_folders()[-1] / name).read_text() for name in ("measure.yaml", "train.yaml")]
    return sorted({key for text in texts for key in yaml.safe_load(text)} - {"defaults"})


def with_study_defaults(arguments: Sequence[str]) -> list[str]:
    """The arguments, changed so that a key given by the user replaces the values that the study sweeps for this key."""
    study = next((item.split("=", 1)[1] for item in arguments if item.startswith("study=")), None)
    paths = [folder / "study" / f"{study}.yaml" for folder in conf_folders()]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return list(arguments)
    params = yaml.safe_load(path.read_text()).get("hydra", {}).get("sweeper", {}).get("params", {})
    given = _keys(arguments)
    sweeps = bool({*SWEEP} & set(arguments))
    if not given & params.keys() or not (sweeps or params.keys() <= given):
        return list(arguments)
    kept = [f"{key}={value}" for key, value in params.items() if key not in given]
    return ["hydra.sweeper.params=null", *kept, *arguments]


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
