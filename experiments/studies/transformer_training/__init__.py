"""What changes while a small GPT learns, and which signal precedes a divergence?"""

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
from experiments.studies.transformer_training.claims import EARLY, LARGE, TOO_LARGE
from experiments.studies.transformer_training.signals import CELL, FAILURE, THRESHOLDS, WORDS
from gradscope.monitor.alarms import FEWEST, RECENT

__all__ = ["STUDY"]

# Seed of the resampling of cells.
SEED = 0


def claims(collected: Collected) -> list[Claim]:
    """Claims about the signals, about what changes while a GPT learns, and about QK norm."""
    found, frame = alarms(collected), collected.frame
    return [*decide.of_signals(found), *decide.of_movement(frame), *decide.of_norm(frame, found.table)]


def answer(collected: Collected) -> str:
    """The signal that announces most failures, what the loss announces, and what QK norm changes."""
    found, frame = alarms(collected), collected.frame
    most = str(found.leads.notna().sum().idxmax())
    warned, loss = found.leads[most], found.leads["loss_jump"]
    logit = {qk: decide.change(frame, "attention_logit", qk, LARGE) for qk in (False, True)}
    delay = decide.delay(found.table, TOO_LARGE[0], _num_steps(collected))
    return (
        f'The signal "{WORDS[most]}" announces the divergence of {found.announced(warned)}, with a median lead '
        f"(steps from signal to divergence) of {found.typical(warned)}; it also fires in {found.false_alarms(most)} "
        f"that do not diverge. A jump of the loss announces the divergence of {found.announced(loss)}, with a "
        f"median lead of {found.typical(loss)}. During training at peak step size {LARGE:g}, log10 of the largest "
        f"attention logit changes by {logit[False]:+} without QK norm and by {logit[True]:+} with QK norm; at peak "
        f"step size {TOO_LARGE[0]:g}, QK norm changes the step of divergence by {delay}."
    )


def details(collected: Collected) -> str:
    """A table of all signals, and a table of quantities that change in training."""
    found, frame = alarms(collected), collected.frame
    failed = np.isfinite(found.table["failure_step"])
    rows = [
        [
            WORDS[name], found.announced(found.leads[name]), found.typical(found.leads[name]),
            (found.leads[name] >= EARLY).sum(), found.false_alarms(name), found.matched(name),
        ]
        for name in sorted(found.fired, key=lambda name: -found.leads[name].notna().sum())
    ]  # fmt: skip
    early = f"failures announced at least {EARLY} steps in advance"
    head = ["signal", "failures announced", "median lead", early, "false alarms", "false alarms, equally long"]
    rates = sorted(frame["lr"].unique())
    moved = [
        [decide.NAMES[name], "with" if qk else "without",
         *(decide.change(frame, name, qk, rate) for rate in rates if rate not in TOO_LARGE)]
        for name in decide.MOVES
        for qk in (False, True)
    ]  # fmt: skip
    changes = ["quantity", "QK norm", *(f"peak step size {rate:g}" for rate in rates if rate not in TOO_LARGE)]
    silent = [WORDS[name] for name in THRESHOLDS if name not in found.fired]
    never = f" Signals that never fired: {listed(silent)}." if silent else ""
    return (
        f'Of {len(failed)} runs, {failed.sum()} fail.{never} For "false alarms, equally long", every control '
        "(run that does not fail) is paired with every failing run. The column gives the fraction of pairs whose "
        f"control has a false alarm before the step at which the failing run fails.\n\n{table(head, rows)}\n\n"
        "The next table gives the change of each quantity from the first to the last step, by peak step size. The "
        f"change is log10 of (last / first value):\n\n{table(changes, moved)}"
    )


def alarms(collected: Collected) -> Alarms:
    """When the signals fire, with resampled cells."""
    runs = signals.runs(collected.frame)
    return Alarms.resampled(runs, THRESHOLDS, CELL, generator=np.random.default_rng(SEED))


def figures(collected: Collected) -> dict[str, Figure]:
    """Figures of leads, false alarms, changes in training, and the fraction of runs that fail."""
    return drawing.draw(alarms(collected), collected.frame)


def _num_steps(collected: Collected) -> int:
    return int(signals.moving(collected.frame, "loss").columns.max()) + 1


def _limits(name: str) -> str:
    return f"threshold {THRESHOLDS[name][0]:g} without QK norm, {THRESHOLDS[name][1]:g} with QK norm"


