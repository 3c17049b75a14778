"""Texts without labels, for embedders: each text of a data set once, whatever stands beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .checks import Flaws, without_empty, without_tested
from .labels import check, find_columns
from .read import read
from .retrieval import is_retrieval, load_retrieval
from .spec import DataSpec
from .split import choose_parts, hold_out
from .task import Task, require, task_parts

if TYPE_CHECKING:
    from pandas import DataFrame

TEXT = "text"
METRIC = "cosine"  # to another model's vectors


def load_texts(spec: DataSpec, *, seed: int = 0) -> Task:
    """Return the texts of a data set as a task of the kind "embedding", in train, validation and test.

    Both texts of a pair, and documents and queries of a folder in BEIR's form, are texts of their own. Copies are left
    out, and train loses what test has as well. Parts are those of ``load_task``. The metric is "cosine", in points: how
    near an embedder's vectors are to another one's.

    Args:
        seed: of the order of train, which has at most ``limit`` texts.

    Raises:
        DataError: whatever cannot be used.
    """
    require(spec.metric in (None, METRIC), f"{spec.metric!r} is no metric of texts without labels: use {METRIC}")
    flaws = Flaws()
    if is_retrieval(spec.data):
        whole = load_retrieval(spec.data)
        name, parts = whole.name, {"train": _frame([whole.documents, whole.queries])}
    else:
        name, parts = read(spec.data, spec.config, (spec.train_split, spec.test_split))
        first = parts.get("train", next(iter(parts.values())))
        context = spec.text is None and {"question", "context"} <= {*first}
        columns = ("question", "context") if context else find_columns(first, spec.text, spec.label, False)[0]
        parts = choose_parts(parts, spec.train_split, spec.test_split, None)
        for where, part in parts.items():
            check(where, part, columns, None)
        parts = {where: _frame([part[column] for column in columns]) for where, part in parts.items()}
    parts = without_empty(parts, (TEXT,), flaws)
    train, test = parts.get("train"), parts.get("test")
    if test is None:
        train, test = hold_out(train, (TEXT,), None)
    require(train is not None, f"{spec.data} has a test part only: give train or validation texts")
    train = without_tested(train, test, (TEXT,), flaws)
    train, validation = hold_out(train, (TEXT,), None, most=2000)
    train = train.iloc[np.random.RandomState(seed).permutation(len(train))[: spec.limit]]
    selected_on = f"10% of train (seed 0), {len(validation)} texts"
    cut = task_parts(train, validation, test, (TEXT,), ())
    flaws.tell()
    return Task(*cut, (TEXT,), None, [], "embedding", METRIC, name, selected_on, flaws.removed)


def _frame(columns: list) -> DataFrame:
    """Return the distinct texts of some columns."""
    import pandas

    return pandas.DataFrame({TEXT: list(dict.fromkeys(text for column in columns for text in column))})
