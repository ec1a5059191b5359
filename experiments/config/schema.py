"""Types of every configuration key, so that a wrong type in an override is refused by name; values live in conf/."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf


@dataclass
class ModelConfig:
    """What every model shares: the class to build."""

    _target_: str = MISSING


@dataclass
class MLPConfig(ModelConfig):
    """Arguments of `gradscope.models.mlp.MLP`."""

    depth: int = MISSING
    width: int = MISSING
    activation: str = MISSING
    norm: str = MISSING
    residual: str = MISSING
    skip_weight: float = MISSING
    init: str = MISSING
    weight_variance: float | None = None
    bias: bool = MISSING
    bias_variance: float = 0.0
    in_features: int | None = MISSING
    out_features: int | None = MISSING


@dataclass
class AlexNetBConfig(ModelConfig):
    """Arguments of `gradscope.models.alexnet.AlexNetB`."""

    init: str = MISSING
    num_classes: int = MISSING


@dataclass
class AlexNetAConfig(AlexNetBConfig):
    """Arguments of `gradscope.models.alexnet.AlexNetA`."""

    padding: str = MISSING
    dropout: float = MISSING


@dataclass
class ResNetConfig(ModelConfig):
    """Arguments of `gradscope.models.resnet.ResNet`."""

    depth: int = MISSING
    width: int = MISSING
    residual: str = MISSING
    norm: str = MISSING
    in_channels: int = MISSING
    num_classes: int = MISSING
    init: str = MISSING


@dataclass
class DataConfig:
    """What every data set shares: the function to call, and the number of samples."""

    _target_: str = MISSING
    batch_size: int = MISSING


@dataclass
class NoiseConfig(DataConfig):
    """Arguments of `experiments.data.batches.noise`."""

    shape: list[int] | None = None


@dataclass
class Cifar10Config(DataConfig):
    """Arguments of `experiments.data.batches.cifar10`."""

    download: bool = MISSING


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


@dataclass
class AugmentationConfig:
    """Arguments of `experiments.data.images.Augmentation`."""

    flip: bool = MISSING
    crop: int = MISSING
    cutout: int = MISSING


@dataclass
class RecipeConfig:
    """Arguments of `experiments.training.recipe.Recipe`, short of the optimizer."""

    epochs: float = MISSING
    max_steps: int | None = MISSING
    batch_size: int = MISSING
    schedule: str = MISSING
    warmup: float = MISSING
    label_smoothing: float = MISSING
    clip: float | None = MISSING
    precision: str = MISSING
    compile: bool = MISSING
    log_every: int = MISSING
    keep: int = MISSING
    checkpoint_every: int | None = MISSING
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)


@dataclass
class MonitorConfig:
    """Arguments of `gradscope.Monitor`, and the size of its probe batch."""

    every: Any = MISSING
    statistics_every: Any = MISSING
    probes: Any = MISSING
    batch_size: int = MISSING
    max_overhead: float | None = MISSING
    on_nonfinite: str = MISSING
    check_every: int | None = MISSING


@dataclass
class TrainConfig:
    """Keys of conf/train.yaml."""

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
    train: RecipeConfig = field(default_factory=RecipeConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    rerun: bool = MISSING
    on_error: str = MISSING
    results: str = MISSING
    sweep: str = MISSING


def resolved(cfg: DictConfig) -> MeasureConfig:
    """The configuration of a measurement with every value worked out, groups as plain dictionaries; keys that a user
    adds (``+note=x``) are left out.

    For many short measurements: a look at a key of OmegaConf takes about ten microseconds.

    Raises:
        omegaconf.errors.MissingMandatoryValue: A key has no value.
    """
    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    return MeasureConfig(**{known.name: values[known.name] for known in fields(MeasureConfig)})


def register() -> None:
    """Make the schemas known to Hydra."""
    store = ConfigStore.instance()
    sweeper = {"_target_": "hydra_plugins.gradscope_sweeper.sweeper.ComposedSweeper", "max_batch_size": None}
    store.store(group="hydra/sweeper", name="composed", node=sweeper | {"params": None}, provider="gradscope")
    store.store(name="measure_schema", node=MeasureConfig)
    store.store(name="train_schema", node=TrainConfig)
    store.store(group="model", name="mlp_schema", node=MLPConfig)
    store.store(group="model", name="alexnet_a_schema", node=AlexNetAConfig)
    store.store(group="model", name="alexnet_b_schema", node=AlexNetBConfig)
    store.store(group="model", name="resnet_schema", node=ResNetConfig)
    store.store(group="data", name="noise_schema", node=NoiseConfig)
    store.store(group="data", name="cifar10_schema", node=Cifar10Config)
    store.store(group="data", name="digits_schema", node=DataConfig)
