"""What is asked of a model: a data set in parts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame


class DataError(ValueError):
    """The data cannot be used: one line that says what was wrong, what was expected and what to do."""


@dataclass
class Task:
    """A data set in parts: raw text, and labels 0..K-1 in the order of `labels` (floats for regression)."""

    train: Dataset | None
    validation: Dataset | None
    test: Dataset
    text_columns: tuple[str, ...]
    label_column: str | None  # None where labels were neither found nor needed
    labels: list[str]  # class names; empty for regression
    kind: str  # classification | regression | qa
    metric: str  # accuracy | f1 | matthews | pearson | qa_f1 | map | mrr
    name: str
    selected_on: str  # how the validation part came about
    removed: dict[str, int]  # rows that train lost, by reason


def with_columns(test: DataFrame, used: Sequence[str], names: Sequence[str]) -> DataFrame:
    """The test part with the further columns ``names`` as numbers, or as strings with None where there is no value.

    Raises:
        DataError: it has no such column, or the column is ``used``: it is the text or the label.
    """
    for name in names:
        if name not in test:
            known = textwrap.shorten(", ".join(map(str, test)), 300, placeholder=" ...")
            raise DataError(f"the test part has no column {name!r}: its columns are {known}")
        if name in used:
            free = [str(column) for column in test if column not in used]
            raise DataError(f"{name!r} is the text or the label: name another column ({', '.join(free) or 'none'})")
        if test[name].dtype.kind not in "biuf":
            values = test[name].astype(object)
            test = test.assign(
                **{name: [None if empty else str(v) for v, empty in zip(values, values.isna(), strict=True)]}
            )
    return test
