"""Which signal warns first when training explodes?"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from experiments.archive.tables import Collected
from experiments.evidence.study import Claim, Study
from experiments.studies.exploding_symptoms import claims as exploding_symptom_claims
from experiments.studies.exploding_symptoms import figures as exploding_symptom_figures
from experiments.studies.exploding_symptoms import signals
from experiments.studies.exploding_symptoms.alarms import CELL, Watched
from experiments.studies.exploding_symptoms.claims import (
    LIMITS,
    MOST_FALSE_ALARMS,
    firsts,
    lead_in_words,
    named,
    warned_by,
)
from experiments.studies.exploding_symptoms.signals import (
    FAILURE,
    GUESSING,
    LEARNED,
    THRESHOLDS,
    WORDS,
    condensed,
    leads,
    quiet,
)
from gradscope.monitor.alarms import EXTREME_LOG10, FEWEST, LOSS_JUMP, RECENT, WEIGHT_GROWTH

__all__ = ["condensed"]

# Of the configuration; the tests hold them against it.
DEPTH, WIDTH, NUM_STEPS, NUM_PROBES, NUM_IMAGES = 20, 50, 50, 2, 32
# Of the resampling of cells.
SEED = 0

QUESTION = "Which signal warns first when training explodes, and how long before?"
METHOD = f"""
Plain networks of depth {DEPTH} and width {WIDTH} learn digits by SGD with momentum in float32, {NUM_STEPS} steps in
which the learning rate rises in a straight line to its peak, as in a range test (L. N. Smith, arXiv:1506.01186):
training goes well until it does not. Three networks explode at initialization (relu_batch, tanh_layer, selu), two do
not (relu, tanh); peaks go from sane to far too large. Everything is recorded at every step before the update; GSC from
{NUM_PROBES} random vectors, the same at every step, on {NUM_IMAGES} test images.

**Failure** is the first step whose loss is not finite or above {FAILURE / GUESSING:g} ln 10,
{FAILURE / GUESSING:g} times that of guessing among ten classes. The runs that do not fail are the controls; those among
them have **learned** whose last loss is below {LEARNED / GUESSING:g} of that of guessing. **Signals** have thresholds
that were fixed before these runs, where the monitor has one, its own; a *jump* is over the median of up to {RECENT}
steps before, of which there must be {FEWEST}:

- *loss jump*: the loss above {LOSS_JUMP:g} times that median;
- *gradient jump*: the length of the whole gradient above {signals.GRADIENT_JUMP:g} times it;
- *update*: a layer's update longer than {signals.LARGE_UPDATE:g} of its weights;
- *weight growth*: a layer's weights {WEIGHT_GROWTH:g} times as long as at the beginning;
- *GSC*: the coefficient of some layer to the logits (squared convention, arXiv:1712.05577) above
  10^{EXTREME_LOG10:g};
- *GSC jump*: the largest coefficient of all layers above {signals.GSC_JUMP:g} times its median.

The loss jump and the failure are two thresholds of one number: from a median near that of guessing the jump is at
{LOSS_JUMP * GUESSING / FAILURE:g} of the loss that counts as failure. It sees the failure begin, and is no independent
sign of it.

A failing run is **warned** by a signal that passes its threshold at a step before the failure; the **lead** is the
number of steps between; that to a loss that is not finite (NaN) is of the runs that come to it. In a control the same
signal is a **false alarm**. A control is watched to its last step and a failing run to its failure; so false alarms are
also given **watched as long**: the part of all pairs of a control and a failing run in which the control rings before
the step at which the other fails.

