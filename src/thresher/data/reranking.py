"""Queries with candidates to rank: which of them can be judged, and which pair belongs to which.

Shapes: N pairs of a query and a candidate, of Q queries. The metrics are in ``stats.metrics``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .task import require

if TYPE_CHECKING:
    from pandas import DataFrame

METRICS = ("map", "mrr")


def judged(frame: DataFrame, query: str, label: str) -> DataFrame:
    """Return the rows of queries that an order matters to: those with a candidate of class 1 and with one of class 0.

    TREC QA without the others is what the literature calls its clean version (Rao et al., 2016). Raises DataError where
    none is left.
    """
    both = frame.groupby(query)[label].transform("nunique") == 2
    require(both.any(), f"no query in {query!r} has candidates of both classes: map and mrr need such queries")
    return frame[both]


def numbered(queries: Iterable[str]) -> list[int]:
    """Return (N,) the query of each pair as 0..Q-1, in the order of appearance."""
    known: dict[str, int] = {}
    return [known.setdefault(query, len(known)) for query in queries]
