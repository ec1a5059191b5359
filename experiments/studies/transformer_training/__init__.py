"""What moves while a small GPT learns, and which signal precedes a divergence?"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from experiments.archive.tables import Collected
from experiments.evidence.alarms import Alarms
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import listed, table
from experiments.studies.transformer_training import claims as decide
from experiments.studies.transformer_training import figures as drawing
from experiments.studies.transformer_training import signals
from experiments.studies.transformer_training.claims import EARLY, LARGE, MOST_FALSE_ALARMS, TOO_LARGE
from experiments.studies.transformer_training.signals import CELL, FAILURE, GUESSING, THRESHOLDS, WORDS
from gradscope.monitor.alarms import FEWEST, RECENT

__all__ = ["STUDY"]

# Seed of the resampling of cells.
SEED = 0


def claims(collected: Collected) -> list[Claim]:
    """What moves, what QK norm changes, and what each signal announces."""
    found, frame = alarms(collected), collected.frame
    return [*decide.of_signals(found), *decide.of_movement(frame), *decide.of_norm(frame, found.table)]


def answer(collected: Collected) -> str:
    """The signal that announces most failures, what the loss announces, and what QK norm does to the logits."""
    found, frame = alarms(collected), collected.frame
    most = str(found.leads.notna().sum().idxmax())
    warned, loss = found.leads[most], found.leads["loss_jump"]
    logit = {qk: decide.change(frame, "attention_logit", qk, LARGE) for qk in (False, True)}
    delay = decide.delay(found.table, TOO_LARGE[0], _num_steps(collected))
    return (
        f'The signal "{WORDS[most]}" announces {found.announced(warned)} that diverge, with a median lead of '
        f"{found.typical(warned)}, and is a false alarm in {found.false_alarms(most)} that do not. A jump of the loss "
        f"announces {found.announced(loss)}, with a median lead of {found.typical(loss)}. At peak step size {LARGE:g}, "
        f"log10 of the largest attention logit changes by {logit[False]:+} without QK norm and by {logit[True]:+} with "
        f"QK norm; at peak step size {TOO_LARGE[0]:g}, QK norm moves the failure by {delay} steps (negative: earlier)."
    )


def details(collected: Collected) -> str:
    """A table of all signals, and a table of what moves."""
    found, frame = alarms(collected), collected.frame
    failed = np.isfinite(found.table["failure_step"])
    rows = [
        [
            WORDS[name], found.announced(found.leads[name]), found.typical(found.leads[name]),
            (found.leads[name] >= EARLY).sum(), found.false_alarms(name), found.matched(name),
        ]
        for name in sorted(found.fired, key=lambda name: -found.leads[name].notna().sum())
    ]  # fmt: skip
    head = ["signal", "failures announced", "lead", f"at least {EARLY} steps before", "false alarms", "equally long"]
    rates = sorted(frame["lr"].unique())
    moved = [
        [decide.NAMES[name], "with" if qk else "without",
         *(decide.change(frame, name, qk, rate) for rate in rates if rate not in TOO_LARGE)]
        for name in decide.MOVES
        for qk in (False, True)
    ]  # fmt: skip
    changes = ["quantity", "QK norm", *(f"step size {rate:g}" for rate in rates if rate not in TOO_LARGE)]
    silent = [WORDS[name] for name in THRESHOLDS if name not in found.fired]
    return (
        f"Of {len(failed)} runs, {failed.sum()} diverge. Signals that never fired: {listed(silent)}. All intervals are "
        "95 % intervals; leads are medians. The last column is the rate of false alarms in equally long "
        "monitoring.\n\n"
        f"{table(head, rows)}\n\nChange in training by peak step size, as log10 of last / first step:\n\n"
        f"{table(changes, moved)}"
    )


def alarms(collected: Collected) -> Alarms:
    """When the signals fire, with resampled cells."""
    runs = signals.runs(collected.frame)
    return Alarms.resampled(runs, THRESHOLDS, CELL, generator=np.random.default_rng(SEED))


def figures(collected: Collected) -> dict[str, Figure]:
    """Figures of leads, false alarms, what moves, and the fraction of runs that fail."""
    return drawing.draw(alarms(collected), collected.frame)


def _num_steps(collected: Collected) -> int:
    return int(signals.moving(collected.frame, "loss").columns.max()) + 1


def _limits(name: str) -> str:
    return f"{THRESHOLDS[name][0]:g} without and {THRESHOLDS[name][1]:g} with QK norm"


STUDY = Study(
    question="What moves while a small GPT learns, and which signal precedes a divergence?",
    answer=answer,
    use="""
