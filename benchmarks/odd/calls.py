"""A sensible call of every public function, and of the methods of what these functions return."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

import gradscope as gs
from gradscope import frames, initializers, meanfield, measures, models, plots, probes, sinks, testing
from gradscope.callbacks.transformers import MonitorCallback

Call = tuple[Callable[..., Any], dict[str, Any]]


def seeded() -> torch.Generator:
    """A generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


def noise(*shape: int) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=seeded())


def mlp(**options: Any) -> models.MLP:
    """A small network."""
    return models.MLP(**{"depth": 7, "width": 6, "generator": seeded(), **options})


def loss(output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One loss per sample."""
    return (output - labels).square().mean(1)


def trained(width: int) -> tuple[models.MLP, torch.optim.Optimizer]:
    """A small network of this width with its optimizer."""
    model = models.MLP(depth=1, width=width, in_features=6, out_features=1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def monitored() -> gs.Monitor:
    """A monitor with two records."""
    monitor = gs.Monitor(mlp(), noise(4, 6), every=1)
    monitor.step()
    monitor.step()
    return monitor


@cache
def result(name: str) -> Any:
    """Results that several calls share."""
    if name == "records":
        return monitored().to_frame()
    if name == "statistics":
        return gs.measure(mlp(), noise(4, 6))
    if name == "theory":
        return frames.tidy(
            {"layer": ["a", "b"], "index": [1, 2], "depth_from_output": [1, 0], "num_samples": 8, "quantity": "gsc",
             "log10_value": [1.0, 0.0], "target": "b"}
        )  # fmt: skip
    if name == "scaling":
        data = noise(4, 6), noise(4, 1)
        return gs.coordinate_check(trained, data, loss_fn=loss, widths=[4, 8], seeds=2, steps=1, probes=1)
    if name == "residual":
        return gs.residual(mlp(residual="identity"), noise(4, 6))
    makers: dict[str, Callable[..., Any]] = {"profile": gs.gsc, "matrix": gs.gsc_matrix, "capture": gs.capture}
    return makers[name](mlp(), noise(4, 6))


def operator() -> gs.LinearOperator:
    """A diagonal operator."""
    return gs.LinearOperator((3, 3), lambda v: 2 * v, lambda u: 2 * u)


def convolution() -> nn.Module:
    """A map from images to feature maps."""
    return nn.Conv2d(1, 2, 3, padding=1)


def bound(instance: Any, method: str, /, **arguments: Any) -> Callable[[], Call]:
    """A call of a method."""
    return lambda: (getattr(instance(), method), arguments)


def call(function: Callable[..., Any], /, **arguments: Any) -> Callable[[], Call]:
    """A call with arguments; those that are made by a function called ``new`` are made anew for each call."""
    return lambda: (function, {name: new() if isinstance(new, New) else new for name, new in arguments.items()})


class New:
    """Makes an argument that a call may change."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __call__(self) -> Any:
        """The argument."""
        return self.make()


MODEL, X = New(mlp), New(lambda: noise(4, 6))
MEASURED: dict[str, Any] = {"model": MODEL, "data": X, "forward": None}
GSC: dict[str, Any] = MEASURED | {
    "layers": None, "target": None, "loss_fn": None, "probes": "auto", "rtol": None, "max_samples": None,
    "max_seconds": None, "reduction": "batch", "generator": None, "progress": None,
}  # fmt: skip
BY_PROBES: dict[str, Any] = MEASURED | {"probes": "auto", "generator": None}
MAPS = {"activation": "tanh", "weight_variance": 1.5, "bias_variance": 0.1}
IMAGES = New(lambda: noise(3, 1, 8, 8))


def mean_field() -> meanfield.MeanField:
    """A layer."""
    return meanfield.MeanField("tanh", 1.5, 0.1)


def heads() -> gs.AttentionHeads:
    """Statistics of a layer with two heads."""
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    return gs.attention(layer, noise(4, 3, 6))


CALLS: dict[str, Callable[[], Call]] = {
    "attention": call(
        gs.attention, model=New(lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)),
        data=New(lambda: noise(4, 3, 6)), forward=None, collapsed=0.1,
    ),
    "capture": call(gs.capture, **MEASURED, layers=None, loss_fn=None, target=None),
    "check": call(gs.check, **MEASURED, loss_fn=None),
    "compare": call(gs.compare, **BY_PROBES, expected=None, prediction=None),
    "compare_models": call(
        gs.compare_models, models={"a": mlp, "b": mlp}, data=X, seeds=2, margin=0.02, progress=None, probes=2
    ),
    "coordinate_check": call(
        gs.coordinate_check, factory=trained, data=New(lambda: (noise(4, 6), noise(4, 1))), loss_fn=loss,
        widths=(4, 8), depths=None, steps=1, seeds=2, parametrization=None, forward=None, layers=None, margin=0.25,
        probes=1, progress=None,
    ),
    "CoordinateCheck.against": bound(lambda: result("scaling"), "against", parametrization="standard"),
    "diff": call(
        gs.diff, a=MODEL, b=New(mlp), data=X, forward=None, layers=None, target=None, loss_fn=None, probes=2,
        measures=[], level=0.95, generator=None,
    ),
    "effective_depth": call(gs.effective_depth, **BY_PROBES, initial=MODEL),
    "first_nonfinite": call(gs.first_nonfinite, **MEASURED, loss_fn=None),
    "growth": call(gs.growth, data=New(lambda: result("profile")), target=None, margin=0.02),
    "gsc": call(gs.gsc, **GSC, positions=None, position_dim=1),
    "gsc by position": call(gs.gsc, **GSC, positions="both", position_dim=1),
    "jacobian_coherence": call(gs.jacobian_coherence, **BY_PROBES, layers=None, target=None, loss_fn=None),
    "gsc_matrix": call(gs.gsc_matrix, **GSC),
    "measure": call(gs.measure, **MEASURED, loss_fn=None, measures=None, learning_rate=None),
    "nlc": call(gs.nlc, **BY_PROBES, target=None, loss_fn=None),
    "parameter_gsc": call(gs.parameter_gsc, **BY_PROBES, target=None, loss_fn=None),
    "qm_norm": call(gs.qm_norm, a=New(operator), probes=None, generator=None),
    "report": call(
        gs.report, **BY_PROBES, path="page.html", loss_fn=None, matrix=False, check=False, compare=False, monitor=None,
        title=None,
    ),
    "report_frame": call(
        gs.report_frame, frame=New(lambda: result("profile").to_frame().assign(network="a", seed=0)), path="page.html",
        growth=None, theory=None, title="a", about="b",
    ),
    "residual": call(
        gs.residual, **BY_PROBES | {"model": New(lambda: mlp(residual="identity"))}, target=None, loss_fn=None,
        channel_dim=None, progress=None,
    ),
    "repair": call(
        gs.repair, **BY_PROBES, goal=1.1, length="input", margin=0.02, fresh=None, layers=None, progress=None
    ),
    "tap": call(gs.tap, tensor=X, name="a"),
    "taylor_losses": call(
        gs.taylor_losses, model=MODEL, data=New(lambda: (noise(4, 6), noise(4, 6))), initial=MODEL, loss_fn=loss,
        forward=None,
    ),
    "Deflated": call(gs.Deflated, rank=4, num=4),
    "Estimate": call(gs.Estimate, mantissa=1.5, mantissa_stderr=0.1, exponent=0, num_probes=2, freedom=3.0),
    "Estimate.exact": call(gs.Estimate.exact, value=1.5, exponent=0),
    "Estimate.interval": bound(lambda: gs.Estimate(2.0, 0.1), "interval", level=0.95),
    "Estimate.scaled": bound(lambda: gs.Estimate(2.0, 0.1), "scaled", factor=2.0),
    "LinearOperator": call(
        lambda **options: gs.LinearOperator(**options).dense(), shape=(3, 3), matvec=lambda v: 2 * v,
        rmatvec=lambda u: 2 * u, dtype=torch.float64, device=torch.device("cpu"),
    ),
    "singular_values": bound(operator, "singular_values", k=None),
    "Capture.jacobian": bound(lambda: result("capture"), "jacobian", source="input", target="layers.2"),
    "Jacobian.singular_values": bound(
        lambda: result("capture").jacobian("input", "layers.2"), "singular_values", k=None
    ),
    "Matrix.growth": bound(lambda: result("matrix"), "growth", margin=0.02),
    "Matrix.interval": bound(lambda: result("matrix"), "interval", level=0.95),
    "Matrix.rows_to": bound(lambda: result("matrix"), "rows_to", target=None),
    "Profile.__getitem__": bound(lambda: result("profile"), "__getitem__", layer="input"),
    "Profile.save": bound(lambda: result("profile"), "save", path="profile.parquet"),
    "Profile.plot": bound(lambda: result("profile"), "plot", ax=None),
    "EffectiveDepth.at": bound(
        lambda: gs.effective_depth(mlp(), noise(4, 6), initial=mlp(generator=torch.Generator().manual_seed(1))), "at",
        tolerance=1e-6,
    ),
    "Monitor": call(
        gs.Monitor, **MEASURED, every=100, statistics_every=None, probes=2, layers=None, max_overhead=0.03,
        loss_fn=None, on_nonfinite="raise", check_every=None, save_to=None, report=None, sinks=(), total_steps=None,
        attention=None,
    ),
    "Monitor.step": bound(monitored, "step", loss=0.5, batch=None),
    "Monitor.load_state_dict": bound(monitored, "load_state_dict", state=monitored().state_dict(), records=None),
    "assert_growth": call(testing.assert_growth, **BY_PROBES, layers=None, low=0.1, high=10.0, undecided="pass"),
    "assert_no_collapse": call(testing.assert_no_collapse, **MEASURED, most=1.0),
    "assert_qm_norm": call(testing.assert_qm_norm, operator=New(operator), expected=2.0, rtol=1e-6, probes="exact"),
    "assert_total": call(testing.assert_total, **BY_PROBES, layers=None, low=1e-3, high=1e3, undecided="pass"),
    "MLP": call(
        models.MLP, depth=2, width=4, activation="relu", norm="none", residual="none", skip_weight=1.0, init="auto",
        weight_variance=None, bias=False, bias_variance=0.0, in_features=None, out_features=None, generator=None,
    ),
    "AlexNetA": call(models.AlexNetA, padding="same", dropout=0.5, num_classes=2, init="he", generator=None),
    "AlexNetB": call(models.AlexNetB, num_classes=2, init="he", generator=None),
    "ResNet": call(
        models.ResNet, depth=8, width=4, residual="identity", norm="batch", in_channels=3, num_classes=2, init="he",
        generator=None,
    ),
    "Activation": call(lambda **options: meanfield.Activation(**options)(np.array(0.5)), name="a", function=np.sin,
                       derivative=np.cos, kinks=()),
    "LayerSpec": call(
        lambda **options: meanfield.predict([meanfield.LayerSpec(**options)], batch_size=8),
        activation=meanfield.NAMED["tanh"], weight_variance=1.0, bias_variance=0.0, norm="none", branch_variance=None,
        skip_weight=1.0,
    ),
    "LayerSpec.of": call(
        meanfield.LayerSpec.of, **MAPS, norm="none", branch_variance=None, skip_weight=1.0
    ),
    "MeanField": call(meanfield.MeanField, **MAPS, keep=1.0),
    **{f"MeanField.{name}": bound(mean_field, name, q=0.5) for name in ("chi", "length", "mean_square")},
    **{f"MeanField.{name}": bound(mean_field, name, q=0.5, c=0.5) for name in ("chi_c", "correlation", "covariance")},
    "MeanField.fixed_correlation": bound(mean_field, "fixed_correlation", q=None),
    "MeanField.fixed_length": bound(mean_field, "fixed_length", start=1.0),
    "DepthScales.trainable_depth": bound(lambda: mean_field().depth_scales(), "trainable_depth", multiple=6.0),
    "as_activation": call(meanfield.as_activation, given="tanh", kinks=()),
    "batch_moments": call(meanfield.batch_moments, activation="relu", batch_size=8),
    "critical_line": call(meanfield.critical_line, activation="tanh", lengths=(0.1, 1.0)),
    "critical_point": call(meanfield.critical_point, activation="tanh", bias_variance=0.1, chi=1.0),
    "elementwise_nlc": call(meanfield.elementwise_nlc, activation="tanh", q=1.0),
    "gaussian": call(meanfield.gaussian, function=abs, scale=1.0, kinks=(0.0,), shift=0.0),
    "gaussian_pair": call(
        meanfield.gaussian_pair, first=abs, second=abs, scale=1.0, correlation=0.5, kinks=(0.0,)
    ),
    "gsc_rate": call(
        meanfield.gsc_rate, activation="tanh", norm="none", batch_size=None, q=None, weight_variance=None,
        bias_variance=0.0,
    ),
    "log_gradient_variance": call(meanfield.log_gradient_variance, activation="tanh", width=100, q=1.0),
    "network_nlc": call(meanfield.network_nlc, layers=New(lambda: [mean_field()] * 2), q=1.0, correlation=0.0),
    "phase_diagram": call(
        meanfield.phase_diagram, activation="tanh", weight_variances=(1.0, 2.0), bias_variances=(0.1, 0.2)
    ),
    "predict": call(
        meanfield.predict, layers=New(lambda: [meanfield.LayerSpec.of("tanh", 1.0)]), batch_size=8, mean_square=1.0,
        correlation=0.0,
    ),
    "predict_mlp": call(
        meanfield.predict_mlp, **MAPS, depth=2, batch_size=8, norm="none", mean_square=1.0, correlation=0.0
    ),
    "random_attention": call(meanfield.random_attention, overlap=0.5, beta=1.0, keys=8.0),
    "critical_score": call(meanfield.critical_score, overlap=0.5),
    "Transformer": call(
        lambda **options: meanfield.Transformer(**options).gsc(), depth=2, width=8, length=4, activation="gelu",
        gated=False, norm="pre", norm_kind="layer", causal=True, residual_scale=1.0, score_variance=1.0,
        value_variance=1.0, hidden_variance=1.0, output_variance=1.0, outputs=None, mean_square=1.0, overlap=0.0,
    ),
    "Transformer.gpt2": call(meanfield.Transformer.gpt2, depth=2, width=8, length=4, std=0.02),
    "residual_rate": call(meanfield.residual_rate, branch_rate=1.1, dilution=1.0),
    "standard_variance": call(meanfield.standard_variance, activation=meanfield.NAMED["tanh"]),
    "weight_gain": call(meanfield.weight_gain, activation="tanh", rate=1.0, bias_variance=0.1),
    "plots.attention": call(
        plots.attention, data=New(heads), quantities=("largest_attention_logit", "first_key_share"), axes=None
    ),
    "plots.before_after": call(plots.before_after, data=New(lambda: result("records")), ax=None),
    "plots.convergence": call(
        plots.convergence, data=New(lambda: result("profile").to_frame().assign(width=8)), hue=None, ax=None
    ),
    "plots.coordinates": call(
        plots.coordinates, data=New(lambda: result("scaling")), quantity="activation_change_rms", step=None, axis=None,
        ax=None,
    ),
    "plots.evolution": call(
        plots.evolution, data=New(lambda: result("records")), quantity="gsc", limits=None, colorbar=True, ax=None
    ),
    "plots.learning": call(
        plots.learning, metrics=New(lambda: result("records")[["step"]].drop_duplicates().assign(loss=1.0)),
        quantity="loss", hue=None, ax=None,
    ),
    "plots.matrix": call(plots.matrix, data=New(lambda: result("matrix")), limits=None, colorbar=True, ax=None),
    "plots.named_profile": call(
        plots.named_profile, data=New(lambda: result("profile")), hue=None, notes=None, ax=None
    ),
    "plots.over_steps": call(plots.over_steps, data=New(lambda: result("records")), quantity="gsc", ax=None),
    "plots.phase_diagram": call(
        plots.phase_diagram, diagram=New(lambda: meanfield.phase_diagram("tanh", [0.5, 1.5], [0.0, 0.2])), points=None,
        ax=None,
    ),
    "plots.profile": call(
        plots.profile, data=New(lambda: result("profile")), hue=None, style=None, notes=None, ax=None
    ),
    "plots.rates": call(plots.rates, data=New(lambda: {"a": result("profile"), "b": result("profile")}), ax=None),
    "plots.residual": call(plots.residual, data=New(lambda: result("residual")), axes=None),
    "plots.statistic": call(
        plots.statistic, data=New(lambda: result("statistics")), quantity="preactivation_std", log10=False, hue=None,
        style=None, ax=None,
    ),
    "plots.theory": call(
        plots.theory, predicted=New(lambda: result("theory").assign(network="a")), keys=("network",),
        ax=New(lambda: plots.profile(result("profile"))),
    ),
    "Sinks": call(sinks.Sinks, targets=()),
    "Sinks.write": bound(lambda: sinks.Sinks([sinks.TensorBoard("events")]), "write", step=1, values={"a": 0.5}),
    "TensorBoard": call(sinks.TensorBoard, folder="events", begin=None),
    "TensorBoard.write": bound(lambda: sinks.TensorBoard("events"), "write", step=1, values={"a": 0.5}),
    "values_of": call(sinks.values_of, frame=New(lambda: result("records"))),
    "MonitorCallback": call(MonitorCallback, data=X),
    "SaturatedFraction": call(measures.SaturatedFraction, slope=0.05),
    "UpdateToWeight": call(measures.UpdateToWeight, learning_rate=0.1),
    "SignDiversity()": call(lambda values: measures.SignDiversity()(values), values=X),
    "argmax_agreement": call(
        measures.argmax_agreement, model=New(nn.Flatten), images=IMAGES, shift=(1, 0), fill="reflect"
    ),
    "contrast": call(measures.contrast, model=New(nn.Flatten), images=IMAGES),
    "equivariance_error": call(
        measures.equivariance_error, module=New(convolution), images=IMAGES, shift=(1, 0), circular=False
    ),
    "invariance_error": call(
        measures.invariance_error, model=New(nn.Flatten), images=IMAGES, shift=(1, 0), fill="reflect"
    ),
    "shifted": call(measures.shifted, images=IMAGES, shift=(1, 0), fill="reflect"),
    **{
        f"initializers.{name}": call(getattr(initializers, name), weight=X, generator=None)
        for name in ("he", "lecun", "xavier")
    },
    "initializers.gaussian": call(initializers.gaussian, weight=X, variance=1.0, generator=None),
    "initializers.orthogonal": call(initializers.orthogonal, weight=X, gain=1.0, generator=None),
    "initializers.looks_linear": call(
        initializers.looks_linear, weight=X, mirror_input=True, mirror_output=True, generator=None
    ),
    "initializers.critical": call(
        initializers.critical, model=MODEL, activation="tanh", bias_variance=0.1, chi=1.0, orthogonal_weights=False,
        generator=None,
    ),
    "initializers.lsuv": call(initializers.lsuv, **MEASURED, tolerance=0.1, max_rounds=10, generator=None),
    "initializers.weighted": call(initializers.weighted, model=MODEL),
    "initializers.auto": call(initializers.auto, activation="relu"),
    "frames.tidy": call(
        frames.tidy, columns={"layer": "a", "index": 1, "depth_from_output": 0, "num_samples": 8, "quantity": "gsc",
                              "log10_value": [0.0]},
    ),
    "frames.observed": call(
        frames.observed, quantity="balance", values=(1.0, 2.0), layer="a", index=(1, 2), stderr=0.0, num_samples=1
    ),
    "frames.to_last_target": call(frames.to_last_target, rows=New(lambda: result("matrix").to_frame())),
    "frames.check": call(frames.check, frame=New(lambda: result("records"))),
    "frames.save": call(frames.save, frame=New(lambda: result("records")), path="frame.parquet"),
    "frames.load": call(frames.load, path="frame.parquet"),
    **{
        f"probes.{name}": call(
            getattr(probes, name), num=2, size=4, generator=None, dtype=torch.float64, device="cpu"
        )
        for name in ("rademacher", "sphere", "orthonormal")
    },
}  # fmt: skip
