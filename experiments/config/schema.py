"""Types of all configuration keys.  The error for a value of a wrong type names the key.  Values are in conf/."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

import gradscope as gs
from experiments.data import batches
from experiments.data.images import Augmentation
from experiments.training.recipe import Recipe
from gradscope.models import GPT, MLP, AlexNetA, AlexNetB, ResNet


def schema_of(name: str, source: Callable[..., Any], *without: str, **kinds: Any) -> type:
    """A dataclass with the arguments of ``source`` that have plain types, minus ``without``, plus ``kinds``."""
    hints = get_type_hints(vars(source).get("__init__", source))
    keys = [(key, kind, MISSING) for key, kind in kinds.items()]
    for key, argument in inspect.signature(source).parameters.items():
        if key not in (*without, *kinds) and _is_plain(hints[key]):
            keys.append((key, hints[key], MISSING if argument.default is argument.empty else argument.default))
    return _made(name, keys)


def _made(name: str, keys: Sequence[tuple[str, Any, Any]], *bases: type) -> type:
    """A dataclass with these (name, type, default) keys.  The default of a dataclass is an instance of it."""
    nested = {key for key, kind, _ in keys if is_dataclass(kind)}
    keys = [(key, kind, field(default_factory=kind) if key in nested else value) for key, kind, value in keys]
    made = make_dataclass(name, keys, bases=bases)
    made.__module__ = __name__  # where pickle looks for the class
    return made


def _is_plain(hint: Any) -> bool:
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
    return set(kinds) <= {bool, int, float, str, type(None)}


@dataclass
class MeasureConfig:
    """Keys of conf/measure.yaml."""

    model: Any = MISSING
    data: Any = MISSING
    seed: int = MISSING
    mode: str = MISSING
    dtype: str = MISSING
    device: str = MISSING
    num_threads: int | None = None
    target: str | None = None
    probes: Any = MISSING
    rtol: float | None = None
    reduction: str = MISSING
    matrix: bool = MISSING
    matrix_layers: list[str] | None = field(default=None)
    matrix_probes: Any = MISSING
    statistics: list[str] = MISSING
    nlc: bool = MISSING
    measurement: Any = None
    seeds: Any = MISSING
    rerun: bool = MISSING
    on_error: str = MISSING
    results: str = MISSING
    sweep: str = MISSING


MLPConfig = schema_of("MLPConfig", MLP, _target_=str)
AlexNetAConfig = schema_of("AlexNetAConfig", AlexNetA, _target_=str)
AlexNetBConfig = schema_of("AlexNetBConfig", AlexNetB, _target_=str)
ResNetConfig = schema_of("ResNetConfig", ResNet, _target_=str)
GPTConfig = schema_of("GPTConfig", GPT, _target_=str, residual_scale=Any)
NoiseConfig = schema_of("NoiseConfig", batches.noise, _target_=str, shape=list[int] | None)
Cifar10Config = schema_of("Cifar10Config", batches.cifar10, _target_=str)
DigitsConfig = schema_of("DigitsConfig", batches.digits, _target_=str)
AugmentationConfig = schema_of("AugmentationConfig", Augmentation)
RecipeConfig = schema_of("RecipeConfig", Recipe, "seed", augmentation=AugmentationConfig)
MonitorConfig = schema_of(
    "MonitorConfig", gs.Monitor, "total_steps", "attention", every=Any, statistics_every=Any, probes=Any, batch_size=int
)


@dataclass
class _TrainKeys:
    """Keys of conf/train.yaml other than ``train`` and ``monitor``."""

    model: Any = MISSING
    data: Any = MISSING
    optimizer: Any = MISSING
    seed: int = MISSING
    device: str = MISSING
    num_threads: int | None = None
    tf32: bool = MISSING
    resume: str = MISSING
    holdout: int | None = MISSING
    memory_map: str | None = MISSING
    sinks: list[str] = MISSING
    rerun: bool = MISSING
    on_error: str = MISSING
    results: str = MISSING
    sweep: str = MISSING


TrainConfig = _made("TrainConfig", [("train", RecipeConfig, None), ("monitor", MonitorConfig, None)], _TrainKeys)


def resolved(cfg: DictConfig) -> MeasureConfig:
    """The resolved configuration of a measurement, with groups as dictionaries and without keys that a user added."""
    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    return MeasureConfig(**{known.name: values[known.name] for known in fields(MeasureConfig)})


def register() -> None:
    """Make the schemas known to Hydra."""
    store = ConfigStore.instance()
    sweeper = {"_target_": "hydra_plugins.gradscope_sweeper.sweeper.ComposedSweeper", "max_batch_size": None}
    store.store(group="hydra/sweeper", name="composed", node=sweeper | {"params": None}, provider="gradscope")
    store.store(name="measure_schema", node=MeasureConfig)
    store.store(name="train_schema", node=TrainConfig)
    # Arguments of a function or class that no schema knows: any key can be given without "+".
    for group, keys in {"model": {}, "data": {"batch_size": MISSING}}.items():
        custom = OmegaConf.create({"_target_": MISSING, **keys}, flags={"struct": False})
        store.store(group=group, name="custom_schema", node=custom)
    models = {"mlp": MLPConfig, "alexnet_a": AlexNetAConfig, "alexnet_b": AlexNetBConfig, "resnet": ResNetConfig,
              "gpt": GPTConfig}  # fmt: skip
    data = {"noise": NoiseConfig, "cifar10": Cifar10Config, "digits": DigitsConfig}
    for name, node in (models | data).items():
        store.store(group="model" if name in models else "data", name=f"{name}_schema", node=node)