Monitor the norm of updates relative to the norm of the weights; it is known from the first steps on. Do not stop a run
because its attention logits are large; compare them with those of a run of the same network that learns.
""",
    method=f"""
`gs.models.GPT` with {{model.depth}} pre-norm blocks of width {{model.width}} learns to predict bytes of Python's
documentation (`data=text`), with AdamW in float32 and {{train.batch_size}} windows of {{data.length}} bytes per step.
Over {{train.max_steps}} steps, the step size rises linearly to a peak value (range test, L. N. Smith,
arXiv:1506.01186). Networks are trained with and without QK norm; with QK norm, queries and keys are normalized per head
(arXiv:2010.04245). The quantities of the monitor and the loss are recorded at every step, on {{monitor.batch_size}}
windows of the test text.

**Failure** (divergence) is the first step whose loss is non-finite or above 2 ln 256 = {FAILURE:.1f} nats. The loss of
guessing is ln 256 = {GUESSING:.2f} nats. **Controls** are the runs that do not fail. The value of a *jump* is a
quantity divided by its median over up to {RECENT} previous steps (at least {FEWEST}). The **signals** are quantities
with a threshold, and fire above this threshold:

- *loss jump*, of the training loss: {_limits("loss_jump")};
- *gradient jump*, of the norm of the gradient of all weights: {_limits("gradient_jump")};
- *attention logit*, the largest in all heads: {_limits("attention_logit")};
- *entropy*, the inverse of the smallest attention entropy of a head (divided by its maximum): {_limits("entropy")};
- *update*, the largest norm of an update divided by the norm of its weights: {_limits("update")};
- *weight growth*, the largest norm of weights divided by their norm at the first step: {_limits("weight_growth")};
- *GSC*, the larger of GSC (squared convention) from embedding to logits and its inverse: {_limits("gsc")}.

Two other seeds served to set the thresholds: each threshold is the largest value in their runs that did not fail,
rounded up. A signal **announces** a failure if it passes its threshold at an earlier step; the **lead** is the number
of steps from the signal to the failure. In a control, every signal is a **false alarm**. A failing run is monitored
only until it fails, so a signal has more steps to fire in a control. False alarms in **equally long** monitoring are
therefore the fraction of pairs of a control and a failing run in which the signal fires in the control before the
failing run fails.
""",
    how_sure=f"""
Runs with equal step size and QK norm (a cell) resemble each other. So the 95 % intervals of proportions and medians
resample whole cells. If the intervals for independent runs are wider, we use those intervals. With few cells, intervals
tend to be too narrow. Intervals of means are Student's t intervals over seeds. They are not simultaneous. Step sizes,
length of the runs, thresholds and claims were chosen with the seeds 100 to 102, which are not among the runs here. A
warning is early if it comes at least {EARLY} steps before the failure. A rate of false alarms is low if it is below
{100 * MOST_FALSE_ALARMS:g} %. The step size itself rises in every run and is larger in runs that fail. A signal that
follows the step size, such as the update, therefore separates failing runs from others, whatever happens in the
network. All networks are tiny and of one kind, and train for few steps. The length of the residual stream is not
recorded in training.
""",
    claims=claims,
    figures=figures,
    captions={
        "leads": "Steps from a signal to the failure, one dot per failure that the signal announces. Dots of equal "
        "values are "
        "shifted up or down. Below the dots, diamonds: medians, with 95 % intervals.",
        "warnings": "For each signal, percentage of the failing runs that it announces, and percentage of the other "
        "runs "
        "in which it is a false alarm. Error bars are 95 % intervals.",
        "moving": "Quantities that change in training, by peak step size. Solid: without QK norm. Dashed: with QK "
        "norm. Lines are "
        "medians over seeds. The gray line is the loss that counts as a failure.",
        "failures": "Percentage of runs that fail, by peak step size and QK norm.",
    },
    details=details,
    condensed=signals.condensed,
)
