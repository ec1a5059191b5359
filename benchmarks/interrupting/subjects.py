"""Every public function that runs a model, called on a network that keeps, draws and recomputes."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import gradscope as gs
from gradscope.measures.symmetry import invariance_error

Measurement = Callable[[nn.Module, Tensor], Any]
LABELS = torch.arange(6) % 3


class Block(nn.Module):
    """Changes its own attributes, marks a tensor, draws numbers, and is recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh())
        self.log: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """A residual connection."""
        self.log.append(x)
        h = gs.tap(x + torch.randn(()), "tapped")
        branch: Tensor = checkpoint(self.inside, h, use_reentrant=False)
        return x + branch


def network() -> nn.Sequential:
    """A small network with buffers, hooks of its own, dropout and gradients."""
    torch.manual_seed(0)
    # No bias before batch normalization: its gradient is zero up to rounding, so chance would decide how many are zero.
    first, block = nn.Linear(4, 4, bias=False), Block()
    layers = [first, nn.BatchNorm1d(4), nn.Tanh(), block, nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5)]
    model = nn.Sequential(*layers, nn.Linear(4, 3)).double()
    model[2].register_forward_hook(lambda module, args, output: None)
    model[5].register_full_backward_hook(lambda module, received, sent: None)
    first.weight.register_hook(lambda gradient: None)
    model[4].requires_grad_(False)
    model[6].eval()
    functional.cross_entropy(model(data()), LABELS).backward()
    block.log.clear()
    return model


def plain() -> nn.Module:
    """A network that theory covers, and whose operations torch can differentiate forward."""
    torch.manual_seed(1)
    layers = [layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(4, 3)).double()


def images() -> nn.Module:
    """A network for images."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten()).double()


class Attentive(nn.Module):
    """Attention of torch inside a network that keeps, and fused attention; the four features are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.before = network()
        self.inside = nn.MultiheadAttention(2, 2, batch_first=True).double()

    def forward(self, x: Tensor) -> Tensor:
        """The mean over the tokens."""
        h = torch.stack([x, self.before[:3](x)], dim=2)
        h = h + self.inside(h, h, h)[0]
        return functional.scaled_dot_product_attention(h, h, h).mean(1) + self.before(x)[:, :2]


