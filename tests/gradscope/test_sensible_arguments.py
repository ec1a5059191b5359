"""Sensible arguments of other types than those of the annotations are taken: scalars of numpy and torch, paths, ..."""

import math
from collections import OrderedDict

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import gradscope as gs
from tests.helpers import noise, seeded


def model():
    return gs.models.MLP(depth=7, width=6, generator=seeded()).double()


def gsc():
    return gs.gsc(model(), noise(4, 6))


def profile():
    return gsc().to_frame()


def inferred(make):
    with torch.inference_mode():
        return make()


class Called(nn.Module):
    def forward(self, network, x):
        return network(x)


def picked(output, labels):
    return output[torch.arange(len(output)), labels.long()]


LEGITIMATE = {
    "a path": lambda path: gsc().save(path / "a.parquet"),
    "a name of 255 bytes": lambda path: gs.frames.save(gs.frames.observed("a", 1.0), path / ("x" * 200 + ".csv")),
    "booleans of numpy": lambda _: gs.models.MLP(depth=np.int8(2), width=np.uint8(3), bias=np.False_),
    "a tensor as tolerance": lambda _: gs.testing.assert_qm_norm(torch.eye(3), torch.tensor(1), rtol=np.float16(0.1)),
    "a matrix of lists": lambda _: gs.testing.assert_qm_norm([[1.0, 0.0], [0.0, 1.0]], np.int64(1)),
    "an infinite matrix": lambda _: gs.qm_norm(np.array([[np.inf]])),
    "a batch size of numpy": lambda _: gs.meanfield.batch_moments("relu", np.int32(16)),
    "an infinite batch": lambda _: gs.meanfield.batch_moments("relu", np.float64(np.inf)),
    "a length": lambda _: gs.meanfield.critical_line("tanh", torch.tensor(0.5)),
    "an infinite estimate": lambda _: gs.Estimate(np.inf, None, np.int64(3), np.int32(2), torch.tensor(math.inf)),
    "strings of numpy": lambda _: gs.gsc(model(), noise(4, 6), reduction=np.str_("batch"), target=np.str_("layers.3")),
    "an array of names": lambda _: gs.gsc(model(), noise(4, 6), layers=np.array(["input", "layers.3"])),
    "a series of quantities": lambda _: gs.frames.observed(pd.Series(["a", "b"]), [1, 2], layer=np.array(["x", "y"])),
    "a column of tensors": lambda _: gs.frames.observed("a", torch.ones(2), step=np.arange(2), name="net", seed=None),
    "a loss module": lambda _: gs.first_nonfinite(model(), (noise(4, 6), noise(4, 6)), loss_fn=nn.MSELoss()),
    "a module as forward": lambda _: gs.gsc(model(), noise(4, 6), forward=Called()),
    "labels as int32": lambda _: gs.measure(model(), (noise(4, 6), torch.arange(4).int()), loss_fn=picked),
    "weights in inference": lambda _: inferred(lambda: gs.initializers.he(torch.ones(2, 3))),
    "a parameter as weight": lambda _: gs.initializers.he(nn.Parameter(torch.ones(2, 3))),
    "a statistic of numpy": lambda _: gs.measures.SaturatedFraction(slope=np.array(0.1)),
    "no growth but a theory": lambda path: gs.report_frame(
        profile(), path / "b.html", theory=profile().assign(network="network")
    ),
    "growth without theory": lambda path: gs.report_frame(
        profile(), path / "c.html", growth=pd.DataFrame([{"network": "a", **vars(gsc().growth())}])
    ),
    "categories": lambda _: gs.plots.profile(profile().assign(network=pd.Categorical(["a"] * 8)), hue="network"),
    "a state of a monitor": lambda _: gs.Monitor(model(), noise(4, 6)).load_state_dict(
        OrderedDict(gs.Monitor(model(), noise(4, 6)).state_dict())
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", LEGITIMATE.values(), ids=LEGITIMATE)
def test_sensible_values_of_other_types_are_taken(call, tmp_path):
    call(tmp_path)
