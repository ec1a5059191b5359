"""Which signal warns first when training explodes?"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from experiments.archive.tables import Collected
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import table
from experiments.studies.exploding_symptoms import claims as decide
from experiments.studies.exploding_symptoms import figures as exploding_symptom_figures
from experiments.studies.exploding_symptoms import signals
from experiments.studies.exploding_symptoms.alarms import CELL, Alarms
from experiments.studies.exploding_symptoms.claims import LIMITS, MOST_FALSE_ALARMS
from experiments.studies.exploding_symptoms.signals import FAILURE, GUESSING, LEARNED, MEANINGS, THRESHOLDS, WORDS
from gradscope.monitor.alarms import FEWEST, RECENT

__all__ = ["STUDY"]

# Copies of values in the configuration; a test compares them.
DEPTH, WIDTH, NUM_STEPS, NUM_PROBES, NUM_IMAGES = 20, 50, 50, 2, 32
# Seed of the resampling of cells.
SEED = 0
SIGNALS = ";\n".join(f"- *{WORDS[name]}*: {meaning}" for name, meaning in MEANINGS.items()) + "."


def claims(collected: Collected) -> list[Claim]:
    """Warnings and false alarms of each signal, which signal is first, and what GSC at step 0 predicts."""
    alarms, frame = _alarms(collected), collected.frame
    networks, plain = (list(part["model"].unique()) for part in (frame, frame[frame["norm"] == "none"]))
    fail, others = "networks that fail have larger", "than networks that do not fail"
    return [
        *(claim(alarms, name) for claim in (decide.warns, decide.silent, decide.tells) for name in alarms.fired),
        *([decide.update_first(alarms)] if "update" in alarms.fired else []),
        *decide.reliable(alarms),
        decide.at_once(alarms),
        decide.predicts(f"At equal learning rates, {fail} GSC at step 0 {others}", alarms, networks),
        decide.predicts(f"Exploratory: without normalization, {fail} initial GSC {others}", alarms, plain),
        decide.largest(alarms),
    ]


def answer(collected: Collected) -> str:
    """The signal that announces most failures, the false alarms of this signal, and what reliable signals announce."""
    alarms = _alarms(collected)
    if not len(alarms.leads):
        return f"None of {len(alarms.table)} runs fails."
    if not alarms.fired:
        return f"{len(alarms.leads)} of {len(alarms.table)} runs fail, and no signal fires before the failures."
    most = str(alarms.leads.notna().sum().idxmax())
    warned, sure = alarms.leads[most], decide.warned_by(alarms, MOST_FALSE_ALARMS)[0]
    return (
        f'The signal "{WORDS[most]}" announces the failure of {alarms.announced(warned)}, with a median lead of '
        f"{alarms.typical(warned)}; it fires when {MEANINGS[most]}. It also fires in {alarms.false_alarms(most)} that "
        "do not fail (false alarms). Reliable signals "
        f"({decide.named(alarms.reliable(MOST_FALSE_ALARMS), True)}) announce the failure of {alarms.announced(sure)}, "
        f"with a median lead of {alarms.typical(sure)}; a signal is reliable if its rate of false alarms is shown to "
        f"be below {100 * MOST_FALSE_ALARMS:g} %."
    )


def details(collected: Collected) -> str:
    """Numbers of failures, the signal that is first, the largest GSC, and tables of all signals."""
    alarms = _alarms(collected)
    found, ended = alarms.leads, alarms.table[np.isfinite(alarms.table["nan_step"])]
    if not len(found):
        return "There is nothing to compare."
    cells = alarms.table.groupby(level=CELL, observed=True)["failure_step"].min()
    after = f"{alarms.median(ended['nan_step'] - ended['failure_step']):steps}" if len(ended) else ""
    soon = f", in the median {after} after the failure" if after else ""
    parts = [
        f"Of {len(alarms.table)} runs, {len(found)} fail, in {np.isfinite(cells).sum()} of {len(cells)} combinations "
        f"of network and learning rate. The loss becomes non-finite in {len(ended)} of the failing runs{soon}."
    ]
    if alarms.fired:
        first = decide.firsts(found).sum()
        names = decide.names_in_words(first.index[first == first.max()])
        parts.append(f"The signal that is most often first is {names}, in {first.max()} of the failing runs.")
    if silent := [name for name in THRESHOLDS if name not in alarms.fired]:
        parts.append(
            f"Signals that fired in no run, and so have no claim: {decide.names_in_words(silent)}. "
            "At step 0, the largest GSC from any layer to the logits in any run is "
            f"10^{alarms.table['log10_gsc_at_start'].max():.1f}."
        )
    if alarms.reliable(MOST_FALSE_ALARMS).get("loss_jump"):
        parts.append('The signal "loss jump" tests the same number as the failure: the loss.')
    return "\n\n".join([" ".join(parts), _signals(alarms), _sensitivity(alarms)])


def _alarms(collected: Collected) -> Alarms:
    return Alarms.of(collected.frame, generator=np.random.default_rng(SEED))


def _signals(alarms: Alarms) -> str:
    """A table of all signals that fired."""
    found, to_nan, first = alarms.leads, signals.leads(alarms.table, "nan_step"), decide.firsts(alarms.leads)
    head = [
        "signal",
        "failures announced",
        "failures in which it is first, alone or with others",
        "median lead to failure",
        "median lead to NaN",
        "false alarms",
    ]
    head.append("false alarms in equally long parts of controls (fraction of pairs)")
    rows = []
    for name in sorted(alarms.fired, key=lambda name: -found[name].notna().sum()):
        leads = [alarms.typical(steps[name]) for steps in (found, to_nan)]
        false = alarms.false_alarms(name), str(alarms.matched(name))
        rows.append([WORDS[name], alarms.announced(found[name]), first[name].sum(), *leads, *false])
    return table(head, rows)


def _sensitivity(alarms: Alarms) -> str:
    """A table of what reliable signals announce, one row per accepted rate of false alarms."""
    rows = []
    for limit in LIMITS:
        verdicts, warned = alarms.reliable(limit), decide.warned_by(alarms, limit)
        names = [decide.named(verdicts, verdict) for verdict in (True, None)]
        rows.append([f"{100 * limit:g} %", *names, *map(alarms.announced, warned)])
    head = ["accepted rate of false alarms", "reliable signals", "undecided signals"]
    head += [f"failures announced by reliable {words}signals" for words in ("", "or undecided ")]
    about = "Which signals are reliable depends on the accepted rate of false alarms:"
    return f"{about}\n\n{table(head, rows)}"


def figures(collected: Collected) -> dict[str, Figure]:
    """Figures of warnings and false alarms, of leads, of one run, and of the fraction of runs that fail."""
    return exploding_symptom_figures.draw(_alarms(collected), collected.frame)


STUDY = Study(
    question="Which signal warns first when training explodes, and how long before?",
    answer=answer,
    use="""
