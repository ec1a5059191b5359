"""Errors of a configuration in one sentence.  Hydra's own texts advise to add a key that is only misspelled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from experiments.program import conf_folders


def sentence(error: HydraException | OmegaConfBaseException) -> str:
    """What is wrong with which key, and the nearest key or option of this configuration."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and isinstance(cause.parent_node, DictConfig):
        return _unknown_key(str(cause.full_key), cause.parent_node)
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {_first_line(cause)}"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        options = [option for option in error.options if not option.endswith("_schema")]
        near = nearest(name, options)
        hint = f"did you mean {near!r}?" if near else f"options are {', '.join(options)}."
        return f"{group} has no option {name!r}; {hint}"
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} is not key=value; values with special characters need quotes, such as key='a=b'."
    return _first_line(error)


def _unknown_key(path: str, parent: DictConfig) -> str:
    """The error for a key; keys beside it are near, then keys with nearly the same last part."""
    above, _, key = path.rpartition(".")
    beside = [str(name) for name in parent if above or name != "hydra"]
    if not above:
        groups = {folder.name for conf in conf_folders() for folder in conf.iterdir() if (folder / ".").is_dir()}
        beside += sorted(groups - {"__pycache__", *beside})
    root = parent._get_root()
    paths = list(_paths(root)) if isinstance(root, DictConfig) else []
    last = {known.rpartition(".")[2]: known for known in reversed(paths)}
    prefix = f"{above}." if above else ""
    if (near := nearest(key, beside)) is not None:
        return f"Unknown key {path!r}; did you mean '{prefix}{near}'?"
    if (near := nearest(key, last)) is not None:
        return f"Unknown key {path!r}; did you mean {last[near]!r}?"
    return f"Unknown key {path!r}; keys{f' of {above}' if above else ''} are {', '.join(beside)}."


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most similar to ``name``; exchanged letters rank first.  None if no name is similar."""
    return max(get_close_matches(name, list(known)), key=lambda other: sorted(other) == sorted(name), default=None)


def _paths(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """The paths of all keys of a configuration, without Hydra's own."""
    for key in map(str, node):
        value: Any = None if OmegaConf.is_missing(node, key) else node._get_node(key)
        if prefix or key != "hydra":
            yield f"{prefix}{key}"
            if isinstance(value, DictConfig) and not value._is_none():
                yield from _paths(value, f"{prefix}{key}.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
