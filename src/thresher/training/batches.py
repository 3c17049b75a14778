"""Batches of texts that are alike: in length, or the candidates of one query."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

WINDOW = 50  # batches that are put together by length


class LengthOrder(Sampler[int]):
    """Rows in an order of which each run of ``size`` is a batch of near lengths, and the batches come in no order.

    transformers' own grouping by length goes through each window from the longest batch to the shortest: the labels of
    one batch after the other then lean to the same side, and a model may learn nothing (see docs/training.md). All is
    drawn from torch's random numbers, so that a resumed training draws it again (``checkpoints.Order``). A smaller
    batch comes last.

    Args:
        lengths: tokens of each row.
        size: rows of a batch.
        window: batches that are put together by length; the rows of a window are drawn at random.

    Raises:
        ValueError: no rows, or a size or window below 1.
    """

    def __init__(self, lengths: Sequence[int], size: int, window: int = WINDOW):
        if not lengths or size < 1 or window < 1:
            what = f"{len(lengths)} rows in batches of {size}, {window} in a window"
            raise ValueError(f"{what}: expected rows, and 1 or more of both")
        self.lengths, self.size, self.rows = lengths, size, size * window

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        drawn = torch.randperm(len(self.lengths)).tolist()
        rest = len(drawn) % self.size
        whole, last = drawn[: len(drawn) - rest], drawn[len(drawn) - rest :]
        batches = []
        for start in range(0, len(whole), self.rows):
            window = sorted(whole[start : start + self.rows], key=lambda row: self.lengths[row])
            batches += [window[i : i + self.size] for i in range(0, len(window), self.size)]
        for batch in torch.randperm(len(batches)).tolist():
            yield from batches[batch]
        yield from last


class QueryBatches(Sampler[list[int]]):
    """Whole queries in batches of near lengths.

    What is in a batch stays together. The order of the batches is drawn from torch's random numbers, so that a resumed
    training draws it again (``checkpoints.Order``).

    A query with more candidates than a batch takes is cut into parts of nearly the same size. A candidate is not left
    without a rival of its query where it has one: where two of them are over the budget together, they still make a
    batch.

    Args:
        queries: the number of each row's query.
        lengths: tokens of each row.
        size: rows of a batch, at most.
        tokens: padded tokens of a batch, at most, but for two or three rows that are longer; default: any.
        seed: of what is put together.
        drawn: whether the order of the batches is drawn; else it is that of their lengths.

    Raises:
        ValueError: no rows, or a size or budget below 1.
    """

    def __init__(
        self,
        queries: Sequence[int],
        lengths: Sequence[int],
        size: int,
        tokens: int | None = None,
        seed: int = 0,
        drawn: bool = True,
    ):
        if not queries or size < 1 or (tokens is not None and tokens < 1):
            what = f"{len(queries)} rows in batches of {size} rows and {tokens} tokens"
            raise ValueError(f"{what}: expected rows, and 1 or more in a batch")
        self.lengths, self.size, self.tokens, self.drawn = lengths, size, tokens, drawn
        draw = torch.Generator().manual_seed(seed)
        groups: dict[int, list[int]] = {}
        for row in torch.randperm(len(queries), generator=draw).tolist():
            groups.setdefault(queries[row], []).append(row)
        parts = [part for group in groups.values() for part in self._parts(group)]
        parts.sort(key=lambda part: self._longest(part))  # stable: among equal lengths as drawn
        self.batches: list[list[int]] = [[]]
        for part in parts:
            if self.batches[-1] and not self._fits([*self.batches[-1], *part]):
                self.batches.append([])
            self.batches[-1] += part

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.batches)).tolist() if self.drawn else range(len(self.batches))
        return iter([self.batches[i] for i in order])

    def _longest(self, rows: list[int]) -> int:
        return max(self.lengths[row] for row in rows)

    def _fits(self, rows: list[int]) -> bool:
        return len(rows) <= self.size and (self.tokens is None or len(rows) * self._longest(rows) <= self.tokens)

    def _parts(self, group: list[int]) -> list[list[int]]:
        """A query's rows, cut where they do not fit: in halves, thirds, ...; those of which a budget has no room for
        three in pairs, before that."""
        if self._fits(group) or self.size == 1:
            return [group[i : i + self.size] for i in range(0, len(group), self.size)]
        wide = [row for row in group if self.tokens is not None and 3 * self.lengths[row] > self.tokens]
        rest = [row for row in group if row not in wide]
        if len(wide) % 2 and rest:
            wide.append(rest.pop())
        if len(rest) == 1 and wide:
            wide.append(rest.pop())
        pairs = [wide[i : i + 2] for i in range(0, len(wide) - len(wide) % 2, 2)]
        if len(wide) % 2 and pairs and self.size > 2:
            pairs[-1].append(wide[-1])
        elif len(wide) % 2:
            pairs.append(wide[-1:])
        for count in range(1, len(rest) + 1):
            parts = [rest[i::count] for i in range(count)]
            if all(map(self._fits, parts)):
                return pairs + parts
        return pairs
