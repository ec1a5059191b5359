"""The records of a run in memory: all recent ones, and fewer of the older ones if there are very many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pandas as pd

# A record has a row per layer and quantity.  A row takes 150 bytes, so all kept rows take at most 40 MB.
MOST_ROWS = 250_000
LEAST = 40  # records that are kept in any case; half of them after thinning


class Records:
    """Frames of records in the order of their steps; beyond `MOST_ROWS`, older ones are thinned.

    Every second record of the older half is then left out, so the distance between two kept records is about
    proportional to their age.  The first record is always kept.  ``left_out``: number of records that are not kept.
    """

    def __init__(self, frames: Iterable[pd.DataFrame] = ()) -> None:
        self._frames, self._rows, self.left_out = list[pd.DataFrame](), 0, 0
        for frame in frames:
            self.add(frame)

    def add(self, frame: pd.DataFrame) -> None:
        """Add the frame of the next record."""
        self._frames.append(frame)
        self._rows += len(frame)
        if self._rows > MOST_ROWS and len(self._frames) > LEAST:
            half = len(self._frames) // 2
            self.left_out += half // 2
            self._frames[:half] = self._frames[:half:2]
            self._rows = sum(map(len, self._frames))

    def __len__(self) -> int:
        return len(self._frames)

    def __iter__(self) -> Iterator[pd.DataFrame]:
        return iter(self._frames)

    @property
    def last(self) -> pd.DataFrame:
        """The last record; an empty frame if there is none."""
        return self._frames[-1] if self._frames else pd.DataFrame()

    @property
    def thinning(self) -> str:
        """Sentences that say how many records are not kept, and who received them; empty if all are kept."""
        if not self.left_out:
            return ""
        return (
            f"The monitor keeps {len(self)} of {len(self) + self.left_out} records in memory: every second one of the "
            "older half was left out, several times if there were many. report= and sinks= received all of them."
        )
