"""Judge a classifier of texts that arrive in pieces: what it says when, and when its answer can be believed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from ..stats.bounds import LEVEL, passing, upper

MARGINS = tuple(round(1 - 0.01 * i, 2) for i in range(1, 100))  # that are tried, the strictest first


class Reader(Protocol):
    """What reads a text piece by piece: ``streaming.Stream``, or a baseline."""

    def reset(self) -> None:
        """Begin a new text."""

    def __call__(self, piece: str) -> Any:
        """Read a piece; the answer has ``label``, ``margin``, ``read`` and ``macs``."""


def pieces_of(text: str, words: int) -> list[str]:
    """Cut a text into pieces of so many words; the last one may be shorter."""
    parts = text.split()
    return [" ".join(parts[i : i + words]) for i in range(0, len(parts), words)]


def read_all(reader: Reader, texts: Iterable[str], words: int, progress: Callable[[], Any] | None = None) -> list[list]:
    """The answers to each text, after each piece of ``words`` words.

    Raises:
        ValueError: a text without words.
    """
    runs = []
    for number, text in enumerate(texts):
        pieces = pieces_of(text, words)
        if not pieces:
            raise ValueError(f"text {number} has no words: leave it out")
        reader.reset()
        runs.append([reader(piece) for piece in pieces])
        if progress is not None:
            progress()
    return runs


def streamed(runs: Sequence[Sequence[Any]], labels: Sequence[str]) -> dict[str, float]:
    """What answers are worth: accuracy (%) after a quarter, a half and all of each text, changes of the label within a
    text, and MACs for each new token."""
    measures: dict[str, float] = {}
    for name, share in (("quarter", 0.25), ("half", 0.5), ("end", 1.0)):
        at = [run[max(0, round(share * len(run)) - 1)].label for run in runs]
        measures[f"accuracy_{name}"] = 100 * float(
            np.mean([one == label for one, label in zip(at, labels, strict=True)])
        )
    flips = [sum(a.label != b.label for a, b in pairwise(run)) for run in runs]
    read = sum(run[-1].read for run in runs)
    spent = sum(answer.macs for run in runs for answer in run)
    return measures | {"flips": float(np.mean(flips)), "macs_per_token": spent / read}


def sure_margin(runs: Sequence[Sequence[Any]], limit: float, level: float = LEVEL) -> float | None:
    """The lowest margin at which the first answer may be taken as the last one.

    At a margin, an error is a text whose first answer that reaches it has another label than its last answer. Margins
    are tested from the strictest down, so that with probability 1 - ``level`` over the draw of the texts the rate of
    errors is at most ``limit`` on others of their kind (``stats.bounds.passing``). None: not even the strictest one
    can be shown.

    Args:
        runs: answers to texts that chose nothing else, of a stream without ``sure``.
        limit: share of texts.

    Raises:
        ValueError: no texts, or a limit that is no share.
    """
    if not runs or not 0 < limit < 1:
        raise ValueError(f"{len(runs)} texts and limit={limit}: expected texts, and a share between 0 and 1")

    def bound(margin: float) -> float:
        first = [next((answer for answer in run if answer.margin >= margin), run[-1]) for run in runs]
        errors = sum(answer.label != run[-1].label for answer, run in zip(first, runs, strict=True))
        return upper(errors, len(runs), level)

    count = passing(map(bound, MARGINS), limit)
    return MARGINS[count - 1] if count else None
