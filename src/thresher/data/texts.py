"""Texts for embedders: each text of a data set once, whatever stands beside it; or in pairs, where they are known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .checks import Flaws, without_empty, without_tested
from .labels import check, find_columns
from .newsgroups import strip_post
from .read import read
from .retrieval import is_retrieval, load_retrieval
from .spec import DataSpec
from .split import choose_parts, hold_out
from .task import PAIRED, Task, brief, require, task_parts

if TYPE_CHECKING:
    from pandas import DataFrame

TEXT = "text"
METRIC = "cosine"  # to another model's vectors
ANCHORS, POSITIVE, NEGATIVE = ("anchor", "query"), "positive", "negative"  # columns, as sentence-transformers has them


def load_texts(spec: DataSpec, *, seed: int = 0, pairs: bool = False) -> Task:
    """Return the texts of a data set as a task of the kind "embedding", in train, validation and test.

    Both texts of a pair, and documents and queries of a folder in BEIR's form, are texts of their own. Copies are left
    out, and train loses what test has as well. 20newsgroups is stripped, and parts are, as by ``load_task``. The metric
    is "cosine", in points: how near an embedder's vectors are to another one's.

    Args:
        seed: of the order of train, which has at most ``limit`` texts.
        pairs: where the table has pairs (``pair_columns``), the rows of train are theirs: ``group`` is the number of a
            pair, ``place`` 0 of its first text, 1 of its second, 2 of one that is further away, ``similarity`` what the
            table says of them, NaN where it says none. A pair whose text is held out, or tested, is none in train; what
            is left of it is a text of its own.

    Raises:
        DataError: whatever cannot be used.
    """
    require(spec.metric in (None, METRIC), f"{spec.metric!r} is no metric of texts without labels: use {METRIC}")
    flaws, label, table = Flaws(), None, None
    if is_retrieval(spec.data):
        whole = load_retrieval(spec.data)
        name, parts = whole.name, {"train": _frame([whole.documents, whole.queries])}
    else:
        name, parts = read(spec.data, spec.config, (spec.train_split, spec.test_split))
        first = parts.get("train", next(iter(parts.values())))
        context = spec.text is None and {"question", "context"} <= {*first}
        known = None if context else pair_columns(first, spec)
        if known is None:
            columns = ("question", "context") if context else find_columns(first, spec.text, spec.label, False)[0]
        else:
            columns, label = known
        parts = choose_parts(parts, spec.train_split, spec.test_split, None)
        for where, part in parts.items():
            check(where, part, columns, None)
        if pairs and known and "train" in parts:
            table = parts["train"]
            check("train", table, columns[:2], label)
        parts = {where: _frame([part[column] for column in columns]) for where, part in parts.items()}
        if name == "20newsgroups":
            parts = {where: _frame([part[TEXT].map(strip_post)]) for where, part in parts.items()}
    parts = without_empty(parts, (TEXT,), flaws)
    train, test = parts.get("train"), parts.get("test")
    if test is None:
        train, test = hold_out(train, (TEXT,), None)
    require(train is not None, f"{spec.data} has a test part only: give train or validation texts")
    train = without_tested(train, test, (TEXT,), flaws)
    train, validation = hold_out(train, (TEXT,), None, most=2000)
    train = train.iloc[np.random.RandomState(seed).permutation(len(train))]
    selected_on = f"10% of train (seed 0), {len(validation)} texts"
    cut = task_parts(train[: spec.limit], validation, test, (TEXT,), ())
    if table is not None:
        paired = _paired(table, columns, label, [*train[TEXT]], spec.limit, flaws)
        cut = (task_parts(paired, None, paired, (TEXT, *PAIRED), ())[0], *cut[1:])
    flaws.tell()
    return Task(*cut, (TEXT,), None, [], "embedding", METRIC, name, selected_on, flaws.removed)


def pair_columns(frame: DataFrame, spec: DataSpec) -> tuple[tuple[str, ...], str | None] | None:
    """Return the columns of pairs and that of their similarity; None for a table of texts.

    A table with the columns anchor (or query), positive and perhaps negative has pairs that are near, with every other
    positive and all negatives further away. One with two columns of text and a label that is a fraction has pairs of
    that similarity.
    """
    anchor = next((column for column in ANCHORS if column in frame), None)
    named = tuple(spec.text or ())
    if spec.label is None and POSITIVE in frame and (POSITIVE in named if named else anchor):
        columns = named or (str(anchor), POSITIVE, *([NEGATIVE] if NEGATIVE in frame else []))
        require(len(columns) == 2 or columns[2:] == (NEGATIVE,), f"text={brief(*columns)}: expected a text, positive")
        return columns, None
    if named and len(named) != 2:
        return None
    columns, label = find_columns(frame, spec.text, spec.label, False)
    scored = len(columns) == 2 and label is not None and label in frame and frame[label].dtype.kind == "f"
    return (columns, label) if scored else None


def _paired(
    table: DataFrame, columns: tuple[str, ...], label: str | None, texts: list[str], limit: int | None, flaws: Flaws
) -> DataFrame:
    """The rows of train: those of whole pairs of ``texts``, then the texts that are in none."""
    import pandas

    here, lone = {*texts}, dict.fromkeys(texts)
    rows: list[tuple[str, int, int, float]] = []
    values = [np.nan] * len(table) if label is None else table[label].astype(float).tolist()
    order, count, pairs = (
        {text: i for i, text in enumerate(texts)},
        0,
        [*zip(*(table[c] for c in columns), strict=True)],
    )
    for i in sorted(range(len(pairs)), key=lambda i: order.get(pairs[i][0], len(texts))):  # drawn, as the texts are
        own = pairs[i]
        if not {*own[:2]} <= here or own[0] == own[1] or (limit is not None and len(rows) + 2 > limit):
            continue
        count += 1
        rows += [(text, i, place, values[i]) for place, text in enumerate(own) if text in here]
        for text in own:
            lone.pop(text, None)
    more = [*lone][: None if limit is None else max(0, limit - len(rows))]
    rows += [(text, len(table) + i, 0, np.nan) for i, text in enumerate(more)]
    kind = "without a similarity" if label is None else f"with the similarity {label!r}"
    flaws.notices.append(f"{count} of {len(table)} pairs {kind} are learned from; of the others a text is held out")
    return pandas.DataFrame(rows, columns=[TEXT, *PAIRED])


def _frame(columns: list) -> DataFrame:
    """Return the distinct texts of some columns."""
    import pandas

    return pandas.DataFrame({TEXT: list(dict.fromkeys(text for column in columns for text in column))})
