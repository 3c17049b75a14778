"""Batches by a budget of padded tokens: texts of near lengths together, the oldest first.

A batch of B texts, padded to its longest one of N tokens, costs B * N tokens, and that is what the budget bounds: it
bounds the memory of a call and makes calls alike in time, which a number of texts does neither.

Works with numbers alone: no torch, no texts.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable, Iterator

BUDGET = 8192  # padded tokens of a batch
ROWS = 512  # texts of a batch
WINDOW = 4096  # texts that wait at a time: among so many nearly every text has neighbours of its own length
PADDING = 0.125  # padding of a batch, as a share of what its texts need
CALL = 64  # tokens of padding that are cheaper than another call


class Batcher:
    """Hold texts that wait, and hand them out in batches; the oldest one is in the next batch.

    A batch begins with the oldest text, and takes the waiting text that is nearest in length to it as long as the batch
    stays within ``budget`` padded tokens and ``rows`` texts, and as long as its padding stays within ``CALL`` tokens or
    the share ``PADDING`` of what the texts need. A text over the budget is a batch of its own. No text waits for more
    batches than there were texts before it.

    Example:
        >>> waiting = Batcher(budget=24)
        >>> for name, length in {"a": 12, "b": 3, "c": 12, "d": 4}.items():
        ...     waiting.add(name, length)
        >>> waiting.take(), waiting.take()
        (['a', 'c'], ['b', 'd'])
    """

    def __init__(self, budget: int = BUDGET, rows: int = ROWS):
        if budget < 1 or rows < 1:
            raise ValueError(f"a budget of {budget} tokens and {rows} texts: expected 1 or more of both")
        self.budget, self.rows = budget, rows
        self._items: dict[int, object] = {}  # by the number in which they came
        self._sorted: list[tuple[int, int]] = []  # (length, number), rising
        self._oldest: deque[tuple[int, int]] = deque()  # the same, in the order in which they came
        self._count = 0

    def __len__(self) -> int:
        """The texts that wait."""
        return len(self._sorted)

    def add(self, item: object, length: int) -> None:
        """Let a text of ``length`` tokens wait; ``item`` stands for it."""
        entry = (int(length), self._count)
        self._items[self._count] = item
        self._count += 1
        bisect.insort(self._sorted, entry)
        self._oldest.append(entry)

    def take(self) -> list:
        """Return the items of the next batch, shortest first; they wait no longer.

        Raises:
            IndexError: none waits.
        """
        while self._oldest and self._oldest[0][1] not in self._items:
            self._oldest.popleft()  # left in an earlier batch
        if not self._oldest:
            raise IndexError("no text waits")
        low, high = self._around(self._oldest.popleft())
        batch = self._sorted[low:high]
        del self._sorted[low:high]
        return [self._items.pop(number) for _, number in batch]

    def _around(self, oldest: tuple[int, int]) -> tuple[int, int]:
        """The places [low, high) in rising order of length that go with the oldest text."""
        waiting, low = self._sorted, bisect.bisect_left(self._sorted, oldest)
        high, needed = low + 1, oldest[0]
        while high - low < self.rows:
            sides = [place for place in (low - 1, high) if 0 <= place < len(waiting)]
            fitting = [place for place in sides if self._fits(waiting[place][0], low, high, needed)]
            if not fitting:
                break
            nearest = min(fitting, key=lambda place: abs(waiting[place][0] - oldest[0]))
            needed += waiting[nearest][0]
            low, high = min(low, nearest), max(high, nearest + 1)
        return low, high

    def _fits(self, length: int, low: int, high: int, needed: int) -> bool:
        """Whether a text goes into a batch whose texts need so many tokens."""
        padded = max(self._sorted[high - 1][0], length) * (high - low + 1)
        return padded <= self.budget and padded - needed - length <= max(CALL, PADDING * (needed + length))


def batches(
    lengths: Iterable[int], budget: int = BUDGET, rows: int = ROWS, window: int = WINDOW
) -> Iterator[list[int]]:
    """Cut texts of so many tokens into batches of their numbers; no more than ``window`` of them wait at a time.

    ``lengths`` may be a stream: it is read as far as the window goes.
    """
    if window < 1:
        raise ValueError(f"window={window}: expected 1 or more texts")
    waiting = Batcher(budget, rows)
    for number, length in enumerate(lengths):
        waiting.add(number, length)
        if len(waiting) >= window:
            yield waiting.take()
    while len(waiting):
        yield waiting.take()