Stop a run automatically only on a loss jump, which comes just before the failure. If an update is large, look at the
run, but do not stop the run automatically. Do not rely on GSC at initialization to predict failures.
""",
    method=f"""
Fully connected networks without skip connections (depth {DEPTH}, width {WIDTH}) learn to classify images of digits.
They are trained by SGD with momentum in float32. There are {{num_seeds}} seeds for each pair of network and peak
learning rate. The learning rate rises linearly to its peak over the {NUM_STEPS} steps of a run (range test,
L. N. Smith, arXiv:1506.01186). So a run may learn at first and fail later. Gradients of relu+batch, tanh+layer and selu
explode at initialization; the other networks are relu and tanh. GSC is estimated from {NUM_PROBES} random vectors
([probes](../glossary.md)), the same at every step, on {NUM_IMAGES} test images.

A run **fails** at the first step whose loss is non-finite or above {FAILURE / GUESSING:g} ln 10. Guessing among the 10
classes gives the loss ln 10. **Controls** are the runs that do not fail. A control has **learned** if its last loss is
below {LEARNED / GUESSING:g} ln 10.

Thresholds of **signals** are those of `gs.Monitor` or were fixed before the runs. The *recent median* of a quantity is
its median over the previous {RECENT} steps, or over all previous steps if there are {FEWEST} to {RECENT - 1} of them.
With fewer previous steps, no jump can fire. Each signal fires under one condition:

{SIGNALS}

A signal **announces** a failure if it fires before the step of the failure. The **lead** is the number of steps from
the first time that the signal fires to the failure. The **lead to NaN** ends at the first non-finite loss instead. A
signal that fires in a control is a **false alarm**. A failing run is monitored only until it fails, so a signal has
more steps to fire in a control. We therefore also report false alarms in **equally long** parts of controls. For this,
we form all pairs of a control and a failing run. We report the fraction of pairs in which the signal fires in the
control before the step at which the failing run fails.

The rate of false alarms is the fraction of controls in which the signal fires. A signal is **reliable** if the whole
95 % interval of this rate is below {100 * MOST_FALSE_ALARMS:g} %, unreliable if the whole interval is above, and
undecided otherwise. A claim about reliable signals is decided only if its verdict is the same with and without the
undecided signals. In claims, "most" means more than 50 %.
""",
    how_sure=f"""
Runs of one network at one learning rate (a cell) resemble each other, so the 95 % intervals resample whole cells
(bootstrap). Intervals of numbers of runs are widened to contain Wilson's interval for independent runs. Intervals of
medians are widened to contain the interval from order statistics for independent runs. With few cells, intervals tend
to be too narrow. The intervals cover only these networks and learning rates.

We do not know which signal would be first if all signals had the same rate of false alarms. Failures after the last
step of a run are not seen. A run that fails within {FEWEST} steps cannot show a jump, because a recent median needs
{FEWEST} steps. Which signals are reliable was not tested again on new runs. The networks with the largest GSC at step 0
have normalization, which also limits the effect of a large update. So the data cannot show whether GSC or normalization
decides which networks fail.
""",
    claims=claims,
    figures=figures,
    captions={
        "warnings": "For each signal, percentage of the failing runs that it announces, and percentage of the runs "
        "without failure in which it is a false alarm. Error bars are 95 % intervals.",
        "leads": "Steps from a signal to the failure (left) and to a non-finite loss (right), one dot per run. Dots "
        "with equal values are shifted vertically. The diamond below the dots is their median, and the bar is its 95 % "
        "interval. There is no bar for fewer than six dots.",
        "one_run": "Loss and signals of one run, each divided by its threshold. A signal fires when its curve is above "
        "1. The run fails when the curve of the loss is above 1.",
        "failures": "Percentage of runs that fail, by network and peak learning rate. Networks are sorted by the "
        "largest GSC from any layer to the logits at step 0.",
    },
    details=details,
    condensed=signals.condensed,
)
