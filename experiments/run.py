"""One run: its folder, seeds, device, and what of its configuration stands in its frame."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments import launches
from gradscope.frames import COLUMNS

# Keys that say where and how fast, not what: they change neither a result nor the name of its folder.
PLACE_KEYS = (
    "results", "sweep", "device", "num_threads", "resume", "sinks", "memory_map", "rerun", "on_error",
    "train.checkpoint_every", "train.keep",
)  # fmt: skip
MAX_NAME = 120
# Columns that say what was measured, when, and in which run.
RESERVED = (*COLUMNS, "run", "step", "epoch")
# Keys that are no columns: a list of seeds is the column of seeds, row by row.
NO_COLUMN = (*PLACE_KEYS, "seeds")
# The key of a class or a function to call; every group may have one, so its column has the whole path as name.
CLASS = "_target_"
# Groups whose choice is no column: of the same kind as `PLACE_KEYS`.
NO_CHOICE = ("study", "launcher")
# Groups whose keys come first to a plain name, of a training run and of a measurement.
PLAIN = {"train": ("model", "optimizer", "train"), "measure": ("model", "data", "measurement")}
DIGITS = 12  # of a digest: two of a million runs share one with a probability of 0.2 %


def folder(cfg: DictConfig, overrides: Sequence[str]) -> Path:
    """``<results>/<sweep>/<overridden keys>-<hash of the configuration>``; equal configuration, equal folder.

    The words are those of the first time that this configuration ran in the sweep.  Names are at most 120 characters of
    ASCII, and two of them never differ in case only; where they would be longer, the longest values are cut.

    Raises:
        ValueError: The name of the sweep is none.
    """
    launches.check_name(cfg.sweep)
    key, sweep = digest(cfg), Path(cfg.results) / cfg.sweep
    known = _names(sweep.absolute())
    if (found := launches.of_digest(known, key)) is None:
        name = "-".join(filter(None, (_readable(overrides, MAX_NAME - len(key) - 1), key)))
        found = known[key] = Path(launches.settled(sweep, key, name))
    return sweep / found.name


def digest(cfg: DictConfig) -> str:
    """Twelve hex digits of the resolved configuration, without what does not change a result."""
    content: dict[str, Any] = {}
    for key in cfg:
        if key not in (*PLACE_KEYS, "hydra"):
            value = "???" if OmegaConf.is_missing(cfg, key) else cfg[key]
            plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            content[str(key)] = _without_place(plain, str(key))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:DIGITS]


def words(overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides that say what a run is, not where or how it is carried out."""
    unsaid = (*PLACE_KEYS, "launcher")
    keys = [item.lstrip("+~").split("=", 1)[0] for item in overrides]
    kept = [key not in unsaid and "/" not in key and not key.startswith("hydra.") for key in keys]
    return tuple(item for item, keep in zip(overrides, kept, strict=True) if keep)


def _readable(overrides: Sequence[str], room: int) -> str:
    """Overridden keys, by the last part of their path where no other has it, and values; in so many characters."""
    given = [item.lstrip("+~").split("=", 1) for item in words(overrides) if "=" in item]
    last = Counter(key.rpartition(".")[2] for key, _ in given)
    named = [(key if last[key.rpartition(".")[2]] > 1 else key.rpartition(".")[2], value) for key, value in given]
    pairs = [(key, re.sub(r"[^A-Za-z0-9._=,+-]", "_", value)) for key, value in sorted(named) if key != "study"]
    for length in range(max((len(value) for _, value in pairs), default=0), -1, -1):
        text = ",".join(f"{key}={value[:length]}" for key, value in pairs)
        if len(text) <= room:
            return text
    return text[:room]


def _without_place(value: Any, path: str) -> Any:
    """What of a value of the configuration changes a result; keys as words, so that they have an order."""
    if isinstance(value, list):
        return [_without_place(part, path) for part in value]
    if not isinstance(value, dict):
        return value
    parts = {f"{path}.{key}": (str(key), part) for key, part in value.items()}
    return {key: _without_place(part, whole) for whole, (key, part) in parts.items() if whole not in PLACE_KEYS}


@cache
def _names(sweep: Path) -> dict[str, Path]:
    """Run folders of a sweep by the digest that their names end with; read once a process."""
    return launches.digests(sweep)


def generator(seed: int, purpose: str) -> torch.Generator:
    """An independent stream for each purpose (model, data, probes) of a seed."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def seed_torch(seed: int) -> None:
    """What `torch.manual_seed` does; that would also note where it was called for each accelerator that is not there,
    which takes 0.3 ms below Hydra."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU; with several GPUs the runs of a sweep take them in turn.

    Raises:
        ValueError: Not a device, or none of that kind in this machine.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", _job() % torch.cuda.device_count())
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={name} cannot be used here ({str(error).splitlines()[0]}); use device=auto."
        ) from error
    return torch.device(name)


def tf32(allowed: bool) -> None:
    """Whether CUDA may round the factors of float32 products and convolutions to TensorFloat-32.

    Not in a file that is run as ``__main__``: launchers pickle its functions, and the module of cuDNN cannot be.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def columns(cfg: DictConfig, choices: dict[str, Any]) -> dict[str, Any]:
    """The run's configuration as columns of its frame: every key by its own name, groups by what was chosen.

    A key whose name is taken, by another group or by the schema, has its whole path as name (``data.batch_size``), and
    in no group ``config.`` before it (``config.target``, what was asked for); a list is its JSON.
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
    """Values below a key with their paths; its own first, then those of keys in keys."""
    if not isinstance(value, dict):
        return [(path, value)]
    parts = sorted(value.items(), key=lambda item: isinstance(item[1], dict))
    return [leaf for key, part in parts for leaf in _leaves((*path, str(key)), part)]


def with_study_defaults(arguments: Sequence[str], conf: Path) -> list[str]:
    """Let a key given on the command line replace the same key of a study's sweep.

    Hydra's own sweeper keeps the last of two, which is the same; the plan of a sweep and other sweepers want only one.
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
    """A study that sweeps is a sweep, or else one run of which each key that it sweeps is given.

    Raises:
        ValueError: It was started without ``-m``, and would be one run with the defaults of another network.
    """
    info = HydraConfig.get()
    given = {item.lstrip("+").split("=", 1)[0] for item in info.overrides.task}
    missing = [key for key in info.sweeper.get("params") or {} if key not in given]
    if info.mode is RunMode.RUN and missing:
        study = dict(info.runtime.choices)["study"]
        raise ValueError(
            f"study={study} sweeps {', '.join(missing)}: add -m to carry out all of its runs, or "
            f"give one value of each ({' '.join(f'{key}=...' for key in missing)})."
        )


def _job() -> int:
    """The number of this run in its sweep; 0 where it is no sweep."""
    if not HydraConfig.initialized():
        return 0
    job = HydraConfig.get().job
    return 0 if OmegaConf.is_missing(job, "num") else int(job.num)
