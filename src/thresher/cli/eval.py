"""The command ``eval``."""

from __future__ import annotations

from ..experiments.spec import EvalSpec
from .console import Screen


def evaluate(spec: EvalSpec, screen: Screen) -> None:
    """Quality and MACs of a model on the test part of a data set.

    An embedder: nDCG and recall on a folder of corpus, queries and qrels, Spearman's correlation on pairs with a
    similarity, and the cosine to its dense model on any texts.

    \b
    Examples:
      thresher eval runs/reviews
      thresher eval runs/reviews --data reviews.csv --threads 1
      thresher eval runs/embedder --data cranfield
      thresher eval runs/sst2 --data glue --config sst2 --json sst2.json
    """
    from ..experiments.evaluate import evaluate as job
    from ..reports.tables import table

    with screen.aside():
        rows = job(spec)
    screen.show(rows, table)
