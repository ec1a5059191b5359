"""Errors of a configuration in one sentence.  Hydra's own texts advise to add a key that is only misspelled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from experiments.program import CONF, conf_folders, program

MOST_CHARACTERS = 250  # of a list of names
MOST_VALUES = 50  # of one key that are tried to find the faulty one
# Settings of Hydra's own folders, which no command needs.
FOLDERS = ("hydra.run.", "hydra.sweep.", "hydra.output_subdir")
# What OmegaConf calls a type -> what a user may give.
KINDS = {
    "Integer": "a whole number", "Float": "a number", "bool": "true or false", "string": "text",
    "ListConfig": "a list, as in key=[a,b]",
}  # fmt: skip


def sentence(error: Exception, command: str, overrides: Sequence[str]) -> str | None:
    """What is wrong with which key, and the nearest key or option.  None if the configuration can be composed.

    Arguments:
        command: The name of the command and of its file in conf/, such as "measure".
        overrides: All overrides of the command line.
    """
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and isinstance(cause.parent_node, DictConfig):
        return _unknown_key(str(cause.full_key), cause.parent_node)
    if isinstance(error, MissingConfigException) and error.options:
        whole = str(error.missing_cfg_file)
        group, _, name = whole.partition("/") if whole.partition("/")[0] in groups() else whole.rpartition("/")
        options = [option for option in error.options if not option.endswith("_schema")]
        near = nearest(name, options)
        return f"{group} has no option {name!r}; {f'did you mean {near!r}?' if near else _listed('options', options)}"
    line, base = _culprit(command, overrides)
    if line is not None:
        return _refused(line, base, cause or error, command)
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {_first_line(cause)}"
    if isinstance(error, OSError) and (own := [item for item in overrides if item.startswith(FOLDERS)]):
        return f"{own[0]!r}: cannot write to {error.filename}: {error.strerror}; leave it out, and use results=FOLDER."
    return _first_line(error) if isinstance(error, HydraException) else None


def _culprit(command: str, overrides: Sequence[str]) -> tuple[str | None, DictConfig]:
    """The first override that cannot be composed (None: all can), and the configuration of those before it."""
    done: list[str] = []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        base, chosen = compose(command, return_hydra_config=True), groups()
        # Hydra chooses options before it sets keys, whatever their order.
        for item in sorted(overrides, key=lambda item: item.partition("=")[0] not in chosen):
            override = OverridesParser.create().parse_overrides([item])[0]
            values = [item]
            if override.is_discrete_sweep() and not isinstance(override.value(), Glob):
                key = override.get_key_element()
                values = [f"{key}={value}" for value in islice(override.sweep_string_iterator(), MOST_VALUES)]
            elif override.is_sweep_override():  # names of options, or an interval for sweepers that search
                continue
            for value in reversed(values):  # the first value is the one that the next overrides see
                try:
                    base = compose(command, [*done, value], return_hydra_config=True)
                except Exception:
                    return value, base
            done += values[:1]
    return None, base


def _refused(line: str, base: DictConfig, cause: BaseException, command: str) -> str:
    """Why an override cannot be applied to a configuration."""
    if line.lstrip("+~").startswith("hydra/"):
        return f"{line!r}: {_last_reason(cause)}; leave it out, or give the name of an option without a sign before it."
    sign, key = line[: len(line) - len(line.lstrip("+~"))], line.lstrip("+~").partition("=")[0]
    node: Any = base
    above: list[str] = []
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            whole = ".".join(above)
            example = "[...]" if isinstance(node, ListConfig) else "..."
            return f"{line!r}: {whole} is one value without parts; give it as a whole, {whole}={example}"
        if part not in node.keys():  # a missing value counts as a key, too  # noqa: SIM118
            if above or part not in groups():
                return _unknown_key(key, node)
            break
        above.append(part)
        node = None if OmegaConf.is_missing(node, part) else node._get_node(part)
    if sign == "~":
        return f"{line!r}: this key cannot be removed; give it another value, {key}=..."
    if sign == "+":
        return f"{line!r}: {key} exists already; leave out the sign before it."
    if key in groups() and isinstance(cause, HydraException):
        other = program("train" if command == "measure" else "measure")
        return f"{line!r} does not fit {program(command)} ({_last_reason(cause)}); is it for {other}?"
    text = _first_line(cause)
    kind = next((kind for name, kind in KINDS.items() if name in text), None)
    if "not Optional" in text:
        return f"{line!r}: {key} needs a value and cannot be null."
    part = "each part of " if str(getattr(cause, "full_key", "")).endswith("]") else ""
    return f"{line!r}: {part}{key} must be {kind}." if kind else f"{line!r}: {text}"


def _unknown_key(path: str, parent: DictConfig) -> str:
    """The error for a key; keys beside it are near, then keys with nearly the same last part."""
    above, _, key = path.rpartition(".")
    beside = [str(name) for name in parent if above or name != "hydra"]
    if not above:
        if key in groups():
            return f"{key} is a group of options and has no keys; choose an option, such as {key}={groups()[key][0]}."
        beside += sorted({*groups()} - {*beside})
    root = parent._get_root()
    paths = list(_paths(root)) if isinstance(root, DictConfig) else []
    last = {known.rpartition(".")[2]: known for known in reversed(paths)}
    prefix = f"{above}." if above else ""
    if key == "_target_":
        return f"{above} has no _target_ yet: add it with a plus sign, +{path}=package.module.Name."
    if (near := nearest(key, beside)) is not None:
        return f"Unknown key {path!r}; did you mean '{prefix}{near}'?"
    if (near := nearest(key, last)) is not None and last[near] != path:
        return f"Unknown key {path!r}; did you mean {last[near]!r}?"
    return f"Unknown key {path!r}; {_listed(f'keys of {above}' if above else 'keys', beside)}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most similar to ``name``; exchanged letters rank first.  None if no name is similar."""
    return max(get_close_matches(name, list(known)), key=lambda other: sorted(other) == sorted(name), default=None)


def groups() -> dict[str, list[str]]:
    """The groups of configurations, here and in the package, with their options."""
    found: dict[str, set[str]] = {}
    for path in (path for folder in conf_folders() for path in folder.glob("*/*.yaml")):
        found.setdefault(path.parent.name, set()).add(path.stem)
    return {name: sorted(options) for name, options in sorted(found.items())}


def _listed(what: str, names: Sequence[str]) -> str:
    """The names as the end of a sentence; of many names, the first ones."""
    text = ", ".join(names)
    if len(text) > MOST_CHARACTERS:
        text = f"{text[:MOST_CHARACTERS].rpartition(', ')[0]} and others"
    return f"{what} are {text}." if names else f"there are no {what}."


def _paths(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """The paths of all keys of a configuration, without Hydra's own."""
    for key in map(str, node):
        value: Any = None if OmegaConf.is_missing(node, key) else node._get_node(key)
        if prefix or key != "hydra":
            yield f"{prefix}{key}"
            if isinstance(value, DictConfig) and not value._is_none():
                yield from _paths(value, f"{prefix}{key}.")


def _last_reason(error: BaseException) -> str:
    """What OmegaConf said of a file, which Hydra repeats below its own first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "full_key:" not in line]
    return lines[min(1, len(lines) - 1)][:MOST_CHARACTERS]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:MOST_CHARACTERS]