A signal is called **trusty** if the whole interval of its false alarms lies below {100 * MOST_FALSE_ALARMS:g} % of the
controls, not trusty if the whole interval lies above, and undecided else. Of a signal that never rang, neither in a
control nor before a failure, nothing is claimed.
"""
HOW_SURE = f"""
Seeds of one network at one learning rate are alike, and failures come from few such cells. Intervals, 95 %, are
therefore over cells drawn anew with all their seeds, widened to those of independent runs (Wilson
for parts, order statistics for medians) where these are wider; few cells still make them narrow rather than wide, and
the networks and learning rates are these. Which signal is first depends on the thresholds, whose false alarms differ;
the frame holds the step at which each was passed and not the signals, so it cannot tell the order at equal false
alarms. Failures later than the last step count as none. Where a run fails within {FEWEST} steps no jump can be seen,
for there is nothing to jump from. Claims that begin with "exploratory" were made after a first look at the runs, and
trusty signals were found in the runs that they are judged by. Other networks, other thresholds, and learning rates that
rise more slowly, would give other leads. The networks with the largest GSC at step 0 are those with normalization,
which also bounds what a long update does to the output; the ranking cannot tell the two apart. A signal that
was never heard was not tested: a threshold of 10^{EXTREME_LOG10:g} for GSC would need networks deeper than {DEPTH}.
"""


def figures(collected: Collected) -> dict[str, Figure]:
    """How many were warned, how long before, one run, and who failed."""
    return exploding_symptom_figures.draw(_watched(collected), collected.frame)


def claims(collected: Collected) -> list[Claim]:
    """Warnings and false alarms of each signal, which comes first, and what GSC at the beginning predicts."""
    watched, frame = _watched(collected), collected.frame
    networks, plain = (list(part["model"].unique()) for part in (frame, frame[frame["norm"] == "none"]))
    larger = "At a given learning rate the networks with larger GSC at step 0 are those that fail"
    return [
        *(
            claim(watched, name)
            for claim in (
                exploding_symptom_claims.warns,
                exploding_symptom_claims.silent,
                exploding_symptom_claims.tells,
            )
            for name in watched.heard
        ),
        *([exploding_symptom_claims.update_first(watched)] if "update" in watched.heard else []),
        *exploding_symptom_claims.trust(watched),
        exploding_symptom_claims.at_once(watched),
        exploding_symptom_claims.predicts(larger, watched, networks),
        exploding_symptom_claims.predicts("Exploratory: the same among networks without normalization", watched, plain),
        exploding_symptom_claims.largest(watched),
    ]


def answer(collected: Collected) -> str:
    """The first signals, what they cost, and a table of all."""
    watched = _watched(collected)
    if not len(watched.leads):
        return f"None of {len(watched.table)} runs fails."
    return "\n\n".join([_in_words(watched), _signals(watched), _sensitivity(watched)])


def _watched(collected: Collected) -> Watched:
    return Watched.of(collected.frame, generator=np.random.default_rng(SEED))


def _in_words(watched: Watched) -> str:
    found, ended = watched.leads, watched.table[np.isfinite(watched.table["nan_step"])]
    cells = watched.table.groupby(level=CELL, observed=True)["failure_step"].min()
    soon = f", {watched.median(ended['nan_step'] - ended['failure_step'])} steps later" if len(ended) else ""
    text = [
        f"Of {len(watched.table)} runs {len(found)} fail, in {np.isfinite(cells).sum()} of {len(cells)} cells of "
        f"network and learning rate; {len(ended)} of them come to a loss that is not finite{soon}."
    ]
    if watched.heard:
        most, first = str(found.notna().sum().idxmax()), firsts(found).sum()
        warned, alarms = watched.part(found[most].notna()), watched.false_alarms(most)
        earliest = exploding_symptom_claims.names_in_words(list(first.index[first == first.max()]))
        text.append(
            f"Most failures are announced by {WORDS[most]}: {exploding_symptom_claims.in_percent(warned)} are warned, "
            f"{lead_in_words(watched, found[most])} before. But it is a false alarm in "
            f"{exploding_symptom_claims.in_percent(alarms)} of those that do not fail, and in "
            f"{100 * watched.matched(most).value:.0f} % of these where they are watched as long as a run that fails. "
            f"First of all signals is most often {earliest}, in {first.max()} runs, at thresholds that cost unequal "
            "false alarms."
        )
    verdicts = {name: exploding_symptom_claims.tells(watched, name).holds for name in watched.heard}
    text.append(
        f"Signals that ring more often before a failure than in a control watched as long: {named(verdicts, True)}; "
        f"this is not decided of: {named(verdicts, None)}."
    )
    text.append(_trust_in_words(watched))
    if unheard := [name for name in THRESHOLDS if name not in watched.heard]:
        start = watched.table["log10_gsc_at_start"].max()
        text.append(
            f"Never heard, so not tested here: {exploding_symptom_claims.names_in_words(unheard)} (the largest "
            f"coefficient at step 0 is 10^{start:.1f})."
        )
    text.append(f"{exploding_symptom_claims.largest(watched).because}. Steps are medians; all intervals are of 95 %.")
    return "\n\n".join(text)


def _trust_in_words(watched: Watched) -> str:
    verdicts, (sure, perhaps) = watched.trusty(MOST_FALSE_ALARMS), warned_by(watched, MOST_FALSE_ALARMS)
    text = (
        f"Trusty, with false alarms surely in less than {100 * MOST_FALSE_ALARMS:g} % of the controls: "
        f"{named(verdicts, True)}; undecided: {named(verdicts, None)}. The trusty ones warn of "
        f"{watched.part(sure.notna())} that fail (lead: {lead_in_words(watched, sure)}), together with the undecided "
        f"ones of {watched.part(perhaps.notna())}."
    )
    return text + (" The loss jump is the failure itself at a lower threshold." if verdicts.get("loss_jump") else "")


def _signals(watched: Watched) -> str:
    """Table of all signals that were heard."""
    heads = ["failing runs warned", "first", "lead to failure", "lead to NaN", "false alarms", "watched as long",
             "where it learned"]  # fmt: skip
    lines = [f"| signal | {' | '.join(heads)} |", "|" + (len(heads) + 1) * "---|"]
    found, to_nan, first = watched.leads, leads(watched.table, "nan_step"), firsts(watched.leads)
    learned = quiet(watched.table, learned=True)
    for name in sorted(watched.heard, key=lambda name: -found[name].notna().sum()):
        cells = [
            WORDS[name], str(watched.part(found[name].notna())), str(first[name].sum()),
            lead_in_words(watched, found[name]), lead_in_words(watched, to_nan[name]), str(watched.false_alarms(name)),
            f"{watched.matched(name):.2f}", str(watched.part(learned[name])),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _sensitivity(watched: Watched) -> str:
    """Table of what trusty signals warn of, by the false alarms that are granted."""
    heads = ["false alarms granted", "trusty", "undecided", "failing runs warned", "with the undecided"]
    lines = [f"| {' | '.join(heads)} |", "|" + len(heads) * "---|"]
    for limit in LIMITS:
        verdicts, warned = watched.trusty(limit), warned_by(watched, limit)
        parts = [str(watched.part(lead.notna())) for lead in warned]
        lines.append(f"| {' | '.join([f'{100 * limit:g} %', named(verdicts, True), named(verdicts, None), *parts])} |")
    return "\n".join(lines)


STUDY = Study(
    question=QUESTION,
    method=METHOD,
    how_sure=HOW_SURE,
    claims=claims,
    answer=answer,
    figures=figures,
    condensed=condensed,
)
