"""Options that several commands of the command line share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option


def listed(kind: Callable) -> Callable[[str], tuple]:
    """A reader of values with commas between them."""
    return lambda value: tuple(kind(part) for part in value.split(","))


# A list of values has a parser, and no type that typer would know.
Model = Annotated[str, Argument(metavar="MODEL", help="A folder, or the name of a model on the hub.")]
Data = Annotated[str, Option(metavar="PATH|ID", help="A csv, tsv, json, jsonl or parquet file, a folder, a hub id.")]
Config = Annotated[str | None, Option(metavar="NAME", help="Configuration of a hub data set: sst2 of glue.")]
Columns = Annotated[Any, Option(parser=listed(str.strip), metavar="A[,B]", help="Text columns, if unusual.")]
Label = Annotated[str | None, Option(metavar="NAME", help="Label column, if unusual.")]
Metric = Annotated[
    str | None, Option(metavar="NAME", help="accuracy, f1, matthews, pearson, map, mrr; default: what fits.")
]
BatchSize = Annotated[int, Option(min=1, metavar="N", help="Texts in a batch.")]
MaxLength = Annotated[int, Option(min=3, metavar="N", help="Tokens of a text; the rest is cut.")]
Limit = Annotated[int | None, Option(min=1, metavar="N", help="Use that many rows only.")]
Threads = Annotated[int | None, Option(min=1, metavar="N", help="Threads of the processor.")]
Layout = Annotated[str, Option(metavar="NAME", help="auto, mask, padded or packed.")]
Json = Annotated[Path | None, Option("--json", metavar="FILE", help="Write the result there; - prints only it.")]
Quiet = Annotated[bool, Option("--quiet", "-q", help="No progress and no notices.")]
Verbose = Annotated[bool, Option("--verbose", "-v", help="Let transformers and datasets say all they have to say.")]
