"""Text for training, evaluation and timing: a file, a folder, a hub data set or BBC News becomes one `Task`.

The test part chooses nothing: every choice is made on `Task.validation`, always the same rows of the training part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import checks, qa, reranking, retrieval
from .checks import Flaws
from .labels import as_classes, check, encode, find_columns, unlabelled
from .newsgroups import strip_post
from .read import read
from .reranking import first_queries, is_ranking, judged
from .spec import DataSpec
from .split import choose_parts, hold_out, hold_out_groups
from .task import MetricError, Task, brief, require, task_parts, with_columns

if TYPE_CHECKING:
    from pandas import DataFrame

CORRELATIONS = ("pearson", "spearman")  # metrics of numbers
COMMON, MANY = 0.8, 50  # share of (so many) rows in one class above which accuracy says little
USUAL = {"mrpc": "f1", "cola": "matthews", "trecqa": "map"}


def load_task(
    data: DataSpec | str | Path,
    *,
    labels: Sequence[str] | None = None,
    need_labels: bool = True,
    beside: Sequence[str] = (),
    seed: int = 0,
    **fields: Any,
) -> Task:
    """Read a data set and cut it into train, validation (for every choice) and test (for the report).

    Test is the part called test; where there is none, or none with labels (GLUE), the part called validation; else 10 %
    of the texts. Validation is 10 % of train, at most 2,000 texts. Both cuts are stratified, with the fixed seed 0.

    * Copies of a text, blanks and case aside, lie in one part. Train loses what test has as well, and empty texts.
    * Class names come from ClassLabel features, from a column ``label_text`` beside integers in ``label``, or are the
      sorted labels; -1 means "no label", as on the hub. Floats mean regression, unless they are up to 10 whole numbers
      and the metric is not "pearson" or "spearman".
    * Columns like SQuAD's make a question answering task (``qa.load_qa``), or one of finding the paragraph where the
      metric ranks (``reranking.load_paragraphs``).
    * Of classes the metric is accuracy, or "matthews" where four rows of five are of one class.
    * The metrics "map", "mrr", "ndcg@10" and "recall@10" (any number) rerank pairs of a query and a candidate: of two
      classes class 1 is relevant, of more numbers what is above 0. Parts are then cut by query, and queries without
      candidates of both kinds leave test and validation.
    * A folder with corpus, queries and qrels (BEIR's form) becomes such pairs (``retrieval``).
    * Quotes are plain characters in a .tsv, and nothing but "" is missing in a .csv.
    * 20newsgroups is stripped (``strip_post``), bbc loses its duplicates.

    What is odd in the data is counted and told by one warning each; ``Task.removed`` counts what train lost.

    Args:
        data: what to read; a path or hub id with further ``fields`` of ``DataSpec`` is short for one.
        labels: class names in the order of an existing model, to replace the order found in the data; an empty list for
            a model that predicts numbers.
        need_labels: False accepts data without labels, or with one class.
        beside: further columns that the test part is to have: numbers, or strings with None where there is no value.
        seed: of the order of train, which has at most ``limit`` rows; validation and test do not change.

    Raises:
        DataError: whatever cannot be used.
    """
    spec = data if isinstance(data, DataSpec) else DataSpec(data=str(data), **fields)
    flaws = Flaws()
    if retrieval.is_retrieval(spec.data):
        whole = retrieval.load_retrieval(spec.data)
        name, parts, labels = whole.name, {"train": whole.pairs()}, ()
        metric = spec.metric or "ndcg@10"
        require(is_ranking(metric), f"{metric!r} is no metric for retrieval: use {brief(*reranking.USUAL)}")
        spec = replace(spec, metric=metric, text=reranking.COLUMNS, label="label")
    else:
        name, parts = read(spec.data, spec.config, (spec.train_split, spec.test_split))
    if spec.text is None and spec.label is None and qa.is_qa(next(iter(parts.values()))):
        made = reranking.load_paragraphs if is_ranking(spec.metric) else qa.load_qa
        task = made(name, parts, spec, flaws, seed=seed, beside=beside)
    else:
        table = _table(name, parts, spec, flaws, labels, need_labels)
        task = _cut(table, spec, flaws, seed, beside)
    flaws.tell()
    return task


@dataclass
class _Table:
    """Parts with checked texts and encoded labels, before anything is cut."""

    name: str
    parts: dict[str, DataFrame]
    columns: tuple[str, ...]
    label: str | None
    names: list[str] | None  # of the classes; None where labels are numbers
    learns: bool  # labels are there, and needed

    def kind(self, metric: str | None) -> str:
        numbers = "reranking" if is_ranking(metric) else "regression"
        return numbers if self.names is None else "classification"


def _table(name: str, parts: dict, spec: DataSpec, flaws: Flaws, labels, need_labels: bool) -> _Table:
    """Find the columns, choose the parts and encode the labels."""
    columns, label = find_columns(parts.get("train", next(iter(parts.values()))), spec.text, spec.label, need_labels)
    parts = choose_parts(parts, spec.train_split, spec.test_split, label if need_labels else None)
    if not need_labels and any(unlabelled(part, label).any() for part in parts.values()):
        label = None
    numbers = labels is not None and not labels if spec.metric is None else spec.metric in CORRELATIONS
    if label and is_ranking(spec.metric) and reranking.are_grades(parts, label, labels):
        parts = {where: part.astype({label: float}) for where, part in parts.items()}
    elif label and not numbers:
        parts = as_classes(parts, label, flaws)
    for where, part in parts.items():
        check(where, part, columns, label)
    parts, names = encode(parts, label, labels)
    names = None if label is None and labels is not None and not labels else names  # a model of numbers
    if name == "20newsgroups":
        parts = {where: part.assign(**{columns[0]: part[columns[0]].map(strip_post)}) for where, part in parts.items()}
    parts = checks.without_empty(parts, columns, flaws)
    if name == "bbc":
        copies = checks.normalized(parts["train"], columns).duplicated()
        parts["train"] = flaws.remove(parts["train"], copies, "duplicate", "repeat another article")
    checks.note_copies("test" if "test" in parts else "train", parts.get("test", parts.get("train")), columns, flaws)
    if label and names:
        checks.note_contradictions(parts, columns, label, flaws)
    return _Table(name, parts, columns, label, names, bool(label and names and need_labels))


def _metric(table: _Table, asked: str | None, flaws: Flaws) -> str:
    """Return the metric that was asked for, or the usual one. Raises DataError where it does not fit the labels."""
    classes = len(table.names or ())
    fits = [*CORRELATIONS] if table.names is None else ["accuracy", "matthews"] + ["f1"] * (classes == 2)
    pairs = len(table.columns) == 2 and (table.names is None or (table.label is not None and classes == 2))
    fits += reranking.USUAL if pairs else ()
    usual = USUAL.get(table.name)
    metric = asked or (usual if usual in fits else fits[0])
    rows: Any = table.parts.get("train", table.parts.get("test"))
    if metric == "accuracy" and not asked and table.learns and len(rows) >= MANY:
        shares = rows[table.label].value_counts(normalize=True)
        if shares.iloc[0] >= COMMON:
            metric, name = "matthews", brief((table.names or [])[shares.index[0]])
            flaws.notices.append(
                f"{shares.iloc[0]:.0%} of the rows are of the class {name}: quality is Matthews' correlation, in which "
                "giving that answer always is worth 0; name accuracy as the metric if you want it"
            )
    fit = metric in fits or (pairs and is_ranking(metric))
    if not fit:
        raise MetricError(f"{metric!r} is no metric for {table.kind(None)} ({classes} classes): use {brief(*fits)}")
    return metric


def _cut(table: _Table, spec: DataSpec, flaws: Flaws, seed: int, beside: Sequence[str]) -> Task:
    """Cut a table into the parts of a task."""
    columns, label, train, test = table.columns, table.label, table.parts.get("train"), table.parts.get("test")
    metric, validation, selected_on = _metric(table, spec.metric, flaws), None, "nothing: there is no train part"
    ranked, classes = is_ranking(metric), table.names or []
    if test is None:
        whole = (train, columns, label, 5 if table.name == "bbc" else 10)
        train, test = hold_out_groups(train, columns[0], 0.1) if ranked else hold_out(*whole)
    elif train is not None:
        train = checks.without_tested(train, test, columns[:1] if ranked else columns, flaws)
    if table.learns and label:
        parts = {"train": train, "test": test} if train is not None else {"test": test}
        checks.note_classes(parts, label, classes, flaws)
    if train is not None:
        seen = [classes[y] for y in train[label].unique()] if table.learns else ()
        require(len(seen) != 1, f"train has only the class {brief(*seen)} in {label!r}: two or more are needed")
        if ranked:
            share = min(0.1, 2000 / len(train))
            train, validation = hold_out_groups(train, columns[0], share)
            validation = judged(validation, columns[0], label) if label else validation
        else:
            train, validation = hold_out(train, columns, label, most=2000)
        how = f" by {columns[0]}" if ranked else ", at most 2000 texts" if len(validation) >= 2000 else ""
        selected_on = f"10% of train{how} (seed 0), {len(validation)} rows"
        if ranked:
            train = first_queries(train, columns[0], spec.limit, seed)
        else:
            train = train.iloc[np.random.RandomState(seed).permutation(len(train))[: spec.limit]]
    test = judged(test, columns[0], label) if ranked and label else test
    used = [*columns, label] if label else [*columns]
    cut = task_parts(train, validation, with_columns(test, used, beside), used, beside)
    return Task(*cut, columns, label, classes, table.kind(metric), metric, table.name, selected_on, flaws.removed)
