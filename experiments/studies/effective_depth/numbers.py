"""Numbers of the study of effective depth, read from the frame."""

from __future__ import annotations

from typing import cast

import numpy as np
import pandas as pd

from experiments.archive.labels import network_name
from experiments.studies.effective_depth.measurement import TOLERANCES

# Largest accepted increase of the loss by replacement. For comparison, guessing one of ten classes has loss 2.3.
SUFFERS = 0.1

NETWORK = ["activation", "norm", "residual", "depth"]
Key = tuple[str, str, str, int]


def name(key: Key, *, depth: bool = True) -> str:
    """``selu, depth 50`` or ``tanh+layer, residual, depth 50``."""
    return network_name(key[:2]) + ("" if key[2] == "none" else ", residual") + (f", depth {key[3]}" if depth else "")


class Runs:
    """The frame of the study, split by quantity and network."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self._rows = dict(iter(frame.groupby(["quantity", *NETWORK], observed=True, sort=False)))
        networks = [cast(Key, key[1:]) for key in self._rows if key[0] == "train_loss"]
        learned = {key: np.isfinite(self.rows(key, "train_loss")["value"]).all() for key in networks}
        self.failed = [key for key in networks if not learned[key]]
        """Networks whose training diverged, in at least one seed, with every learning rate."""
        self.trained = sorted(filter(learned.get, networks), key=lambda key: (key[3], key[2] != "none"))
        """All other networks, sorted by depth, plain networks first."""
        depths = [key[3] for key in self.trained]
        self.shallow, self.deep = ([key for key in self.trained if key[3] == end(depths)] for end in (min, max))

    def rows(self, key: Key, quantity: str) -> pd.DataFrame:
        """The rows of one quantity for one network."""
        return self._rows[quantity, *key]

    def by_seed(self, key: Key, quantity: str = "effective_depth", tolerance: float | None = None) -> pd.DataFrame:
        """Values of one quantity for one network, as a table of shape (steps, seeds)."""
        chosen = self.rows(key, quantity)
        if tolerance is not None:
            chosen = chosen[chosen["tolerance"] == tolerance]
        return chosen.pivot_table(index="step", columns="seed", values="value", observed=True)

    def final(self, key: Key, quantity: str = "effective_depth", *, index: int = 0) -> pd.Series:
        """Values at the end of training, one per seed; ``index`` chooses the tolerance."""
        return self.by_seed(key, quantity, TOLERANCES[index] if "depth" in quantity else None).iloc[-1]

    def layers(self, key: Key) -> int:
        """Number of layers whose Jacobian training can change."""
        return int(self.rows(key, "change")["index"].max())

    def taylor(self, key: Key) -> pd.DataFrame:
        """Loss minus the loss of the whole network, as a table of shape (number of replaced layers, seeds)."""
        rows = self.rows(key, "taylor_loss")
        table = rows.pivot_table(index="index", columns="seed", values="value", observed=True)
        return table - table.iloc[0]

    def replaceable(self, key: Key) -> pd.Series:
        """For each seed, how many of the last layers can be replaced before the loss rises by more than `SUFFERS`."""
        suffers = ~(self.taylor(key) <= SUFFERS)
        return suffers.idxmax().where(suffers.any(), len(suffers)) - 1
