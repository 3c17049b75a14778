"""What is asked of a model: a data set in parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


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
    metric: str  # accuracy | f1 | matthews | pearson | qa_f1
    name: str
    selected_on: str  # how the validation part came about
    removed: dict[str, int]  # rows that train lost, by reason
