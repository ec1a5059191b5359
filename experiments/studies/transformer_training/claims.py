"""Claims about what changes while a GPT learns, and which signal precedes a divergence."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from experiments.evidence import means
from experiments.evidence.alarms import Alarms
from experiments.evidence.means import Mean
from experiments.evidence.study import Claim
from experiments.studies.transformer_training import signals
from experiments.studies.transformer_training.signals import WORDS

# An early warning comes at least this number of steps before the failure.
EARLY = 5
# Accepted rate of false alarms; above it, a monitor costs more than it saves.
MOST_FALSE_ALARMS = 0.1
GOOD, LARGE, TOO_LARGE = 0.03, 0.3, (2.0, 4.0)
# Expected directions of change from the first to the last step, at the good step size.
MOVES = {"loss": -1, "gradient": -1, "attention_logit": 1, "least_entropy": -1, "weight_growth": 1, "log10_gsc": -1}
NAMES = {
    "loss": "the loss",
    "gradient": "the norm of the gradient",
    "attention_logit": "the largest attention logit",
    "least_entropy": "the smallest attention entropy of a head",
    "weight_growth": "the relative weight norm (norm / norm at the first step, largest of all layers)",
    "log10_gsc": "GSC from embedding to logits",
}


def of_signals(alarms: Alarms) -> list[Claim]:
    """Whether each signal announces failures, does so early, and is silent in controls; whether the update is first."""
    makers: tuple[Callable[[Alarms, str], Claim], ...] = (announces, early, silent)
    return [*(make(alarms, name) for make in makers for name in alarms.fired), first(alarms)]


def announces(alarms: Alarms, name: str) -> Claim:
    """Whether a signal announces most failures."""
    warned, lead = alarms.announced(alarms.leads[name]), alarms.typical(alarms.leads[name])
    return Claim(
        f'The signal "{WORDS[name]}" announces most failures',
        warned.most,
        f"failures announced: {warned}; required: above 50 %; median lead (from signal to failure): {lead}",
    )


def early(alarms: Alarms, name: str) -> Claim:
    """Whether a signal announces most failures at least `EARLY` steps before."""
    warned = alarms.part(alarms.leads[name] >= EARLY)
    return Claim(
        f'The signal "{WORDS[name]}" announces most failures at least {EARLY} steps in advance',
        warned.most,
        f"failures announced at least {EARLY} steps in advance: {warned}; required: above 50 %",
    )


def silent(alarms: Alarms, name: str) -> Claim:
    """Whether the rate of false alarms of a signal is low."""
    false = alarms.false_alarms(name)
    return Claim(
        f'The signal "{WORDS[name]}" fires in less than {100 * MOST_FALSE_ALARMS:g} % of the runs that do not fail',
        None if (above := false.above(MOST_FALSE_ALARMS)) is None else not above,
        f"false alarms: {false}; required: below {100 * MOST_FALSE_ALARMS:g} %; fraction of all pairs "
        f"(control, failing run) with a false alarm before the step of the failure: {alarms.matched(name)}",
    )


def first(alarms: Alarms) -> Claim:
    """Whether the update is the first signal."""
    found = alarms.leads[alarms.leads.notna().any(axis=1)]
    firsts = found.eq(found.max(axis=1), axis=0)
    update = alarms.part(firsts["update"])
    others = ", ".join(f"{WORDS[name]} {firsts[name].sum()}" for name in alarms.fired if name != "update")
    return Claim(
        'The signal "update" is first to fire (alone or together with others) before most announced failures',
        update.most,
        f"first to fire: {update}; required: above 50 %; runs in which another signal is first: {others}",
    )  # fmt: skip


def of_movement(frame: pd.DataFrame) -> list[Claim]:
    """What changes from the first to the last step at the good step size."""
    words = {1: "grows", -1: "falls"}
    claims = []
    for name, sign in MOVES.items():
        found = {qk: change(frame, name, qk, GOOD) for qk in (False, True)}
        claims.append(
            Claim(
                f"While a GPT learns at peak step size {GOOD:g}, {NAMES[name]} {words[sign]}",
                means.all_of(*(one.above(0.0) if sign > 0 else one.below(0.0) for one in found.values())),
                f"log10 of (value at the last step / value at the first step): {found[False]:+} without QK norm, "
                f"{found[True]:+} with QK norm",
            )
        )
    return claims


def of_norm(frame: pd.DataFrame, runs: pd.DataFrame) -> list[Claim]:
    """Whether QK norm lowers attention logits and delays failures."""
    logits = signals.moving(frame, "attention_logit")
    last = np.log10(logits[logits.columns.max()])
    smaller = means.mean(last.loc[True, LARGE] - last.loc[False, LARGE])
    later = {lr: delay(runs, lr, int(logits.columns.max()) + 1) for lr in TOO_LARGE}
    return [
        Claim(
            f"At peak step size {LARGE:g}, the largest attention logit is smaller with QK norm than without",
            smaller.below(0.0), f"log10 of (logit with / logit without QK norm) at the last step: {smaller:+}",
        ),
        *(
            Claim(
                f"At peak step size {lr:g}, runs with QK norm fail later than runs without",
                one.above(0.0), f"step of failure with QK norm minus step of failure without: {one:+}",
            )
            for lr, one in later.items()
        ),
    ]  # fmt: skip


def change(frame: pd.DataFrame, name: str, qk: bool, lr: float) -> Mean:
    """The mean over seeds of log10 (last / first value). The quantity log10_gsc is a logarithm already."""
    found = signals.moving(frame, name)
    first, last = (found[step].xs((qk, lr)) for step in (found.columns.min(), found.columns.max()))
    return means.mean(last - first if name.startswith("log10") else np.log10(last / first))


def delay(runs: pd.DataFrame, lr: float, num_steps: int) -> Mean:
    """Step of failure with QK norm minus step without, for equal seeds; ``num_steps`` for a run that does not fail."""
    failure = runs["failure_step"].clip(upper=num_steps)
    return means.mean(failure.loc[True, lr] - failure.loc[False, lr])
