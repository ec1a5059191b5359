"""Which signal warns first when training explodes?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments import symptom_figures
from experiments.collect import Collected
from experiments.counts import median, part
from experiments.study import Claim
from experiments.summaries import Mean, mean
from experiments.symptom_figures import WORDS
from experiments.symptoms import THRESHOLDS, condensed, leads, quiet
from experiments.symptoms import runs as runs_of
from gradscope.alarms import FEWEST

__all__ = ["condensed"]

QUESTION = "Which signal warns first when training explodes, and how long before?"
METHOD = """
Plain networks of depth 20 and width 50 learn digits by SGD with momentum in float32, 50 steps in which the learning
rate rises in a straight line to its peak, as in a range test (L. N. Smith, arXiv:1506.01186): training goes well until
it does not. Three networks explode at initialization (relu_batch, tanh_layer, selu), two do not (relu, tanh); peaks go
from sane to far too large. Everything is recorded at every step before the update; GSC from two random vectors, the
same at every step, on 32 test images.

**Failure** is the first step whose loss is not finite or above 10 ln 10, ten times that of guessing among ten classes.
The runs that do not fail are the controls; those among them have **learned** whose last loss is below half of that of
guessing. **Signals** have thresholds that were fixed before these runs, where the monitor has one, its own; a *jump* is
over the median of up to 50 steps before, of which there must be 5:

- *loss jump*: the loss above 5 times that median;
- *gradient jump*: the length of the whole gradient above 10 times it;
- *update*: a layer's update longer than 0.1 of its weights;
- *weight growth*: a layer's weights 10 times as long as at the beginning;
- *GSC*: the coefficient of some layer to the logits (squared convention, arXiv:1712.05577) above 10^6;
- *GSC jump*: the largest coefficient of all layers above 10 times its median.

