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
from experiments.studies.exploding_symptoms.signals import FAILURE, GUESSING, LEARNED, THRESHOLDS, WORDS
from gradscope.monitor.alarms import EXTREME_LOG10, FEWEST, LOSS_JUMP, RECENT, WEIGHT_GROWTH

__all__ = ["STUDY"]

# Copies of values in the configuration; a test compares them.
DEPTH, WIDTH, NUM_STEPS, NUM_PROBES, NUM_IMAGES = 20, 50, 50, 2, 32
# Seed of the resampling of cells.
SEED = 0


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
        f"{alarms.typical(warned)}, but it is a false alarm in {alarms.false_alarms(most)} that do not fail. Signals "
        f"that are shown to have less than {100 * MOST_FALSE_ALARMS:g} % false alarms "
        f"({decide.named(alarms.reliable(MOST_FALSE_ALARMS), True)}) announce the failure of "
        f"{alarms.announced(sure)}, with a median lead of {alarms.typical(sure)}. Signals are defined under "
        '"How it was found".'
    )


def details(collected: Collected) -> str:
    """Numbers of failures, the signal that is first, the largest GSC, and tables of all signals."""
    alarms = _alarms(collected)
    found, ended = alarms.leads, alarms.table[np.isfinite(alarms.table["nan_step"])]
    if not len(found):
        return "There is nothing to compare."
    cells = alarms.table.groupby(level=CELL, observed=True)["failure_step"].min()
    soon = f", {alarms.median(ended['nan_step'] - ended['failure_step']):steps} after the failure" if len(ended) else ""
    parts = [
        f"Of {len(alarms.table)} runs, {len(found)} fail, in {np.isfinite(cells).sum()} of {len(cells)} combinations "
        f"of network and learning rate. The loss becomes non-finite in {len(ended)} of these runs{soon}."
    ]
    if alarms.fired:
        first = decide.firsts(found).sum()
        names = decide.names_in_words(first.index[first == first.max()])
        parts.append(
            f"The signal that is most often first is: {names}, in {first.max()} runs. The thresholds of the signals "
            "have different rates of false alarms."
        )
    if silent := [name for name in THRESHOLDS if name not in alarms.fired]:
        parts.append(
            f"Signals that never fired, and so are not judged: {decide.names_in_words(silent)}. The largest GSC at "
            f"step 0 is 10^{alarms.table['log10_gsc_at_start'].max():.1f}."
        )
    if alarms.reliable(MOST_FALSE_ALARMS).get("loss_jump"):
        parts.append("The loss jump tests the same number as the failure, with a lower threshold.")
    parts.append(
        f"{decide.largest(alarms).because}. Leads are medians in steps; all intervals are 95 % intervals. The column "
        '"first" counts the runs in which the signal is first, alone or with others. The column "equally long" is the '
        "rate of false alarms in equally long monitoring."
    )
    return "\n\n".join([" ".join(parts), _signals(alarms), _sensitivity(alarms)])


def _alarms(collected: Collected) -> Alarms:
    return Alarms.of(collected.frame, generator=np.random.default_rng(SEED))


def _signals(alarms: Alarms) -> str:
    """A table of all signals that fired."""
    found, to_nan, first = alarms.leads, signals.leads(alarms.table, "nan_step"), decide.firsts(alarms.leads)
    head = ["signal", "failures announced", "first", "lead to failure", "lead to NaN", "false alarms", "equally long"]
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
    head = ["accepted false alarms", "reliable", "undecided", "failures announced", "with the undecided signals"]
    return table(head, rows)


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
Plain networks of depth {DEPTH} and width {WIDTH} learn digits by SGD with momentum in float32. Over {NUM_STEPS} steps,
the learning rate rises linearly to a peak value (range test, L. N. Smith, arXiv:1506.01186), so a run may learn at
first and fail later. Gradients of three of the five networks (relu_batch, tanh_layer, selu) explode at initialization.
GSC is estimated from {NUM_PROBES} random vectors, the same at every step, on {NUM_IMAGES} test images.

**Failure** is the first step whose loss is non-finite or above {FAILURE / GUESSING:g} ln 10. (The loss of guessing is
ln 10.) **Controls** are the runs that do not fail. A control has **learned** if its last loss is
below {LEARNED / GUESSING:g} times the loss of guessing. Thresholds of **signals** are taken from the monitor or were
fixed before the runs. A *jump* compares a value with its median over up to {RECENT} previous steps (at least {FEWEST}):

- *loss jump*: the loss is above {LOSS_JUMP:g} times its median;
- *gradient jump*: the norm of the gradient of all weights is above {signals.GRADIENT_JUMP:g} times its median;
- *update*: the norm of the update of a layer is above {signals.LARGE_UPDATE:g} times the norm of its weights;
- *weight growth*: the norm of the weights of a layer is {WEIGHT_GROWTH:g} times as large as at the beginning;
- *GSC*: GSC from some layer to the logits (squared convention, arXiv:1712.05577) is above 10^{EXTREME_LOG10:g};
- *GSC jump*: the largest GSC of all layers is above {signals.GSC_JUMP:g} times its median.

Loss jump and failure are two thresholds of the same loss. If the median is near the loss of guessing, the threshold of
a loss jump is {LOSS_JUMP * GUESSING / FAILURE:g} times the threshold of a failure.

A signal **announces** a failure if it passes its threshold at an earlier step. The **lead** is the number of steps from
the signal to the failure, or to a non-finite loss (NaN). In a control, every signal is a **false alarm**. A failing run
is monitored only until it fails, so a signal has more steps to fire in a control. We therefore also report false alarms
for **equally long** monitoring. For this, we form all pairs of a control and a failing run, and report the fraction of
pairs in which the signal fires in the control before the failing run fails. A signal is **reliable** if the interval of
its rate of false alarms is below {100 * MOST_FALSE_ALARMS:g} %, unreliable if it is above, and undecided otherwise. A
claim about reliable signals is decided only if its verdict is the same with and without the undecided signals.
""",
    how_sure=f"""
Runs of one network at one learning rate (a cell) resemble each other. Therefore the 95 % intervals resample whole
cells. If the intervals for independent runs are wider (Wilson for proportions, order statistics for medians), we use
those intervals. With few cells, intervals tend to be too narrow. The intervals cover only these networks and learning
rates. We do not know which signal would be first if all signals had the same rate of false alarms. Failures after the
last step are not counted. A run that fails within {FEWEST} steps cannot show a jump. "Exploratory" claims were made
after a first look at the runs. The same runs decide which signals are reliable, and which failures these signals
announce. The networks with the largest GSC at step 0 have normalization, which also limits the effect of a large
update. The data cannot separate the effects of GSC and normalization. To reach GSC above 10^{EXTREME_LOG10:g}, networks
would have to be deeper.
""",
    claims=claims,
    figures=figures,
    captions={
        "warnings": "For each signal, percentage of the failing runs that it announces, and percentage of the other "
        "runs "
        "in which it is a false alarm. "
        "Error bars are 95 % intervals.",
        "leads": "Steps from a warning to the failure (left) and to a non-finite loss (right), one dot per run. "
        "Dots of equal values are shifted up or down. "
        "Below the dots, diamonds: medians, with 95 % intervals; no bar: too few runs for an interval.",
        "one_run": "Loss and signals of one run, each divided by its threshold. A signal fires if it is above 1.",
        "failures": "Percentage of runs that fail, by network and peak learning rate. Networks are sorted by GSC at "
        "step 0.",
    },
    details=details,
    condensed=signals.condensed,
)
