"""The configuration of a run as columns of its frame."""

from __future__ import annotations

import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.runs import PLACE_KEYS
from gradscope.frames import SCHEMA

# Columns that say what was measured, at which step, and in which run.
RESERVED = (*SCHEMA, "run", "step", "epoch")
# Keys without a column.  ``seeds`` needs none: the column ``seed`` holds the seed of each row.
NO_COLUMN = (*PLACE_KEYS, "seeds")
# The key of a class or function to call.  Several groups have this key, so its column is named by the whole path.
CLASS = "_target_"
# Groups whose choice has no column, because the choice, like the `PLACE_KEYS`, does not change a result.
NO_CHOICE = ("study", "launcher")
# Keys of these groups are named first; where two keys compete for a short name, these keys get it.
PLAIN = {"train": ("model", "optimizer", "train"), "measure": ("model", "data", "measurement")}


def columns(cfg: DictConfig, choices: dict[str, Any]) -> dict[str, Any]:
    """The names and values of the columns: one for each key, and one for the choice in each group.

    If a key's name is taken, its column is named by its path (``data.batch_size``), at the top level ``config.KEY``.
    """
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    chosen = {name: choice for name, choice in choices.items() if name not in NO_CHOICE and "/" not in name}
    flat: dict[str, Any] = {"model": choices["model"], "data": choices["data"], **chosen}
    groups = {str(key): value for key, value in config.items() if isinstance(value, dict)}
    first = [name for name in PLAIN["train" if "train" in config else "measure"] if name in groups]
    others = [key for key in config if key not in (*groups, *NO_COLUMN, *chosen, "measurement")]
    leaves: list[tuple[tuple[str, ...], Any]] = [((str(key),), config[key]) for key in others]
    for name in (*first, *(name for name in groups if name not in first)):
        leaves += _leaves((name,), groups[name])
    for path, value in leaves:
        if ".".join(path) in PLACE_KEYS:
            continue
        taken = path[-1] in flat or path[-1] in RESERVED or path[-1] == CLASS
        whole = ".".join(path if path[1:] else ("config", *path))
        flat[whole if taken else path[-1]] = json.dumps(value) if isinstance(value, list) else value
    return flat


def _leaves(path: tuple[str, ...], value: Any) -> list[tuple[tuple[str, ...], Any]]:
    """The values below a key, each with its path.  The values of nested keys come last."""
    if not isinstance(value, dict):
        return [(path, value)]
    parts = sorted(value.items(), key=lambda item: isinstance(item[1], dict))
    return [leaf for key, part in parts for leaf in _leaves((*path, str(key)), part)]
