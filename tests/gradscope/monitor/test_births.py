"""Which operation makes NaN or Inf: births in every place, and healthy networks that hold NaN or Inf on purpose."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import gradscope as gs
from gradscope.monitor.nonfinite import BACKWARD, FORWARD
from tests.helpers import noise

INF = torch.inf


class Code(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, h):
        return self.function(h)


class Between(nn.Module):
    """A function between two layers."""

    def __init__(self, function):
        super().__init__()
        self.first, self.function, self.last = nn.Linear(4, 4), function, nn.Linear(4, 4)

    def forward(self, h):
        return self.last(self.function(self.first(h)))


def in_place(h):
    return (0 * h).sqrt_() + h


def masked(h):
    return h.masked_fill(torch.ones(4, dtype=torch.bool), -INF)


# Each spoils the gradients of all parameters below: (function, direction).
BIRTHS = {
    "sqrt": (lambda h: h + torch.sqrt(0 * h), BACKWARD),
    "sqrt of a sum of squares": (lambda h: h + (0 * h).square().sum(1, keepdim=True).sqrt(), BACKWARD),
    "deviation of a constant": (lambda h: h + (0 * h - (0 * h).mean()).square().mean().sqrt(), BACKWARD),
    "small power": (lambda h: h + (0 * h).pow(0.5), BACKWARD),
    "acos": (lambda h: h + torch.acos(0 * h + 1), BACKWARD),
    "where(x > 0, sqrt(x), 0)": (lambda h: torch.where(h > 0, h.sqrt(), 0.0), BACKWARD),
    "clamped": (lambda h: h + torch.sqrt(h - h).clamp(max=1), BACKWARD),
    "in place": (in_place, BACKWARD),
    "in a part": (lambda h: torch.cat([h[:, :2], (0 * h[:, 2:]).sqrt()], 1), BACKWARD),
    "log": (lambda h: h + torch.log(0 * h), FORWARD),
    "division by zero": (lambda h: h / (0 * h), FORWARD),
    "division by the number zero": (lambda h: h / 0.0, FORWARD),
    "negative power": (lambda h: h + (0 * h).pow(-1), FORWARD),
    "softmax of a row of -inf": (lambda h: masked(h).softmax(1), FORWARD),
    "overflow": (lambda h: (1e3 + h).exp(), FORWARD),
    "softplus": (lambda h: torch.log1p((1e3 + h).exp()), FORWARD),
    "entropy": (lambda h: h.relu() * h.relu().log(), FORWARD),
    "a constant Inf as a factor": (lambda h: h * (1 / torch.zeros(4)), FORWARD),
    "zero times -inf": (lambda h: h + (1 - torch.tensor([1.0, 1, 1, 0])) * -INF, FORWARD),
    "rsqrt": (lambda h: h * torch.rsqrt((0 * h).sum()), FORWARD),
}  # fmt: skip


def spoiled(model, x):
    loss = model(x).sum()
    return not all(bool(t.isfinite().all()) for t in (loss, *torch.autograd.grad(loss, list(model.parameters()))))


@pytest.mark.parametrize("name", BIRTHS)
def test_the_layer_whose_operation_makes_it(name):
    function, direction = BIRTHS[name]
    torch.manual_seed(0)
    x = noise(6, 4).float()
    alone = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Code(function), nn.Linear(4, 4), nn.ReLU())
    assert spoiled(alone, x)
    assert gs.first_nonfinite(alone, x) == gs.Fault("2", direction)
    beside = gs.Fault("last" if direction == FORWARD else "first", direction, before=True)
    assert gs.first_nonfinite(Between(function), x) == beside
    found = gs.first_nonfinite(alone[:2], (x, x), loss_fn=lambda output, labels: function(output).sum(1))
    assert found == gs.Fault("loss", direction)


def test_an_infinite_slope_is_the_fault_of_the_root_not_of_what_it_meets():
    """sqrt'(0) = inf, and the NaN arises only below, where inf is multiplied by 0."""
    below = (Code(lambda h: h * (h > 0)), Code(lambda h: h.square()), nn.Linear(4, 4))
    for module in below:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), Code(lambda h: 0 * h), module, Code(lambda h: (0 * h).abs().sqrt()))
        assert gs.first_nonfinite(model, noise(6, 4).float()) == gs.Fault("3", BACKWARD)


