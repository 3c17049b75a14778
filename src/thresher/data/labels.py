"""Columns of text and label, and labels as class numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .checks import FEW, Flaws, normalized
from .task import brief, require

if TYPE_CHECKING:
    from pandas import DataFrame

PAIRS = "sentence1 sentence2, question sentence, premise hypothesis, question answer, query passage, query document"
TEXTS = f"{PAIRS}, text1 text2, sentence, text, review, content, document, body"
LABELS = ("label", "labels", "class", "category", "target", "score")


def find_columns(
    frame: DataFrame, text: Sequence[str] | None, label: str | None, need_labels: bool
) -> tuple[tuple[str, ...], str | None]:
    """Return the columns of text (one or two) and of the label: the named ones, else those with a usual name."""
    usual = (tuple(names.split()) for names in TEXTS.split(", "))
    columns = text or next((c for c in usual if {*c} <= {*frame}), ())
    problem = f"{len(columns)} text columns among {brief(*frame)}: name one or two"
    require(0 < len({*columns}) == len(columns) < 3, problem)
    label = label or next((n for n in LABELS if n in frame and (n != "score" or frame[n].dtype.kind == "f")), None)
    require(label or not need_labels, f"no label column among {brief(*frame)}: name yours, label=... or --label")
    require(label not in columns, f"the column {label!r} is named as text and as label: name two")
    return tuple(columns), label


def unlabelled(frame: DataFrame, label: str | None, kinds: str = "i") -> np.ndarray:
    """(rows,) True where there is no label, or -1 among integers (or other ``kinds`` of numbers)."""
    labels = frame.reindex(columns=[label])[label]
    return (labels.isna() | (labels.eq(-1) & (labels.dtype.kind in kinds))).to_numpy()


def check(where: str, frame: DataFrame, columns: tuple[str, ...], label: str | None) -> None:
    """Raise DataError unless each row of a part has its texts and, if a label is wanted, that."""
    from pandas.api.types import is_string_dtype

    for column in (*columns, label) if label else columns:
        require(column in frame, f"{where} has no column {column!r}: its columns are {brief(*frame)}")
        holes = np.flatnonzero(unlabelled(frame, label) if column == label else frame[column].isna())
        what, expected = ("text", "strings") if column != label else ("label (-1 is none)", "a class or number a row")
        rows = f"{len(holes)} of {len(frame)} rows, first in row {holes[:1]} (from 0)"
        require(not len(holes), f"{where} column {column!r} has no {what} in {rows}: fill them in or remove them")
        plain = is_string_dtype(frame[column]) or (column == label and frame[column].dtype != object)
        require(plain, f"{where} column {column!r} holds {frame[column].dtype}, expected {expected}")
        if column == label and frame[label].dtype.kind == "f":
            endless = int(np.isinf(frame[label]).sum())
            require(not endless, f"{where} column {label!r} holds infinity in {endless} rows: expected numbers")
        if label and column != label and label in frame and len(frame) > 1 and is_string_dtype(frame[label]):
            same = normalized(frame, [column]).equals(normalized(frame, [label]))
            require(not same, f"{where} column {column!r} holds the label {label!r} in every row: name another column")


def as_classes(parts: dict[str, DataFrame], label: str, flaws: Flaws) -> dict[str, DataFrame]:
    """Read a column of a few whole numbers that are written as floats (0.0, 1.0) as integers, and tell it."""
    import pandas

    columns = [part[label] for part in parts.values() if label in part]
    kinds = {column.dtype.kind for column in columns}
    if len(columns) < len(parts) or "f" not in kinds or not kinds <= {*"fiu"}:
        return parts
    values = np.unique(pandas.concat(columns).astype(float))
    if len(values) > FEW or not np.isfinite(values).all() or (values % 1).any():
        return parts
    what = f"column {label!r} holds only {brief(*values)}, which are read as {len(values)} classes"
    flaws.notices.append(f"{what}: for a regression name the metric pearson")
    return {where: part.astype({label: int}) for where, part in parts.items()}


def encode(parts: dict[str, DataFrame], label: str | None, given) -> tuple[dict, list[str] | None]:
    """Return labels as 0..K-1 or floats, and the class names (None for regression), both as the first part has them."""
    if label is None:
        return parts, list(given or ())
    first = next(iter(parts.values()))
    if first[label].dtype.kind == "f":
        words = [where for where, part in parts.items() if part[label].dtype.kind not in "fiu"]
        require(not words, f"{brief(*words)} column {label!r} holds no numbers: expected numbers, as in train")
        return {where: part.astype({label: float}) for where, part in parts.items()}, None
    values = [*first[label].cat.categories] if hasattr(first[label], "cat") else sorted(first[label].unique())
    names = [*map(str, values)]
    for companion in {f"{label}_text", f"{label}_name"} & {*first}:
        pairs = first.drop_duplicates([label, companion]).sort_values(label)
        if len(pairs) == len(values) == pairs[companion].nunique():
            names = [*map(str, pairs[companion])]
    order = list(given or names)
    index = {value: order.index(name) for value, name in zip(values, names, strict=True) if name in order}
    index = index or dict(enumerate(range(len(order))))  # integers without names of their own
    encoded = {}
    for where, part in parts.items():
        codes = part[label].astype(object).map(index)
        unknown = brief(*part[label][codes.isna()].unique())
        require(not unknown, f"{where} has the unknown labels {unknown} in {label!r}: expected {brief(*order)}")
        encoded[where] = part.assign(**{label: codes.astype(int)})
    return encoded, order
