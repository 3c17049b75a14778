"""What is asked of a model: a data set in parts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame


PAIRED = ("group", "place", "similarity")  # columns of texts in pairs, see ``data.texts``


class DataError(ValueError):
    """The data cannot be used: one line that says what was wrong, what was expected and what to do."""


class MetricError(DataError):
    """The metric does not fit the data."""


def brief(*items: object) -> str:
    """Join items by commas, in 300 characters at most."""
    return textwrap.shorten(", ".join(map(str, items)), 300, placeholder=" ...")


def require(condition: object, message: str) -> None:
    """Raise DataError with ``message`` unless the condition holds."""
    if not condition:
        raise DataError(message)


@dataclass
class Task:
    """Hold a data set in parts: raw text, and labels 0..K-1 in the order of ``labels``, else numbers."""

    train: Dataset | None
    validation: Dataset | None
    test: Dataset
    text_columns: tuple[str, ...]
    label_column: str | None  # None where labels were neither found nor needed
    labels: list[str]  # class names; empty where a model gives one number
    kind: str  # classification | regression | reranking (by one number) | embedding | qa
    metric: str  # accuracy | f1 | matthews | pearson | spearman | qa_f1 | map | mrr | ndcg@10 | recall@10 | cosine
    name: str
    selected_on: str  # how the validation part came about
    removed: dict[str, int]  # rows that train lost, by reason


def with_columns(test: DataFrame, used: Sequence[str], names: Sequence[str]) -> DataFrame:
    """Return the test part with the columns ``names`` as numbers, or as strings with None where there is no value.

    Raises:
        DataError: it has no such column, or the column is ``used``: it is the text or the label.
    """
    for name in names:
        require(name in test, f"the test part has no column {name!r}: its columns are {brief(*test)}")
        free = [column for column in test if column not in used] if name in used else ()
        require(name not in used, f"{name!r} is the text or the label: name another column ({brief(*free) or 'none'})")
        if test[name].dtype.kind not in "biuf":
            values = test[name].astype(object)
            strings = [None if empty else str(v) for v, empty in zip(values, values.isna(), strict=True)]
            test = test.assign(**{name: strings})
    return test


def task_parts(
    train, validation, test: DataFrame, columns: Sequence[str], beside: Sequence[str]
) -> tuple[Dataset | None, Dataset | None, Dataset]:
    """Return tables as data sets of the ``columns``; test has those ``beside`` them as well."""
    from datasets import Dataset

    def dataset(table: DataFrame, names: Sequence[str]) -> Dataset:
        return Dataset.from_pandas(table[[*names]], preserve_index=False)

    kept = (None if table is None else dataset(table, columns) for table in (train, validation))
    return (*kept, dataset(test, [*columns, *beside]))
