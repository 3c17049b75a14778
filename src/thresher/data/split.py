"""Which rows are train, validation and test. Copies of one text are never in two parts that are cut here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .checks import normalized
from .labels import unlabelled
from .read import PARTS
from .task import brief, require

if TYPE_CHECKING:
    from pandas import DataFrame


def choose_parts(parts: dict, train: str | None, test: str | None, label: str | None) -> dict[str, DataFrame]:
    """Return the parts to be train and test, under these names; one of them may be missing."""
    for part in filter(None, (train, test)):
        require(PARTS.get(part, part) in parts, f"there is no part {part!r}: the parts are {brief(*parts)}")
    train, test = (None if part is None else PARTS.get(part, part) for part in (train, test))
    train = train or "train"
    if test is None:
        hidden = label and {"test", "validation"} <= {*parts} and unlabelled(parts["test"], label, "fi").all()
        test = "validation" if hidden or "test" not in parts else "test"
    wanted = {"train": train if train != test else None, "test": test}
    chosen = {where: parts[part] for where, part in wanted.items() if part in parts}
    require(chosen, f"the parts are {brief(*parts)}: expected train, validation or test; name yours")
    return chosen


def hold_out(
    frame: DataFrame, columns: Sequence[str], label: str | None, one_in: int = 10, most: int | None = None
) -> tuple[DataFrame, DataFrame]:
    """Return what is left, and the rows of one text in ``one_in`` (1 to ``most`` texts), stratified by label.

    The texts held out are every n-th one of a random order that is sorted by label.
    """
    require(len(frame) > 1, "train has one row: expected at least two, to hold one out")
    texts = normalized(frame, columns)
    first = ~texts.duplicated().to_numpy()
    count = int(first.sum())
    require(count > 1, f"all {len(frame)} rows have one text in {brief(*columns)}: name the column of texts")
    held = max(1, min(count // one_in, most or count))
    order = np.random.RandomState(0).permutation(count)  # numpy never changes this stream
    if label:
        order = order[np.argsort(frame[label].to_numpy()[first][order], kind="stable")]
    chosen = texts[first].iloc[order[(np.arange(held) * 2 + 1) * count // (held * 2)]]
    mask = texts.isin({*chosen})
    return frame[~mask], frame[mask]


def hold_out_groups(frame: DataFrame, column: str, share: float) -> tuple[DataFrame, DataFrame]:
    """Return what is left, and groups of rows, equal in ``column``, of about a ``share`` of all rows, one at least."""
    groups = normalized(frame, [column])
    names = [*groups[frame[column].sort_values().index].unique()]
    require(len(names) > 1, f"all {len(frame)} rows are on one {column}: expected two, to hold one out")
    counts, held, rows = Counter(groups), set(), 0
    for i in np.random.RandomState(0).permutation(len(names))[:-1]:
        if rows < share * len(frame):
            held.add(names[i])
            rows += counts[names[i]]
    mask = groups.isin(held)
    return frame[~mask], frame[mask]