def test_the_layer_between_which_rows_a_gradient_breaks():
    """A ReLU sets the infinite gradient to zero, so only one row shows it, and the root comes after this row."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Code(torch.sqrt), nn.Linear(4, 4))
    x = noise(6, 4).float()
    assert not spoiled(model, x) and gs.first_nonfinite(model, x) is None
    with pytest.raises(FloatingPointError, match=r"at layer '1' is NaN or Inf .* an operation after this layer"):
        gs.gsc(model, x)
    monitor = gs.Monitor(model, x, every=1, max_overhead=None)
    with pytest.warns(gs.MonitorWarning, match="cannot be measured at step 0: The gradient at layer '1'"):
        monitor.step(model(x).sum())  # and training goes on
    rows = nn.Sequential(nn.Linear(4, 4), Code(lambda h: 0 * h), nn.Linear(4, 4, bias=False), Code(torch.sqrt))
    with pytest.raises(FloatingPointError, match=r"gradient at layer '2' is NaN or Inf"):
        gs.gsc(nn.Sequential(*rows, Code(lambda h: h + 1)), x)


class Attention(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.query, self.softmax, self.mask = nn.Linear(4, 4), nn.Softmax(-1), mask

    def forward(self, x):
        return self.softmax(self.mask(self.query(x) @ x.mT)) @ x


CAUSAL = torch.ones(5, 5).triu(1).bool()


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, x):
        return self.layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(5))


class Padded(nn.Module):
    """A buffer whose rest is never read, filled in place."""

    def forward(self, x):
        buffer = torch.full((*x.shape[:-1], 9), torch.nan)
        buffer[..., :4] = x
        return buffer[..., :4]


class Unused(nn.Module):
    """A side output that overflows, and a layer that is never called, with parameters of NaN."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x), self.linear(x) / 0.0


def with_a_frozen_mask():
    module = Attention(lambda s: s + module.bias)
    module.bias = nn.Parameter(torch.zeros(5, 5).masked_fill(CAUSAL, -INF), requires_grad=False)
    return module


def lower(scores, where=CAUSAL):
    scores = scores.clone()
    scores[:, where] = -INF
    return scores


def topped(x):
    """All but the two largest logits are left out, as for sampling."""
    return x.masked_fill(x < x.topk(2, -1).values[..., -1:], -INF).softmax(-1)