STUDY = Study(
    question="What changes while a small GPT learns, and which signal precedes a divergence?",
    answer=answer,
    use="""
Monitor the norm of updates divided by the norm of the weights (the signal "update"). This ratio can be monitored from
the first step on. A large attention logit alone is no reason to stop a run. Compare it with the attention logits in
a run in which the same network learns.
""",
    method=f"""
`gs.models.GPT` with {{model.depth}} pre-norm blocks of width {{model.width}} learns to predict bytes of Python's
documentation (`data=text`). Each step of AdamW in float32 uses {{train.batch_size}} windows of {{data.length}} bytes.
The step size (learning rate) rises linearly over the {{train.max_steps}} steps of a run, up to a peak (range test,
L. N. Smith, arXiv:1506.01186). Each run has one of the peaks {{optimizer.lr}}. Networks are trained without and with
QK norm, which normalizes queries and keys per head (arXiv:2010.04245). At every step, the loss, gradients and weights
are recorded. GSC and attention are measured at every step on {{monitor.batch_size}} windows of the test text.

**Failure** (divergence) is the first step whose loss is non-finite or above {FAILURE:.1f} nats. This limit is twice the
loss of guessing all 256 bytes with equal probability. **Controls** are the runs that do not fail.

A **signal** is a quantity with a threshold. The signal **fires** at the first step at which the quantity exceeds the
threshold. A **jump** of a quantity is its value divided by its median over the previous {RECENT} steps, or over all
previous steps if there are fewer (at least {FEWEST}). The signals and their thresholds are:

- *loss jump*, the jump of the training loss: {_limits("loss_jump")};
- *gradient jump*, the jump of the norm of the gradient of all weights: {_limits("gradient_jump")};
- *attention logit*, the largest attention logit of all heads: {_limits("attention_logit")};
- *entropy*, 1 / e, where e is the smallest relative attention entropy of a head (entropy / ln n, for n keys):
  {_limits("entropy")};
- *update*, the norm of the update of a layer's weights, divided by the norm of these weights (largest value of all
  layers): {_limits("update")};
- *weight growth*, the norm of a layer's weights, divided by this norm at the first step (largest value of all layers):
  {_limits("weight_growth")};
- *GSC*, the larger of g and 1 / g, where g is GSC (squared convention) from embedding to logits: {_limits("gsc")}.

The thresholds were set with other runs (seeds 100 and 101). Each threshold is the largest value of the quantity in the
controls among these runs, rounded up.

- A signal **announces** a failure if it fires at an earlier step than the failure. The **lead** is the step of
  the failure minus the step at which the signal fires.
- A signal that fires in a control is a **false alarm**.
- A failing run ends with the failure, so a signal has more steps to fire in a control. Therefore we also pair every
  control with every failing run. The rate of false alarms in **equally long** monitoring is the fraction of pairs in
  which the signal fires in the control before the step at which the failing run fails.

**QK norm.** Each run with QK norm is compared with the run without QK norm of the same seed and peak step size. In this
comparison, a run that does not fail counts as failing after the last step.
""",
    how_sure="""
Runs that agree in peak step size and in the use of QK norm form a cell. Runs of a cell resemble each other. So the 95 %
intervals of proportions and medians are bootstrap intervals that resample whole cells. Each of these intervals is
widened until it contains the interval that treats the runs as independent. With few cells, such as here, bootstrap
intervals tend to be too narrow. Intervals of means are Student's t intervals over seeds, not corrected for multiple
comparisons.

The step size rises in every run, and runs with a larger peak fail more often. A signal that follows the step size, such
as the update, therefore separates failing runs from others, whatever happens in the network. Step sizes, length of the
runs, thresholds and claims were chosen with other seeds (100 to 102) than those of the runs here. All networks are tiny
and of one kind, and train for few steps.
""",
    claims=claims,
    figures=figures,
    captions={
        "leads": "Steps from a signal to the failure, one dot per failure that the signal announces. Diamonds below "
        "the dots are medians with 95 % intervals. A diamond without a bar has too few runs for an interval.",
        "warnings": "Percentages for each signal: failures that it announces, controls (runs that do not fail) with a "
        "false alarm, and false alarms in equally long monitoring. Error bars are 95 % intervals.",
        "moving": "Quantities that change in training. One color for each peak step size. The first and third row: "
        "without QK norm; the others: with QK norm. Lines are medians over seeds. Bands reach from the lowest seed "
        "to the highest. The gray line is the loss above which a run fails.",
        "failures": "Percentage of runs that fail, by peak step size and QK norm.",
    },
    details=details,
    condensed=signals.condensed,
)
