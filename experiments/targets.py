"""Functions and classes that a configuration names by ``_target_``, and the arguments that they take."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from difflib import get_close_matches
from functools import cache
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from experiments.program import CONF

# Classes that a configuration may name: they compute, and neither read, write nor run anything.
CLASSES = re.compile(r"torch\.(nn|optim)\.[A-Z]\w*|gradscope\.models\.([a-z]\w*\.)?[A-Z]\w*")
KINDS = torch.nn.Module, torch.optim.Optimizer
MOST_CHARACTERS = 150  # of the reason why something cannot be imported


def called(cfg: Any, name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function or class that ``cfg._target_`` names, and a copy of the other keys, which are its arguments.

    Raises:
        ValueError: There is no ``_target_``, or it cannot be imported or called.  ``name`` is that of the group.
    """
    values: Any = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else deepcopy(cfg)
    if not isinstance(values, dict) or not isinstance(path := values.pop("_target_", None), str):
        raise ValueError(f"{name} needs a function or class, as in +{name}._target_=package.module.Name; got {cfg!r}.")
    try:
        found = pkgutil.resolve_name(path)
    except Exception as error:  # code of the user's module may raise anything
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:MOST_CHARACTERS]
        raise ValueError(f"{name}._target_={path} cannot be imported ({reason}); write package.module.Name.") from error
    if not callable(found):
        raise ValueError(f"{name}._target_={path} is a {type(found).__name__}, not a function or class.")
    return found, values


def parameters(make: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """The parameters of a function or class by name; None if a class written in C has no signature."""
    try:
        return dict(inspect.signature(make).parameters)
    except ValueError:
        return None


def foreign(make: Callable[..., Any], keys: Iterable[str]) -> list[str]:
    """The keys that are no arguments of a function or class."""
    taken = parameters(make)
    if taken is None or any(one.kind is one.VAR_KEYWORD for one in taken.values()):
        return []
    return [key for key in keys if key not in taken]


def check(make: Callable[..., Any], arguments: Iterable[str], name: str) -> None:
    """Raise ValueError for the first argument that a function or class does not take, or needs; ``name``: its group."""
    keys, taken = list(arguments), parameters(make) or {}
    what = getattr(make, "__name__", make)
    if unknown := foreign(make, keys):
        near = get_close_matches(unknown[0], taken, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(taken) or 'nothing'}."
        raise ValueError(f"{name}._target_={what} takes no {unknown[0]}; {hint}")
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for key, one in taken.items():
        if key not in keys and one.default is one.empty and one.kind in kinds:
            raise ValueError(f"{name}._target_={what} needs a value for {key}: {name}.{key}=...")


def unknown(config: Any) -> list[str]:
    """The ``_target_`` values in a configuration whose code is neither named by our own configurations nor in CLASSES.

    A prefix such as ``torch.`` proves nothing: ``torch.hub.load`` and ``torch.os.system`` run anything.
    """
    if isinstance(config, list):
        return [name for part in config for name in unknown(part)]
    if not isinstance(config, dict):
        return []
    own = [str(value) for key, value in config.items() if key == "_target_" and not _is_known(value)]
    return list(dict.fromkeys(own + [name for part in config.values() for name in unknown(part)]))


def _is_known(name: Any) -> bool:
    if not isinstance(name, str):
        return False
    if name in _shipped():
        return True
    if not CLASSES.fullmatch(name):
        return False
    try:
        found = pkgutil.resolve_name(name)  # imports only modules of torch and gradscope
    except (ImportError, AttributeError, ValueError):
        return False
    return inspect.isclass(found) and issubclass(found, KINDS) and found.__module__.startswith(("torch.", "gradscope."))


@cache
def _shipped() -> frozenset[str]:
    """All targets that the configurations of this package name."""
    texts = [path.read_text() for path in CONF.rglob("*.yaml")]
    return frozenset(name for text in texts for name in re.findall(r"^\s*_target_: ([\w.]+)$", text, re.M))