def data() -> Tensor:
    """Six samples."""
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def losses(output: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of every sample."""
    return functional.cross_entropy(output, labels, reduction="none")


def monitored(model: nn.Module, x: Tensor) -> pd.DataFrame:
    """A step of a fresh monitor, which records everything."""
    with gs.Monitor(model, x, statistics_every=1) as monitor:
        monitor.step(1.0, (x, LABELS))
    return monitor.to_frame()


def searched(model: nn.Module, x: Tensor) -> gs.Fault | None:
    """The first layer of a model on an infinite input."""
    bad = x.clone()
    bad[0, 0] = torch.inf
    return gs.first_nonfinite(nn.Sequential(nn.Hardtanh(), model, LogOfZero()), bad)


class LogOfZero(nn.Module):
    """Makes -inf."""

    def forward(self, x: Tensor) -> Tensor:
        """The logarithm of zero, which depends on x."""
        return (x * 0).log()


def jacobian(name: str) -> Measurement:
    """A product or matrix of one layer's Jacobian."""

    def measured(model: nn.Module, x: Tensor) -> Any:
        J = gs.capture(model, x, layers=["0", "4"]).jacobian("0", "4")
        found = getattr(J, name)
        if name == "matvec":
            return found(torch.arange(J.shape[1], dtype=x.dtype))
        if name == "rmatvec":
            return found(torch.arange(J.shape[0], dtype=x.dtype))
        return found()

    return measured


def before(model: nn.Module) -> dict[str, Tensor]:
    """Other parameters, as if these were the initial ones."""
    with torch.inference_mode(False):
        return {name: value.detach() * 0.9 for name, value in model.named_parameters()}


def expanded(model: nn.Module, x: Tensor) -> pd.DataFrame:
    """The losses with some layers expanded around other parameters."""
    return gs.taylor_losses(model, (x, LABELS), initial=before(model), loss_fn=losses)


def page(model: nn.Module, x: Tensor) -> int:
    """The length of a report's page."""
    with tempfile.TemporaryDirectory() as folder:
        return (
            len(
                gs.report(
                    model, x, Path(folder) / "report.html", probes=1, matrix=False, check=False, compare=False
                ).read_bytes()
            )
            // 1000
        )


def initialized(model: nn.Module, x: Tensor) -> dict[str, float]:
    """LSUV of a copy, whose hooks must not outlive it."""
    twin = copy.deepcopy(model)
    try:
        return gs.initializers.lsuv(twin, x, generator=torch.Generator().manual_seed(0))
    finally:
        hooks = [own for module in twin.modules() for own in module._forward_hooks.values()]
        assert len(hooks) == len([own for module in model.modules() for own in module._forward_hooks.values()]), (
            "hooks of LSUV are left"
        )


class Tokens(nn.Module):
    """The features are the tokens of a sequence, and stay apart from each other in the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.mixing, self.later = nn.Linear(1, 3), nn.Linear(4, 4), nn.Linear(3, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """Two values per token."""
        h: Tensor = self.inside(x[..., None]).tanh()
        y: Tensor = self.later(self.mixing(h.mT).mT)
        return y


def widened(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network of some width with its optimizer."""
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()
    return model, torch.optim.SGD(model.parameters(), 0.1)


def scaling(_: nn.Module, x: Tensor) -> str:
    """The exponents of two widths."""
    return str(gs.coordinate_check(widened, (x, LABELS), loss_fn=losses, widths=[4, 8], steps=1, seeds=2))


SUBJECTS: dict[str, tuple[Callable[[], nn.Module], Measurement]] = {
    "gsc": (network, lambda model, x: gs.gsc(model, x, probes=1)),
    "gsc exact": (network, lambda model, x: gs.gsc(model, x, probes="exact")),
    "gsc deflated": (network, lambda model, x: gs.gsc(model, x, probes=gs.Deflated(1, 2))),
    "gsc of losses": (network, lambda model, x: gs.gsc(model, (x, LABELS), loss_fn=losses, probes=2)),
    "gsc of a stream": (network, lambda model, x: gs.gsc(model, iter([x, x + 1, x - 1]), probes=1)),
    "gsc_matrix": (network, lambda model, x: gs.gsc_matrix(model, x, probes=1)),
    "parameter_gsc": (network, lambda model, x: gs.parameter_gsc(model, x, probes=2)),
    "residual": (network, lambda model, x: gs.residual(model, x, probes=2)),
    "repair": (plain, lambda model, x: str(gs.repair(model, x, probes=1))),
    "nlc": (network, lambda model, x: gs.nlc(model, x, probes=2)),
    "measure": (network, lambda model, x: gs.measure(model, x)),
    "measure gradients": (network, lambda model, x: gs.measure(model, (x, LABELS), loss_fn=losses, learning_rate=0.1)),
    "describe": (network, lambda model, x: str(gs.capture(model, x).describe())),
    "coupled": (network, lambda model, x: gs.capture(model, x).coupled),
    "J v": (network, jacobian("matvec")),
    "J^T u": (network, jacobian("rmatvec")),
    "dense": (network, jacobian("dense")),
    "linearize": (network, lambda model, x: gs.capture(model, x).jacobian("0", "4").linearize()(x)),
    "effective_depth": (network, lambda model, x: gs.effective_depth(model, x, initial=before(model), probes=2)),
    "taylor_losses": (plain, expanded),
    "first_nonfinite": (network, searched),
    "check": (network, lambda model, x: gs.check(model, x)),
    "compare": (plain, lambda model, x: str(gs.compare(model, x, probes=1))),
    "compare_models": (network, lambda _, x: str(gs.compare_models({"a": plain, "b": plain}, x, seeds=2, probes=1))),
    "invariance_error": (images, lambda model, x: invariance_error(model, x.reshape(2, 1, 3, 4), (1, 0))),
    "diff": (plain, lambda model, x: str(gs.diff(model, lambda twin: twin.float(), x, probes=1, measures=[]))),
    "coordinate_check": (plain, scaling),
    "jacobian_coherence": (plain, lambda model, x: gs.jacobian_coherence(model, x, probes=2)),
    "positions": (Tokens, lambda model, x: gs.gsc(model, x, positions="both", probes=1)),
    "attention": (Attentive, lambda model, x: gs.attention(model, x)),
    "Monitor.step": (network, monitored),
    "report": (plain, page),
    "lsuv": (plain, initialized),
}  # fmt: skip


def numbers(result: Any) -> Any:
    """A result as values that can be compared."""
    if isinstance(result, Tensor):
        return result.tolist()
    stopped = getattr(result, "stopped", "")  # of a stream
    if hasattr(result, "to_frame"):
        result = result.to_frame()
    if isinstance(result, pd.DataFrame):
        # The mean of normalized values is zero up to rounding, and its logarithm is anything.
        result = result.drop(columns=[name for name in result if str(name).startswith("log10")])
        return [stopped, *([repr(value) for value in row] for row in result.itertuples(index=False))]
    return result if isinstance(result, str) else repr(result)
