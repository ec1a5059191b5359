"""Claims about the signals that warn of exploding training."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from experiments.evidence.means import verdict
from experiments.evidence.study import Claim
from experiments.evidence.words import listed
from experiments.studies.exploding_symptoms.alarms import Alarms
from experiments.studies.exploding_symptoms.signals import WORDS, quiet
from gradscope.monitor.alarms import FEWEST

# Accepted rate of false alarms; above it, a monitor costs more than it saves.  LIMITS: a lower and higher rate, too.
MOST_FALSE_ALARMS = 0.1
LIMITS = (0.05, MOST_FALSE_ALARMS, 0.2)
# An early warning comes at least FEW_STEPS before the failure.  "Soon" is at most FEW_STEPS after the failure.
FEW_STEPS = 5
# Failures after this step leave time for jumps: a jump needs FEWEST previous steps.
LATE = 2 * FEWEST


def warns(alarms: Alarms, name: str) -> Claim:
    """Whether a signal announces most failures."""
    lead, warned = alarms.typical(alarms.leads[name]), alarms.announced(alarms.leads[name])
    return Claim(
        f'The signal "{WORDS[name]}" announces most failures',
        warned.most,
        f"{warned} announced; median lead: {lead}",
    )


def silent(alarms: Alarms, name: str) -> Claim:
    """Whether a signal never fires in most controls."""
    every, learned = (alarms.part(~fired[name]) for fired in (alarms.false, quiet(alarms.table, learned=True)))
    says = f'In most controls, the signal "{WORDS[name]}" never fires'
    return Claim(
        says,
        every.most,
        f"controls in which it never fires: {every}; the same, of the controls that learned: {learned}",
    )


def tells(alarms: Alarms, name: str) -> Claim:
    """Whether a signal fires more often before a failure than in a control that is monitored equally long."""
    warned, more = alarms.leads[name].notna().mean(), alarms.advantage(name)
    says = f'Exploratory: "{WORDS[name]}" fires more often before failures than in equally long parts of controls'
    because = f"fraction of failing runs in which it fires before the failure: {warned:.2f}; fraction of equally long "
    because += f"parts of controls in which it fires: {alarms.matched(name)}; "
    because += f"difference: {more}"
    return Claim(says, more.above(0.0), because)


def update_first(alarms: Alarms) -> Claim:
    """Whether the signal "update" is first at these thresholds."""
    first = firsts(alarms.leads[alarms.leads.notna().any(axis=1)])
    update = alarms.part(first["update"])
    others = ", ".join(f"{WORDS[name]} {first[name].sum()}" for name in alarms.fired if name != "update")
    return Claim(
        'At these thresholds, "update" fires first (alone or at the same step as others) in most failures that any '
        "signal announces",
        update.most,
        f"{update}; failing runs in which another signal is first (alone or not): {others or 'none'}; false alarms of "
        f'"update": {alarms.false_alarms("update")}',
    )


def reliable(alarms: Alarms) -> list[Claim]:
    """What reliable signals announce together. A claim is undecided if undecided signals would change its verdict."""
    sure, perhaps = warned_by(alarms, MOST_FALSE_ALARMS)
    verdicts = alarms.reliable(MOST_FALSE_ALARMS)
    together = f"; reliable signals: {named(verdicts, True)}; undecided signals: {named(verdicts, None)}"
    late = (alarms.table.loc[sure.index, "failure_step"] > LATE).to_numpy()
    after = sure[late], perhaps[late]
    others = warned_by(alarms, MOST_FALSE_ALARMS, but="loss_jump")
    rest = {name: holds for name, holds in verdicts.items() if name != "loss_jump"}
    besides = f"; reliable signals other than the loss jump: {named(rest, True)}"
    early = [alarms.part(lead.dropna() >= FEW_STEPS) for lead in (sure, perhaps)]
    return [
        _most("Together, the reliable signals announce most failures", alarms, sure, perhaps, together),
        _most(f"Exploratory: reliable signals announce most of the failures after step {LATE}", alarms, *after),
        _most(
            "Exploratory: reliable signals other than the loss jump announce most failures", alarms, *others, besides
        ),
        Claim(
            f"In most failures that a reliable signal announces, the first such signal fires at least {FEW_STEPS} "
            "steps before the failure",
            early[0].most if early[0].most is early[1].most else None,
            f"{early[0]}; median lead: {alarms.typical(sure)}; for reliable or undecided signals: {early[1]}",
        ),
    ]


def _most(says: str, alarms: Alarms, sure: pd.Series, perhaps: pd.Series, what: str = "") -> Claim:
    least, best = alarms.announced(sure), alarms.announced(perhaps)
    holds = verdict(least.most is True, best.most is False)
    because = f"{least} announced by these signals{what}; with undecided signals as well: {best}"
    return Claim(says, holds, because)


def warned_by(alarms: Alarms, limit: float, but: str = "") -> tuple[pd.Series, pd.Series]:
    """The longest lead in each failing run: of reliable signals, and of reliable and undecided signals together."""
    verdicts = {name: holds for name, holds in alarms.reliable(limit).items() if name != but}
    sure = [name for name, holds in verdicts.items() if holds]
    perhaps = [name for name, holds in verdicts.items() if holds is not False]
    return alarms.leads[sure].max(axis=1), alarms.leads[perhaps].max(axis=1)


def at_once(alarms: Alarms) -> Claim:
    """Whether the loss soon becomes non-finite after the failure."""
    ended = alarms.table[np.isfinite(alarms.table["nan_step"])]
    after = ended["nan_step"] - ended["failure_step"]
    soon = alarms.part(after <= FEW_STEPS)
    says = f"In most runs whose loss becomes non-finite, the loss does so at most {FEW_STEPS} steps after the failure"
    return Claim(says, soon.most, f"{soon}; median: {alarms.typical(after)} after the failure")


def predicts(says: str, alarms: Alarms, models: list[str]) -> Claim:
    """Whether, among ``models``, networks that fail have larger GSC at step 0."""
    area = alarms.ranking(models)
    if area is None:
        return Claim(says, None, "there is no learning rate at which some networks fail and others do not")
    because = "fraction of pairs (a failing run and a control with equal learning rate and seed) in which the failing "
    because += f"run has the larger GSC: {area}; by chance: 0.5"
    return Claim(says, area.above(0.5), because)


def largest(alarms: Alarms) -> Claim:
    """Whether the network with the largest GSC at step 0 fails in some runs."""
    starts = alarms.table["log10_gsc_at_start"].groupby(level="model", observed=True).mean()
    model = str(starts.idxmax())
    own = alarms.table[alarms.table.index.get_level_values("model") == model]
    failed = alarms.part(np.isfinite(own["failure_step"]))
    says = "Exploratory: the network with the largest GSC at step 0 fails in some runs"
    network = model.replace("_", "+")
    because = f"{network} has the largest GSC at step 0 (10^{starts.max():.1f} on average) and fails in {failed}"
    return Claim(says, failed.count > 0, because)


def firsts(found: pd.DataFrame) -> pd.DataFrame:
    """Whether each signal was first in each failing run, perhaps at the same step as others."""
    return found.eq(found.max(axis=1), axis=0)


def names_in_words(names: Iterable[str]) -> str:
    """The names of signals, as a list for a sentence."""
    return listed(WORDS[name] for name in names)


def named(verdicts: dict[str, bool | None], wanted: bool | None) -> str:
    """The names of signals with the verdict ``wanted``, as a list for a sentence."""
    return names_in_words([name for name, holds in verdicts.items() if holds is wanted])
