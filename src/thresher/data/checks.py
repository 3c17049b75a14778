"""What is wrong with the rows of a data set: counted, kept out of the train part, and told once each.

Two texts are the same if they differ only in blanks and case. A row that test has as well would let quality on test be
quality on train, so it leaves train; test never loses a row.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .task import brief, require

if TYPE_CHECKING:
    from pandas import DataFrame, Series

FEW = 10  # whole numbers up to so many are classes, also where they are written as floats


@dataclass
class Flaws:
    """Collect what was found: ``removed`` counts the rows that train lost by reason, ``notices`` holds sentences."""

    removed: dict[str, int] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def remove(self, train: DataFrame, flawed: Series, reason: str, sentence: str) -> DataFrame:
        """Return train without its flawed rows. Raises DataError where none is left."""
        count = int(flawed.sum())
        require(count < len(train), f"all {len(train)} rows of train {sentence}: nothing is left to train on")
        if count:
            self.removed[reason] = self.removed.get(reason, 0) + count
            self.notices.append(f"{count} of {len(train)} rows of train {sentence}; they are removed")
        return train[~flawed]

    def tell(self) -> None:
        """Warn of each flaw once."""
        for notice in self.notices:
            warnings.warn(notice, stacklevel=3)


def normalized(frame: DataFrame, columns: Sequence[str]) -> Series:
    """Return the text of each row in lower case, blanks as one; a pair in alphabetical order, as it may be swapped."""
    import pandas

    texts = zip(*([" ".join(str(text).casefold().split()) for text in frame[c]] for c in columns), strict=True)
    return pandas.Series(["\0".join(sorted(row)) for row in texts], frame.index, dtype=object)


def without_empty(parts: dict[str, DataFrame], columns: Sequence[str], flaws: Flaws) -> dict[str, DataFrame]:
    """Remove rows of train with a blank text, and tell of those of test."""
    for where, part in parts.items():
        blank = (part[[*columns]].apply(lambda texts: texts.str.strip()) == "").any(axis=1)
        if where == "train":
            parts = parts | {where: flaws.remove(part, blank, "empty", "have an empty text")}
        elif blank.any():
            flaws.notices.append(f"{int(blank.sum())} of {len(part)} rows of {where} have an empty text")
    return parts


def without_tested(train: DataFrame, tested: DataFrame, columns: Sequence[str], flaws: Flaws, where="test"):
    """Remove the rows of train whose text (pair, query, paragraph) in ``columns`` is in the part ``tested`` as well."""
    shared = normalized(train, columns).isin({*normalized(tested, columns)})
    what = f"have a {' and '.join(columns)} that {where} has as well (blanks and case aside)"
    return flaws.remove(train, shared, f"also in {where}", what)


def note_copies(where: str, part: DataFrame, columns: Sequence[str], flaws: Flaws) -> None:
    """Tell how many rows repeat the text of another row."""
    copies = int(normalized(part, columns).duplicated().sum())
    if copies:
        why = "all copies lie in one part, and each of them counts" if where == "train" else "each of them counts"
        flaws.notices.append(f"{copies} of {len(part)} rows of {where} repeat the text of another row: {why}")


def note_contradictions(parts: dict[str, DataFrame], columns: Sequence[str], label: str, flaws: Flaws) -> None:
    """Tell how many texts have more than one class."""
    import pandas

    texts = pandas.concat([normalized(part, columns) for part in parts.values()])
    classes = pandas.concat([part[label] for part in parts.values()])
    said = (texts != "").to_numpy()
    several = classes[said].groupby(texts[said].to_numpy()).nunique() > 1
    if several.any():
        example = several.index[several][0].replace("\0", " / ")[:60]
        what = f"{int(several.sum())} texts have more than one class in {label!r}, first {example!r}"
        flaws.notices.append(f"{what}: no model can be right on all of their rows")


def note_classes(parts: dict[str, DataFrame], label: str, names: Sequence[str], flaws: Flaws) -> None:
    """Tell of names that are nearly the same, of classes with one row, and of what train or test cannot show."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(" ".join(name.casefold().split()), []).append(name)
    for same in alike.values():
        if len(same) > 1:
            what = f"the classes {brief(*map(repr, same))} in {label!r} differ only in blanks or case"
            flaws.notices.append(f"{what} and are counted as {len(same)} classes: write them alike if they are one")
    counts = {where: part[label].value_counts() for where, part in parts.items()}
    total = sum(count.reindex(range(len(names)), fill_value=0) for count in counts.values())
    rare = [names[i] for i in total.index[total == 1]]
    if rare and "train" in counts:
        what = f"{len(rare)} classes of {label!r} have one row only ({brief(*rare)})"
        flaws.notices.append(f"{what}: they cannot be both learned and tested")
    unseen = [names[i] for i in sorted({*counts["test"].index} - {*counts.get("train", counts["test"]).index})]
    if unseen := [name for name in unseen if name not in rare]:
        flaws.notices.append(f"no row of train has the classes {brief(*unseen)} of test: nothing teaches them")
    if len(counts["test"]) == 1 and len(names) > 1:
        only = names[counts["test"].index[0]]
        flaws.notices.append(f"test has only the class {only!r} in {label!r}: its quality says little")
