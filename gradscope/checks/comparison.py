"""`Comparison`: what `gradscope.compare` found, most conspicuous first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from gradscope.checks.levels import freedom, limit
from gradscope.checks.reading import Reading
from gradscope.checks.siblings import Deviation
from gradscope.coefficients.profiles import Profile
from gradscope.frames import notebook
from gradscope.meanfield import Prediction

FloatArray = npt.NDArray[np.float64]

MOST_NAMED = 4  # layers that the text names, and deviations of each


@dataclass(frozen=True)
class Comparison:
    """Deviations of layers from similar layers of the network and from mean-field theory; made by `gradscope.compare`.

    - ``deviations``: deviations of layers, the strongest first; see `gradscope.checks.siblings.Deviation`.
    - ``judged``: layers that were compared with similar layers (siblings).
    - ``unreadable``: why theory does not cover the network, or "".
    - ``band``: if `compare` got a ``prediction``, a frame with the measured and the predicted log10 GSC of each layer,
      and the lower and upper end of the prediction.

    The other fields hold the comparison with theory.  They are None or empty if theory does not cover the network.
    ``profile``: the measured GSC.  ``prediction``: theory for the expected initialization.  ``layers``: names in
    execution order.  ``weight_variances``, ``nominal``: measured and expected sigma_w^2 = fan_in Var(W) of each weight
    W.  There are three z-scores per layer, NaN where a test does not apply:

    - ``z_length`` compares the mean square of the pre-activations with theory.  Theory predicts it from the measured
      mean square of the layer's input, so a wrong layer does not change the z-scores of later layers.
    - ``z_growth`` compares the increment of ln GSC across the layer with theory.  Theory predicts this increment from
      the measured mean square of the layer's input.  Let d be the measured minus the predicted increment.  ``z_growth``
      is d minus its median over the layers, divided by a robust standard deviation of d over the layers
      (`gradscope.checks.levels.scale`).
    - ``z_weight`` compares the logarithms of the measured and the expected weight variance.

    >>> import torch
    >>> import gradscope as gs
    >>> model = gs.models.MLP(depth=8, width=30, generator=torch.Generator().manual_seed(0))
    >>> gs.compare(model, torch.randn(8, 30, generator=torch.Generator().manual_seed(1)))
    Comparison(8 layers, no layer deviates)
    """

    deviations: tuple[Deviation, ...]
    judged: tuple[str, ...]
    unreadable: str = ""
    profile: Profile | None = None
    prediction: Prediction | None = None
    reading: Reading | None = None
    layers: tuple[str, ...] = ()
    weight_variances: FloatArray = field(default_factory=lambda: np.empty(0))
    nominal: FloatArray = field(default_factory=lambda: np.empty(0))
    log10_gsc: FloatArray = field(default_factory=lambda: np.empty(1))
    z_length: FloatArray = field(default_factory=lambda: np.empty(0))
    z_growth: FloatArray = field(default_factory=lambda: np.empty(0))
    z_weight: FloatArray = field(default_factory=lambda: np.empty(0))
    band: pd.DataFrame | None = None

    @property
    def first_deviation(self) -> str | None:
        """Name of the layer with the strongest deviation, or None; first in ``deviations``, not in execution order."""
        return self.deviations[0].layer if self.deviations else None

    @property
    def first_weight_outlier(self) -> str | None:
        """Name of the first layer whose weights do not have the expected variance, or None.

        It is also None if theory does not cover the network.  GSC does not show a wrong weight variance before a
        normalization or a homogeneous activation such as ReLU; this property does.
        """
        beyond = np.flatnonzero(np.abs(np.nan_to_num(self.z_weight)) > self.limit())
        return self.layers[beyond[0]] if len(beyond) else None

    def limit(self, growth: bool = False) -> float:
        """Return the threshold of |z_length| and |z_weight|, or with ``growth=True`` the threshold of |z_growth|.

        A layer deviates if one of its |z| exceeds the threshold for it.  Thresholds are corrected (Bonferroni) for the
        number of z-scores of all layers.
        """
        tests = [int(np.isfinite(z).sum()) for z in (self.z_length, self.z_growth, self.z_weight)]
        return limit(max(sum(tests), 1), freedom(tests[1]) if growth else np.inf)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per layer: measured and predicted log10 GSC, weight variances and z-scores.

        The column ``deviation`` describes the strongest deviation of the layer; it is "" if the layer has none.  If
        `compare` got a ``prediction``, the other columns are those of the attribute ``band``.  Otherwise, if theory
        does not cover the network, the only other column is ``layer``.
        """
        texts: dict[str, str] = {}
        for deviation in self.deviations:
            texts.setdefault(deviation.layer, deviation.text)
        if self.band is not None:
            return self.band.assign(deviation=[texts.get(name, "") for name in self.band["layer"]])
        names = self.layers or self.judged
        columns: dict[str, Any] = {"layer": names}
        if self.prediction is not None:
            columns |= {
                "log10_gsc": self.log10_gsc[1:],
                "log10_gsc_theory": self.prediction.log10_gsc[1:],
                "weight_variance": self.weight_variances,
                "weight_variance_nominal": self.nominal,
                "z_length": self.z_length,
                "z_growth": self.z_growth,
                "z_weight": self.z_weight,
            }
        return pd.DataFrame(columns | {"deviation": [texts.get(name, "") for name in names]})

    def __str__(self) -> str:
        lines: list[str] = []
        for layer in list(dict.fromkeys(d.layer for d in self.deviations))[:MOST_NAMED]:
            texts = list(dict.fromkeys(d.text for d in self.deviations if d.layer == layer))
            which = "another layer that deviates" if lines else "most conspicuous layer"
            lines.append(f"{which}: {layer}: {'; '.join(texts[:MOST_NAMED])}")
        if not lines:
            lines.append("no layer deviates")
        lines.append(f"compared with siblings: {len(self.judged)} layers")
        if self.band is not None:
            return "\n".join([*lines, f"compared with the prediction: {len(self.band)} layers"])
        if self.prediction is None or self.profile is None:
            return "\n".join([*lines, f"not compared with theory: {self.unreadable}"])
        theory = 10 ** float(-np.diff(self.prediction.log10_gsc)[len(self.layers) // 2 :].mean())
        lines.append(f"theory: rate {theory:.4f} per layer over the upper half")
        try:
            lines.append(f"measured: {self.profile.growth()}")
        except ValueError as reason:
            lines.append(f"measured: no rate ({reason})")
        return "\n".join(lines)

    def __repr__(self) -> str:
        first = f"most conspicuous: {self.first_deviation}" if self.deviations else "no layer deviates"
        return f"Comparison({len(self.layers or self.judged)} layers, {first})"

    def _repr_html_(self) -> str:
        """Return what ``print`` shows and a table of the layers as HTML, for notebooks."""
        return notebook(str(self), self.to_frame())
