"""One shard: read, score, write aside, rename. A file that bears the name of a shard is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from ..evaluation.rows import whole, writing
from .engine import Tally
from .inputs import read
from .plan import Plan
from .score import Scorer

KEY = b"thresher"  # of what a file says of itself


def make_shard(plan: Plan, shard: int, scorer: Scorer, out: Path, told: Callable[[int], Any] | None = None) -> Tally:
    """Score the rows of a shard and write its file, whole or not at all; ``told`` hears how many more are done.

    Columns: ``row`` (counted over all files, from 0), the kept ones, those of the scorer. The bytes depend on the plan
    and the machine alone.

    Raises:
        ValueError: a file has changed meanwhile, or an answer is no number.
        OSError: it cannot be written.
    """
    texts: list[list] = [[] for _ in plan.options["text"]]
    tables = []
    for source, start, stop in plan.pieces(shard):
        source.check()
        found, table = read(source, start, stop, plan.options["text"], plan.kept)
        source.check()
        for so_far, more in zip(texts, found, strict=True):
            so_far += more
        tables.append(table)
    start, stop = plan.span(shard)
    if len(texts[0]) != stop - start:
        raise ValueError(f"rows {start} to {stop} of the files are {len(texts[0])}: they changed, start --fresh")
    scores = scorer.score(texts, told)
    columns = {scorer.prefix + "row": pa.array(np.arange(start, stop))}
    kept = pa.concat_tables(tables)
    columns |= {name: kept[name] for name in kept.column_names}
    columns |= {name: column(values, scores.answered) for name, values in scores.columns.items()}
    about = {"plan": plan.identity, "shard": shard, "tally": asdict(scores.tally)}
    table = pa.table(columns).combine_chunks().replace_schema_metadata({KEY: json.dumps(about)})
    place = out / plan.name(shard)
    with writing(out), whole(place) as aside:
        parquet.write_table(table, aside, compression="zstd")
        settle(aside)
    settle(out)
    return scores.tally


def column(values: np.ndarray, answered: np.ndarray) -> pa.Array:
    """An Arrow column, null where there is no answer; of vectors, lists of fixed size."""
    if values.ndim > 1:
        numbers = pa.array(values.reshape(-1), pa.float32())
        return pa.FixedSizeListArray.from_arrays(numbers, values.shape[1], mask=pa.array(~answered))
    return pa.array(values, pa.string() if values.dtype == object else pa.float32(), mask=~answered)


def made(plan: Plan, shard: int, out: Path) -> Tally | None:
    """What a finished shard took; None where its file is not there, or not of this plan."""
    try:
        about: Mapping = json.loads((parquet.read_metadata(out / plan.name(shard)).metadata or {})[KEY])
        return Tally(**about["tally"]) if (about["plan"], about["shard"]) == (plan.identity, shard) else None
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None


def settle(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