HEALTHY = {
    "masked_fill": lambda: Attention(lambda s: s.masked_fill(CAUSAL, -INF)),
    "masked_fill in place": lambda: Attention(lambda s: s.clone().masked_fill_(CAUSAL, -INF)),
    "written": lambda: Attention(lower),
    "an added mask": lambda: Attention(lambda s: s + torch.full((5, 5), -INF).triu(1)),
    "where": lambda: Attention(lambda s: torch.where(CAUSAL, -INF, s)),
    "the logarithm of a mask": lambda: Attention(lambda s: s + (~CAUSAL).float().log()),
    "the logarithm of a gate": lambda: Attention(lambda s: s + (s.detach() > -9).float().mul(~CAUSAL).log()),
    "a scaled mask": lambda: Attention(lambda s: 0.5 * s.masked_fill(CAUSAL, -INF)),
    "half precision": lambda: Attention(lambda s: (s.half() + torch.finfo(torch.half).min * CAUSAL * 2).float()),
    "a frozen parameter": with_a_frozen_mask,
    "an encoder": Encoder,
    "an encoder in evaluation mode": lambda: Encoder().eval(),
    "top 2": lambda: Code(topped),
    "largest of the unmasked": lambda: Code(lambda x: x.masked_fill(x < 0, -INF).amax(-1, keepdim=True).clamp(min=-9)),
    "masked maximum": lambda: Code(lambda x: x.masked_fill(x < -9, -INF).logsumexp(-1, keepdim=True)),
    "missing values": lambda: Code(lambda x: x.masked_fill(x < 0, torch.nan).nan_to_num(0.0)),
    "mean of the present": lambda: Code(lambda x: x.masked_fill(x < 0, torch.nan).nanmean((1, 2)).nan_to_num(0.0)),
    "a padded buffer": Padded,
    "an output that nobody uses": Unused,
    "the reciprocal of Inf": lambda: Code(lambda x: x + 1 / torch.full((4,), INF)),
    "an empty part": lambda: Code(lambda x: x + x[:, :0].sum()),
    "masked logits": lambda: Code(lambda x: x.masked_fill(torch.tensor([False, False, True, False]), -INF)),
    "logits with the logarithm of a mask": lambda: Code(lambda x: x + (torch.arange(4) != 2).float().log()),
    "their logarithms": lambda: Code(lambda x: x.masked_fill(torch.arange(4) == 2, -INF).log_softmax(-1)),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_networks_that_hold_what_is_not_finite(name):
    torch.manual_seed(0)
    x, labels = noise(2, 5, 4).float(), torch.zeros(2, 5, dtype=torch.long)
    model = nn.Sequential(nn.Linear(4, 4), HEALTHY[name]())

    def loss_fn(output, labels):
        return functional.cross_entropy(output.flatten(0, -2), labels.flatten()[: output.numel() // output.shape[-1]])

    assert gs.first_nonfinite(model, x) is None
    if name == "mean of the present":
        return
    assert gs.first_nonfinite(model, (x, labels), loss_fn=loss_fn) is None
    output = model(x)
    loss = loss_fn(output[0] if isinstance(output, tuple) else output, labels)
    loss.backward()
    monitor = gs.Monitor(model, x, every=1, max_overhead=None, loss_fn=loss_fn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gs.MonitorWarning)
        assert monitor.step(loss, (x, labels))  # training goes on
    if not isinstance(output, tuple):  # and a true fault behind it is found
        sick = nn.Sequential(*model, Code(lambda h: h.sigmoid() / 0.0))
        assert gs.first_nonfinite(sick, x) == gs.Fault("2", FORWARD)
        sick = nn.Sequential(Code(lambda h: h), nn.Linear(4, 4), Code(lambda h: h + (0 * h).sqrt()), *model)
        assert gs.first_nonfinite(sick, x) == gs.Fault("2", BACKWARD)


def test_rare_places():
    """A mask among the data, a factor from a user's own backward pass, a hook on a tensor, and labels."""

    class Sum(nn.Module):
        def forward(self, x, mask):
            return (x + mask).softmax(-1)

    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            return h.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * INF

    def spoiling(h):
        h = 1 * h
        h.register_hook(lambda gradient: gradient * torch.nan)
        return 1 * h

    torch.manual_seed(0)
    x, mask = noise(6, 4).float(), torch.tensor([0.0, 0.0, -INF, 0.0]).expand(6, 4)
    assert gs.first_nonfinite(Sum(), {"x": x, "mask": mask}) is None
    with pytest.raises(ValueError, match="x holds 0 NaN and 6 Inf"):
        gs.first_nonfinite(nn.Linear(4, 4), mask)
    for function in (Infinite.apply, spoiling, torch.vmap(lambda h: h + (0 * h).sqrt())):
        model = nn.Sequential(nn.Linear(4, 4), Code(function), nn.Linear(4, 4))
        assert gs.first_nonfinite(model, x) == gs.Fault("1", BACKWARD)
        with torch.inference_mode():
            assert gs.first_nonfinite(model, x) == gs.Fault("1", BACKWARD)
    unlabelled = (x, torch.full((6,), -100))
    assert gs.first_nonfinite(nn.Linear(4, 4), unlabelled, loss_fn=functional.cross_entropy) == gs.Fault(
        "loss", FORWARD
    )
    model = nn.Sequential(nn.Linear(4, 4), Code(lambda h: h.masked_fill(torch.arange(4) == 2, -INF)))
    of_masked = (x, torch.full((6,), 2))
    assert gs.first_nonfinite(model, of_masked, loss_fn=functional.cross_entropy) == gs.Fault("1", FORWARD)
    of_input = nn.Sequential(Code(lambda h: (0 * h).sqrt() + h), nn.Linear(4, 4))
    assert gs.first_nonfinite(of_input, x) == gs.Fault("0", BACKWARD) and not spoiled(of_input, x)
    monitor = gs.Monitor(of_input, x, every=1)
    with pytest.warns(gs.MonitorWarning, match="The gradient at layer 'input' is NaN or Inf"):
        monitor.step(of_input(x).sum())  # no parameter's gradient depends on this


def test_parameters_that_hold_inf_on_purpose():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1))
    with torch.no_grad():
        model[0].bias[1] = -INF
    assert gs.first_nonfinite(model, noise(6, 4).float()) is None
    with torch.no_grad():
        model[0].bias[1] = torch.nan
    assert gs.first_nonfinite(model, noise(6, 4).float()) == gs.Fault("0", "parameters")


class Scaled(nn.Module):
    """Finite values of an infinite input, but the gradient of the factor is 0 times inf."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(4))

    def forward(self, h):
        return (h * self.factor).clamp(max=1.0)


def test_a_backward_pass_that_fails_because_of_an_earlier_layer():
    model = nn.Sequential(nn.Linear(4, 4), Scaled())
    nn.init.constant_(model[0].weight, 1e38)
    x = 100 * torch.ones(6, 4)
    assert model(x).isfinite().all() and spoiled(model, x)
    assert gs.first_nonfinite(model, x) == gs.Fault("0", FORWARD)


class Written(nn.Module):
    """Rows of memory without values are written later."""

    def __init__(self):
        super().__init__()
        self.inner = Code(lambda h: 0 * h / 0)

    def forward(self, h):
        buffer = torch.empty(9, 4)
        buffer[torch.arange(6)] = self.inner(h)
        return buffer[:6]


def test_memory_without_values_is_no_fault():
    model, x = nn.Sequential(nn.Linear(4, 4), Written()), noise(6, 4).float()
    torch.use_deterministic_algorithms(True)  # fills such memory with NaN
    try:
        found = gs.first_nonfinite(model, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == gs.Fault("1.inner", FORWARD)


def test_the_gradient_of_the_input_is_no_fault_in_training():
    model, x = nn.Sequential(Code(lambda h: (0 * h).sqrt() + h), nn.Linear(4, 4)), noise(6, 4).float()
    monitor = gs.Monitor(model, x, every=100)
    with pytest.warns(gs.MonitorWarning, match="The gradient at layer 'input'"):
        monitor.step(1.0, x)
    model[1].weight.grad = torch.full((4, 4), INF)  # as from a scale that is too large
    with pytest.warns(gs.MonitorWarning, match="a second pass found no NaN or Inf"):
        monitor.step(1.0, x)
