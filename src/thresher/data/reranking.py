"""Queries with candidates to rank: which of them can be judged. The metrics are in ``stats.metrics``."""

from __future__ import annotations

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
