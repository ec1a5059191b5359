"""The records of a run in memory: all of them, or evenly spread ones if there are very many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pandas as pd

# Memory of a record: a row per layer and quantity, and what pandas needs for a frame of any size.
ROW_BYTES, FRAME_BYTES = 150, 20_000
MOST_BYTES = 40_000_000
LEAST = 40  # records that are never too many; half of them are left after thinning


class Records:
    """Frames of records in the order of their steps; beyond `MOST_BYTES`, every second one is left out.

    From then on, only every second new record is kept, later every fourth, and so on.  Kept records therefore lie at
    equal distances over the whole run.  The first and the last one are always kept.
    """

    def __init__(self, frames: Iterable[pd.DataFrame] = ()) -> None:
        self._frames = list[pd.DataFrame]()
        self._num, self._every, self._bytes = 0, 1, 0
        self.last = pd.DataFrame()
        for frame in frames:
            self.add(frame)

    def add(self, frame: pd.DataFrame) -> None:
        """Add the frame of the next record."""
        self.last = frame
        if self._num % self._every == 0:
            self._frames.append(frame)
            self._bytes += _size(frame)
            if len(self._frames) > LEAST and self._bytes > MOST_BYTES:
                self._frames, self._every = self._frames[::2], 2 * self._every
                self._bytes = sum(map(_size, self._frames))
        self._num += 1

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[pd.DataFrame]:
        yield from self._frames
        if self._num and (self._num - 1) % self._every:
            yield self.last

    @property
    def thinning(self) -> str:
        """Sentences that say how many records are not kept, and who received them; empty if all are kept."""
        if self._every == 1:
            return ""
        return (
            f"The monitor keeps {len(self)} of {self._num} records in memory, at equal distances over the run. "
            "report= and sinks= received all of them."
        )


def _size(frame: pd.DataFrame) -> int:
    """Bytes of a frame, about; pandas takes long to count them."""
    return FRAME_BYTES + ROW_BYTES * len(frame)
