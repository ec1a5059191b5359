"""Odd values of about the type that an argument asks for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from benchmarks.odd.values import VALUES

Values = dict[str, Callable[[], Any]]


class Wrong(nn.Module):
    """A module whose output is no tensor."""

    def forward(self, x: torch.Tensor) -> str:
        """A text."""
        return "x"


def poisoned(value: float) -> nn.Module:
    """A linear map with one weight of this value."""
    model = nn.Linear(6, 6)
    with torch.no_grad():
        model.weight[0, 0] = value
    return model


def inference() -> torch.Tensor:
    """A tensor that was made in inference mode."""
    with torch.inference_mode():
        return torch.ones(4, 6)


def frame(**columns: Any) -> pd.DataFrame:
    """A tidy frame of two layers in which some columns are replaced."""
    usual = {
        "layer": ["a", "b"], "index": [0, 1], "depth_from_output": [1, 0], "target": "b", "quantity": "gsc",
        "value": [1.0, 1.0], "log10_value": [0.0, 0.0], "log10_stderr_probe": 0.0, "log10_stderr_sample": 0.0,
        "stderr_sample": None, "reduction": "batch", "coupled": False, "num_probes": 0, "num_samples": 4, "step": 1,
        "loss": 1.0, "network": "a",
    }  # fmt: skip
    return pd.DataFrame({**usual, **columns})


def rates(**columns: Any) -> pd.DataFrame:
    """A frame of growth rates in which some columns are replaced."""
    usual = {"rate": 1.0, "rate_low": 0.9, "rate_high": 1.1, "width": 8, "verdict": "stable", "weight_variance": 1.0}
    return frame(**{**usual, "bias_variance": 0.1, **columns})


def some(names: str) -> Values:
    """The values of these names."""
    return {name: VALUES[name] for name in names.split("; ")}


NUMBERS = some(
    "True; False; 0; 1; -1; 3; 2.5; nan; inf; -inf; 10**400; 10**12; 10**6; 2**31; 2**63; 1e308; 1e-320; -0.0; "
    "float32; int64; bool_; tensor(nan); tensor(3); tensor(0.5); array(nan)"
) | {"1e-12": lambda: 1e-12, "1e12": lambda: 1e12, "1 - 1e-12": lambda: 1 - 1e-12, "100": lambda: 100}
TEXTS = some("empty text; text a; auto; exact; NUL; relu; text 3; surrogate; long text; path text") | {
    "input": lambda: "input", "gsc": lambda: "gsc", "step": lambda: "step", "layer": lambda: "layer",
    "*": lambda: "*", "[": lambda: "[", "cuda": lambda: "cuda", "$x^": lambda: "$x^", "batch": lambda: "batch",
}  # fmt: skip
FUNCTIONS = some(
    "lambda: None; lambda *a: None; lambda *a: text; lambda *a: nan; raising; len; class; Module; Identity"
) | {
    "lambda *a: 1": lambda: lambda *a: 1.0, "lambda *a: inf": lambda: lambda *a: np.inf,
    "first": lambda: lambda *a: a[0], "last": lambda: lambda *a: a[-1], "lambda *a: []": lambda: lambda *a: [],
    "lambda *a: tensor": lambda: lambda *a: torch.ones(2, 3), "detached": lambda: lambda model, x: model(x).detach(),
    "sum": lambda: lambda model, x: model(x).sum(),
}  # fmt: skip
TENSORS = {name: value for name, value in VALUES.items() if "tensor" in name} | {
    "images": lambda: torch.ones(3, 1, 8, 8), "one image": lambda: torch.ones(1, 1, 8, 8),
    "tensor inf": lambda: torch.full((4, 6), math.inf), "tensor int (4, 6)": lambda: torch.ones(4, 6).long(),
    "tensor (1, 6)": lambda: torch.ones(1, 6), "tensor (4, 0)": lambda: torch.ones(4, 0),
    "tensor 1e38": lambda: torch.full((4, 6), 1e38), "tensor zeros": lambda: torch.zeros(4, 6),
    "tensor double": lambda: torch.ones(4, 6).double(), "inference": inference, "list": lambda: [torch.ones(4, 6)] * 3,
    "pair": lambda: (torch.ones(4, 6), torch.ones(4, 6)), "texts in a dict": lambda: {"x": "a"},
    "pair of None": lambda: (None, None), "repeat(1)": lambda: itertools.repeat(1),
    **some("finite generator; cycle; endless generator; Endless; empty iterator; count()"),
}  # fmt: skip
MODELS: Values = some("Linear; Module; Identity") | {
    "Linear 6": lambda: nn.Linear(6, 6), "Lazy": lambda: nn.LazyLinear(3), "Wrong": Wrong,
    "weight nan": lambda: poisoned(math.nan), "weight inf": lambda: poisoned(math.inf),
    "weight 3e38": lambda: poisoned(3e38), "Conv2d": lambda: nn.Conv2d(1, 2, 3),
    "Linear meta": lambda: nn.Linear(6, 6, device="meta"), "Linear half": lambda: nn.Linear(6, 6).half(),
    "Sequential": nn.Sequential, "Embedding": lambda: nn.Embedding(3, 4),
    "frozen": lambda: nn.Linear(6, 6).requires_grad_(False), "zero": lambda: poisoned(0.0).requires_grad_(False),
}  # fmt: skip
FRAMES = some("empty frame; frame a; frame of texts; series; []; {}; [None]") | {
    "two rows": frame, "no rows": lambda: frame().iloc[:0], "layer None": lambda: frame(layer=None),
    "index text": lambda: frame(index="a"), "value text": lambda: frame(value="b", log10_value="b"),
    "log nan": lambda: frame(log10_value=math.nan), "log inf": lambda: frame(log10_value=math.inf),
    "step text": lambda: frame(step="x"), "objects": lambda: frame(log10_value=[object(), object()]),
    "quantity numbers": lambda: frame(quantity=1), "column twice": lambda: pd.concat([frame(), frame()], axis=1),
    "dates": lambda: frame(index=pd.Timestamp("2020")), "list of frames": lambda: [frame(), frame()],
    "dict of frames": lambda: {"a": frame()}, "nested frames": lambda: {"a": {"b": [frame()]}},
    "loss text": lambda: frame(loss="a"), "rates": rates, "column of tuples": lambda: frame(layer=[(1, 2), (3, 4)]),
    "rates text": lambda: rates(rate="a", rate_low="b", rate_high="c", width="d", verdict=1, weight_variance="a"),
    "rates nan": lambda: rates(rate=math.nan, width=0, verdict=None, bias_variance=math.nan),
    "log text": lambda: frame(log10_value=["1", "2"]), "depth nan": lambda: frame(depth_from_output=[math.nan, 0]),
}  # fmt: skip
SEQUENCES = {name: VALUES[name] for name in VALUES if name[0] in "[({" or "array" in name or "range" in name} | {
    "0s": lambda: [0.0], "texts": lambda: ["input", "input"], "[1e308]": lambda: [1e308, 1e308], "[-1]": lambda: [-1.0],
    "(1e9, 0)": lambda: (10**9, 0), "dict of text": lambda: {"a": "x"}, "dict of nan": lambda: {"a": math.nan},
    "dict of functions": lambda: {"a": lambda: None}, "seeds": lambda: [3, 3],
    "dict of classes": lambda: {"a": nn.Module},
}  # fmt: skip
KINDS = {
    "data: Any": TENSORS | FRAMES, "metrics": FRAMES, "predicted": FRAMES, "points": FRAMES, "DataFrame": FRAMES,
    "Tensor": TENSORS, "nn.Module": MODELS, "Callable": FUNCTIONS, "Forward": FUNCTIONS, "LossFunction": FUNCTIONS,
    "Function": FUNCTIONS, "Activation": FUNCTIONS | TEXTS, "Progress": FUNCTIONS, "LayerFilter": FUNCTIONS | TEXTS,
    "Sequence": SEQUENCES, "Mapping": SEQUENCES, "tuple": SEQUENCES, "Array": SEQUENCES, "Shift": SEQUENCES,
    "Lengths": SEQUENCES | NUMBERS, "Numbers": SEQUENCES | NUMBERS, "dict": SEQUENCES, "str": TEXTS, "Path": TEXTS,
    "Probes": NUMBERS | TEXTS, "Every": NUMBERS | TEXTS, "device": TEXTS,
    **dict.fromkeys(
        ("int", "float", "Size", "Depth", "Finite", "Positive", "Nonnegative", "Share", "Cosine"), NUMBERS
    ),
}  # fmt: skip
ALL: Values = {name: make for kind in KINDS.values() for name, make in kind.items()} | VALUES


def like(annotation: str) -> Values:
    """Odd values of about the type that an annotation asks for; all values if the type is not known."""
    found: Values = {}
    for word, kind in KINDS.items():
        found |= kind if word in annotation else {}
    return found or VALUES
