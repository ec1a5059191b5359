"""The table that closes a sweep: what failed, with the last line of its error, and how to go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from experiments.guard import ERROR
from experiments.ledger import BUSY, FAILED

# Without a status, though begun; and without a folder.
TORN, MISSING = "half done", "not begun"
SHOWN = 10  # different errors
NO_WORDS = "ended without a status: killed, or its folder cannot be written"


@dataclass(frozen=True)
class Outcome:
    """What has become of a run: a state of `experiments.ledger`, or one of the two above."""

    name: str
    folder: Path | None
    state: str
    error: str | None = None

    @property
    def failed(self) -> bool:
        """Whether it was begun and is neither done nor at work."""
        return self.state in (FAILED, TORN) or (self.state == MISSING and self.error is not None)


def closing(sweep: Path, outcomes: Sequence[Outcome], stopped: bool) -> None:
    """Print how the runs of a launch ended, those that failed with their last line, and how to go on."""
    counts = Counter(outcome.state for outcome in outcomes)
    failed = [outcome for outcome in outcomes if outcome.failed]
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    if failed:
        console.print(f"{sweep.name}: {len(failed)} of {len(outcomes)} runs failed.", style="bold red")
        errors: dict[str, list[str]] = {}
        for outcome in failed:
            errors.setdefault(outcome.error or NO_WORDS, []).append(outcome.name)
        for error, names in list(errors.items())[:SHOWN]:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            console.print(f"  {error}\n    {names[0]}{more}")
        if len(errors) > SHOWN:
            console.print(f"  and {len(errors) - SHOWN} other errors")
        places = ", ".join(sorted({f"{outcome.folder.parent}/*/{ERROR}" for outcome in failed if outcome.folder}))
        console.print(f"Tracebacks: {places}." if places else "None of them could be begun.")
        console.print("The same command runs those again that are not done.")
    if stopped:
        console.print("on_error=stop: the runs after the first failure were not begun.")
    elif left := sum(outcome.state == MISSING and not outcome.failed for outcome in outcomes):
        console.print(f"{sweep.name}: {left} of {len(outcomes)} runs were not begun.")
    if counts[BUSY]:
        console.print(f"{counts[BUSY]} runs were left to another launch that works on them.")
