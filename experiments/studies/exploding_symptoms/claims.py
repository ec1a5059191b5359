"""What is claimed of the signals that warn of training that explodes, decided from the runs that were watched."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.evidence.counts import Part
from experiments.evidence.study import Claim
from experiments.studies.exploding_symptoms.alarms import Watched
from experiments.studies.exploding_symptoms.signals import WORDS, quiet
from gradscope.monitor.alarms import FEWEST

# A monitor that stops a run in vain more often than this costs more than it saves; and the same more and less strict.
MOST_FALSE_ALARMS = 0.1
LIMITS = (0.05, MOST_FALSE_ALARMS, 0.2)
# A warning so many steps before is early, and a loss that is not finite so soon after the failure comes at once.
FEW_STEPS = 5
# Twice the steps that a jump must have before it: whoever fails later than this leaves jumps time to be seen.
LATE = 2 * FEWEST


def warns(watched: Watched, name: str) -> Claim:
    """Of failing runs."""
    warned = watched.part(watched.leads[name].notna())
    says = f"{WORDS[name]} warns before the failure in most runs that fail"
    return Claim(says, warned.most, f"{warned}; median lead {lead_in_words(watched, watched.leads[name])}")


def silent(watched: Watched, name: str) -> Claim:
    """Of controls, to their last step."""
    quiet_part = watched.part(~watched.rang[name])
    learned = watched.part(~quiet(watched.table, learned=True)[name])
    says = f"{WORDS[name]} is silent in most runs that do not fail"
    return Claim(says, quiet_part.most, f"{quiet_part}; of those that learned {learned}")


def tells(watched: Watched, name: str) -> Claim:
    """Whether a warning means anything: both are watched for equally many steps."""
    warned, matched, more = (
        watched.part(watched.leads[name].notna()), watched.matched(name), watched.advantage(name)
    )  # fmt: skip
    return Claim(
        f"Exploratory: {WORDS[name]} rings more often before a failure than in a control watched as long",
        more.above(0.0),
        f"{warned.value:.2f} of the failing runs, {matched:.2f} of the controls, difference {more:.2f}",
    )


def update_first(watched: Watched) -> Claim:
    """The order at these thresholds."""
    first = firsts(watched.leads[watched.leads.notna().any(axis=1)])
    update = watched.part(first["update"])
    others = ", ".join(f"{WORDS[name]} {first[name].sum()}" for name in watched.heard if name != "update")
    return Claim(
        "At these thresholds the update is the first to warn, alone or with others, in most failing runs that are "
        "warned at all",
        update.most,
        f"{update}; the others are first in: {others or 'none'}; but the update is a false alarm in "
        f"{watched.false_alarms('update')}",
    )


def trust(watched: Watched) -> list[Claim]:
    """What signals do together that are seldom a false alarm; decided only where the undecided ones change nothing."""
    sure, perhaps = warned_by(watched, MOST_FALSE_ALARMS)
    verdicts = watched.trusty(MOST_FALSE_ALARMS)
    together = f"{named(verdicts, True)} (undecided: {named(verdicts, None)})"
    late = (watched.table.loc[sure.index, "failure_step"] > LATE).to_numpy()
    others = warned_by(watched, MOST_FALSE_ALARMS, but="loss_jump")
    early = [watched.part(lead.dropna() >= FEW_STEPS) for lead in (sure, perhaps)]
    return [
        _most("Some trusty signal warns of most failures", watched, sure, perhaps, together),
        _most(f"Exploratory: the same of failures after step {LATE}", watched, sure[late], perhaps[late], ""),
        _most("Exploratory: some trusty signal other than the loss jump warns of most failures", watched, *others, ""),
        Claim(
            f"Where a trusty signal warns, the first is mostly {FEW_STEPS} steps or more before the failure",
            early[0].most if early[0].most is early[1].most else None,
            f"{early[0]}; median lead {lead_in_words(watched, sure)}; with the undecided signals {early[1]}",
        ),
    ]


def _most(says: str, watched: Watched, sure: pd.Series, perhaps: pd.Series, what: str) -> Claim:
    least, best = watched.part(sure.notna()), watched.part(perhaps.notna())
    because = f"{least}{'; ' if what else ''}{what}; with the undecided signals {best}"
    return Claim(says, True if least.most else False if best.most is False else None, because)


def warned_by(watched: Watched, limit: float, but: str = "") -> tuple[pd.Series, pd.Series]:
    """Of each failing run the longest lead of the trusty signals, and of those together with the undecided."""
    verdicts = {name: holds for name, holds in watched.trusty(limit).items() if name != but}
    sure = [name for name, holds in verdicts.items() if holds]
    perhaps = [name for name, holds in verdicts.items() if holds is not False]
    return watched.leads[sure].max(axis=1), watched.leads[perhaps].max(axis=1)


def at_once(watched: Watched) -> Claim:
    """How long the failure takes to a loss that is not finite."""
    ended = watched.table[np.isfinite(watched.table["nan_step"])]
    after = ended["nan_step"] - ended["failure_step"]
    soon = watched.part(after <= FEW_STEPS)
    return Claim(
        f"In most runs that come to it the loss is not finite {FEW_STEPS} steps after the failure or sooner",
        soon.most,
        f"{soon}; median {lead_in_words(watched, after)}",
    )


def predicts(says: str, watched: Watched, models: list[str]) -> Claim:
    """Whether GSC at step 0 ranks these networks by whether they fail."""
    area = watched.ranking(models)
    return Claim(
        says,
        None if area is None else area.above(0.5),
        "0 learning rates at which some fail and others do not"
        if area is None
        else f"the failing one of a pair of runs has the larger GSC in a part of {area:.2f}; chance is 0.5",
    )


def largest(watched: Watched) -> Claim:
    """The network that explodes most at initialization."""
    starts = watched.table["log10_gsc_at_start"].groupby(level="model", observed=True).mean()
    model = str(starts.idxmax())
    own = watched.table[watched.table.index.get_level_values("model") == model]
    failed = watched.part(np.isfinite(own["failure_step"]))
    return Claim(
        "Exploratory: the network with the largest GSC at step 0 fails in some of these runs",
        failed.count > 0,
        f"{model}, which has the largest GSC at step 0 (10^{starts.max():.1f} on average), fails in {failed}",
    )


def firsts(found: pd.DataFrame) -> pd.DataFrame:
    """Whether a signal was the first of a failing run, alone or with others."""
    return found.eq(found.max(axis=1), axis=0)


def lead_in_words(watched: Watched, values: pd.Series) -> str:
    """Median of the steps that are known."""
    return f"{watched.median(values)} steps" if values.notna().any() else "none"


def names_in_words(names: list[str]) -> str:
    """A list of signals."""
    return ", ".join(WORDS[name] for name in names) or "none"


def named(verdicts: dict[str, bool | None], verdict: bool | None) -> str:
    """The signals of one verdict."""
    return names_in_words([name for name, holds in verdicts.items() if holds is verdict])


def in_percent(found: Part) -> str:
    """Rounded, with the counts and the interval."""
    low, high = found.interval
    return f"{100 * found.value:.0f} % ({found.count} of {found.num} runs; {100 * low:.0f} to {100 * high:.0f} %)"
