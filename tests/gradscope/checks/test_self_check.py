"""gs.check finds what is wrong with a model, names it, and passes those that are right."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

import gradscope as gs
from gradscope.checks.self_check import FAILED, PASSED, SKIPPED
from gradscope.models import MLP, AlexNetA
from tests.helpers import noise, seeded


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Detached(Net):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.c(torch.tanh(self.b(h) + h.detach()))


class MeanWithoutGradient(Net):
    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.c(torch.tanh(self.b(h - h.mean(dim=0).detach())))


CALLS, GENERATOR = itertools.count(1), torch.Generator()  # outside the model, so a measurement cannot restore them


class Counting(Net):
    def forward(self, x):
        return self.c(self.b(self.a(x)) * next(CALLS))


class OutsideGenerator(Net):
    def forward(self, x):
        h = self.a(x)
        return self.c(self.b(h + torch.randn(h.shape, generator=GENERATOR).to(h)))


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient


class UserFunction(Net):
    def forward(self, x):
        return self.c(WrongGradient.apply(torch.tanh(self.b(torch.tanh(self.a(x))))))


class Overwriting(Net):
    def forward(self, x):
        with torch.no_grad():
            self.a.weight.mul_(1.0 + 1e-3)
        return super().forward(x)


CNN = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(32, 3))
EMBEDDED = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))


def statuses(report):
    return {check.name: check.status for check in report.checks}


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (MLP(depth=10, width=8, generator=seeded()).double(), noise(6, 8)),
        (MLP(depth=5, width=8, norm="batch", activation="tanh", generator=seeded()).double(), noise(6, 8)),
        (CNN.double(), noise(4, 1, 6, 6)),
        (EMBEDDED.double(), torch.arange(15).reshape(5, 3) % 9),
        (AlexNetA(generator=seeded()).eval(), torch.rand(2, 3, 32, 32, generator=seeded())),
    ],
    ids=["mlp", "batch norm", "convolution and dropout", "embedding", "alexnet in float32"],
)  # fmt: skip
def test_right_models_pass(model, x):
    report = gs.check(model, x)
    assert report.passed, str(report)
    found = statuses(report)
    assert found["finite differences"] == found["adjoint"] == found["determinism"] == found["left alone"] == PASSED


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (Detached, "finite differences", "layer 'c' changes by .* a gradient is stopped, replaced or wrong"),
        (MeanWithoutGradient, "independence", "changing sample 0 moves another sample of 'c' by"),
        (Counting, "determinism", "changes layer 'c' by"),
        (OutsideGenerator, "determinism", "changes layer 'b' by"),
        (UserFunction, "finite differences", "layer 'c' changes by"),
        (Overwriting, "left alone", "changed: parameter a.weight"),
    ],
)
def test_culprits(make, name, message):
    torch.manual_seed(0)
    report = gs.check(make().double(), noise(5, 4))
    assert not report.passed
    (found,) = [check for check in report.checks if check.name == name]
    assert found.status == FAILED
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found.detail)


def test_with_a_loss_and_what_cannot_be_judged():
    def losses(output, labels):
        return functional.cross_entropy(output, labels, reduction="none")

    report = gs.check(Net().double(), (noise(5, 4), torch.arange(5) % 2), loss_fn=losses)
    assert report.passed and statuses(report)["finite differences"] == PASSED
    exploding = MLP(depth=60, width=12, norm="batch", generator=seeded())
    assert statuses(gs.check(exploding, noise(8, 12).float()))["finite differences"] == SKIPPED
    wide = gs.check(nn.Sequential(nn.Linear(3, 600), nn.Tanh()).double(), noise(2, 3))
    assert statuses(wide)["probes"] == SKIPPED and "exact coefficients need 600 cotangents" in str(wide)


def test_a_report_prints_one_line_a_test():
    report = gs.check(Net().double(), noise(5, 4))
    assert len(str(report).splitlines()) == len(report.to_frame()) == 6
    assert str(report).startswith("passed  adjoint")