A failing run is **warned** by a signal that passes its threshold at a step before the failure; the **lead** is the
number of steps between; that to a loss that is not finite (NaN) is of the runs that come to it. In a control the same
signal is a **false alarm**. A signal is called **trusty** here if it is one in at most a tenth of the controls.
"""
HOW_SURE = """
Parts of runs have Wilson intervals and medians of leads those of order statistics, 95 %, both of which take runs as
independent; seeds of one network at one learning rate are alike, so they are too narrow. The interval of the ranking by
GSC is over seeds, Student's t, with these networks and learning rates as they are. Failures later than the last step
count as none, and a failing run is watched for fewer steps than a control, so false alarms have more time than
warnings. Where a run fails within five steps no jump can be seen, for there is nothing to jump from; late failures were
set apart for that after a first look at the runs. Trusty signals were found in the runs that they are judged by. Other
networks, other thresholds, and learning rates that rise more slowly, would give other leads. The networks with the
largest GSC at step 0 are those with normalization, which also bounds what a long update does to the output; the ranking
cannot tell the two apart, and that without them, which was added after the first look, has three networks.
"""

# A monitor that stops a run in vain more often than this costs more than it saves.
MOST_FALSE_ALARMS = 0.1
# A warning so many steps before is early, and a loss that is not finite so soon after the failure comes at once.
FEW_STEPS = 5
# Twice the steps that a jump must have before it: whoever fails later than this leaves jumps time to be seen.
LATE = 2 * FEWEST


def figures(collected: Collected) -> dict[str, Figure]:
    """How many were warned, how long before, one run, and who failed."""
    return symptom_figures.draw(runs_of(collected.frame), collected.frame)


def claims(collected: Collected) -> list[Claim]:
    """Warnings and false alarms of each signal, which comes first, and what GSC at the beginning predicts."""
    runs = runs_of(collected.frame)
    found, rang = leads(runs), quiet(runs)
    return [
        *(_warns(name, found[name]) for name in THRESHOLDS),
        *(_silent(name, rang[name], quiet(runs, learned=True)[name]) for name in THRESHOLDS),
        _update_first(found),
        *_trust(runs),
        _at_once(runs),
        _predicts("At a given learning rate the networks with larger GSC at step 0 are those that fail", runs),
        _predicts("The same among networks without normalization", _without_norm(runs, collected.frame)),
    ]


def answer(collected: Collected) -> str:
    """The first signals, and a table of all."""
    runs = runs_of(collected.frame)
    found, rang, to_nan = leads(runs), quiet(runs), leads(runs, "nan_step")
    heads = ["failing runs warned", "first", "lead to failure", "lead to NaN", "false alarms", "where it learned"]
    lines = [f"| signal | {' | '.join(heads)} |", "|" + 7 * "---|"]
    first = _first(found)
    for name in sorted(THRESHOLDS, key=lambda name: -found[name].notna().sum()):
        cells = [
            WORDS[name], str(part(found[name].notna())), str(first[name].sum()), _lead(found[name]),
            _lead(to_nan[name]), str(part(rang[name])), str(part(quiet(runs, learned=True)[name])),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return f"{_in_words(runs)}\n\n" + "\n".join(lines)


def _in_words(runs: pd.DataFrame) -> str:
    found, rang, ended = leads(runs), quiet(runs), runs[np.isfinite(runs["nan_step"])]
    if not len(found):
        return f"None of {len(runs)} runs fails."
    begin = (
        f"Of {len(runs)} runs {len(found)} fail, {len(ended)} of these with a loss that is not finite, "
        f"{median(ended['nan_step'] - ended['failure_step'])} steps later. "
    )
    firsts = _first(found).sum()
    earliest, to_nan = str(firsts.idxmax()), leads(runs, "nan_step")
    begin += (
        f"Most often {WORDS[earliest]} warns first, in {firsts.max()} of them: {_lead(found[earliest])} before the "
        f"failure, {_lead(to_nan[earliest])} before the loss is not finite; but it is a false alarm in "
        f"{part(rang[earliest])} that do not fail. "
    )
    learned = quiet(runs, learned=True)
    alarms = [f"{WORDS[name]} (in {learned[name].sum()})" for name in THRESHOLDS if learned[name].any()]
    begin += f"In the {len(learned)} of these that learned, false alarms are of: {', '.join(alarms) or 'no signal'}. "
    own = found[trusty(rang)]
    if not own.notna().any(axis=None):
        return begin + "No trusty signal warns of any failure."
    lead, lead_to_nan = own.max(axis=1), to_nan[own.columns].max(axis=1)
    return (
        f"{begin}Of the trusty signals {_winners(_first(own).sum())} comes first most often, and "
        f"{_winners(own.notna().sum())} warns of the most; any of them warns of {part(own.notna().any(axis=1))}, "
        f"{_lead(lead)} before the failure and {_lead(lead_to_nan)} before the loss is not finite. Steps are "
        "medians; all intervals are of 95 %."
    )


def trusty(rang: pd.DataFrame) -> list[str]:
    """Signals that are seldom a false alarm."""
    return [name for name in THRESHOLDS if part(rang[name]).value <= MOST_FALSE_ALARMS]


def _winners(counts: pd.Series) -> str:
    """In words those with the largest count."""
    return " and ".join(WORDS[name] for name in counts.index if counts[name] == counts.max())


def _first(found: pd.DataFrame) -> pd.DataFrame:
    """Whether a signal was the first of a failing run, alone or with others."""
    return found.eq(found.max(axis=1), axis=0)


def _lead(values: pd.Series) -> str:
    known = values.dropna()
    return f"{median(known)} steps" if len(known) else "none"


def _warns(name: str, lead: pd.Series) -> Claim:
    warned = part(lead.notna())
    says = f"{WORDS[name]} warns before the failure in most runs that fail"
    return Claim(says, warned.most, f"{warned}; median lead {_lead(lead)}")


def _silent(name: str, rang: pd.Series, where_learned: pd.Series) -> Claim:
    silent = part(~rang)
    says = f"{WORDS[name]} is silent in most runs that do not fail"
    return Claim(says, silent.most, f"{silent}; of those that learned {part(~where_learned)}")


def _update_first(found: pd.DataFrame) -> Claim:
    warned = found[found.notna().any(axis=1)]
    first = _first(warned)
    update = part(first["update"])
    others = ", ".join(f"{WORDS[name]} {first[name].sum()}" for name in THRESHOLDS if name != "update")
    says = "The update is the first to warn, alone or with others, in most failing runs that are warned at all"
    return Claim(says, update.most, f"{update}; the others are first in: {others}")


def _trust(runs: pd.DataFrame) -> list[Claim]:
    """What those do together that are seldom a false alarm."""
    names = trusty(quiet(runs))
    lead = leads(runs)[names].max(axis=1)
    late = lead[runs["failure_step"].loc[lead.index] > LATE]
    warned, warned_late, early = part(lead.notna()), part(late.notna()), part(lead.dropna() >= FEW_STEPS)
    together = ", ".join(WORDS[name] for name in names) or "none"
    return [
        Claim("Some trusty signal warns of most failures", warned.most, f"{warned}; {together}"),
        Claim(f"The same of failures after step {LATE}", warned_late.most, str(warned_late)),
        Claim(
            f"Where a trusty signal warns, the first is mostly {FEW_STEPS} steps or more before the failure",
            early.most,
            f"{early}; median lead {_lead(lead)}",
        ),
    ]


def _at_once(runs: pd.DataFrame) -> Claim:
    ended = runs[np.isfinite(runs["nan_step"])]
    after = ended["nan_step"] - ended["failure_step"]
    soon = part(after <= FEW_STEPS)
    return Claim(
        f"In most runs that come to it the loss is not finite {FEW_STEPS} steps after the failure or sooner",
        soon.most,
        f"{soon}; median {_lead(after)}",
    )


def _without_norm(runs: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    plain = frame.loc[frame["norm"] == "none", "model"].unique()
    return runs[runs.index.get_level_values("model").isin(plain)]


def _predicts(says: str, runs: pd.DataFrame) -> Claim:
    area = _ranking(runs)
    return Claim(
        says,
        None if area is None else True if area.low > 0.5 else False if area.high < 0.5 else None,
        "0 learning rates at which some fail and others do not"
        if area is None
        else f"the failing one of a pair of runs has the larger GSC in a part of {area:.2f}; chance is 0.5",
    )


def _ranking(runs: pd.DataFrame) -> Mean | None:
    """Area under the ROC curve over pairs at one learning rate and seed, averaged over seeds."""
    areas = []
    for _, own in runs.groupby(level="seed", observed=True):
        wins = []
        for _, group in own.groupby(level="lr", observed=True):
            bad = np.isfinite(group["failure_step"].to_numpy())
            start = group["log10_gsc_at_start"].to_numpy()
            wins.append((np.sign(start[bad][:, None] - start[~bad][None, :]).ravel() + 1) / 2)
        pairs = np.concatenate(wins)
        if len(pairs):
            areas.append(pairs.mean())
    if not areas:
        return None
    found = mean(areas)
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))  # Student's t knows no bounds
