"""Files of texts: what they hold, counted once, and any range of their rows.

Parquet files say how many rows they have. Files of lines are read once for that; what is noted is at which byte each
shard begins, so that any shard can be read without the ones before it.
"""

from __future__ import annotations

import csv
import glob
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from ..data.task import brief

KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv"}
PACKED = ".gz"  # behind one of these: files of lines, packed by gzip
FORMS: dict[str, dict[str, Any]] = {"csv": {"strict": True}, "tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}}
JSON_TYPES = {bool: "bool", int: "int", float: "float", str: "str", type(None): "null"}
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Source:
    """Describe a file as it was when the plan was made: size in bytes, time of its last change in ns, rows.

    starts: for files of lines, (row, byte) at which shards begin that do not begin with the file.
    """

    path: str
    kind: str
    size: int
    mtime: int
    rows: int
    starts: tuple[tuple[int, int], ...] = ()

    def check(self) -> None:
        """Raise ValueError if the file is not what it was."""
        try:
            now = os.stat(self.path)
        except OSError:
            raise ValueError(f"{self.path} is gone since the plan was made: restore it or start --fresh") from None
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime):
            raise ValueError(f"{self.path} has changed since the plan was made: restore it or start --fresh")


@dataclass
class Contents:
    """Collect what columns a file has and what they hold: Arrow types, or names of JSON types."""

    columns: list[str]
    types: dict[str, set] = field(default_factory=dict)


def find_files(data: Sequence[str], out: Path) -> list[str]:
    """Return the files that are named: files, patterns, and folders whose files are meant, each in the order of names.

    Raises:
        ValueError: nothing is there, a file is of an unknown kind or named twice, or lies where the result goes.
    """
    found: list[str] = []
    for name in map(os.path.expanduser, data):
        if os.path.isdir(name):
            known = sorted(p for p in Path(name).iterdir() if kind_of(p) and p.name[0] not in "._")
            files = [str(path) for path in known if path.is_file()]
        else:
            files = [name] if os.path.exists(name) else sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
        if not files:
            raise ValueError(f"{name}: no such file, expected {brief(*KINDS)}, a folder of such files or a pattern")
        found += files
    unknown = [name for name in found if not kind_of(name)]
    if unknown:
        raise ValueError(f"{unknown[0]} is of an unknown kind: expected one of {brief(*KINDS)}; lines also as .gz")
    real = [os.path.realpath(name) for name in found]
    twice = [name for i, name in enumerate(found) if real[i] in real[:i]]
    if twice:
        raise ValueError(f"{twice[0]} is named twice: its rows would be scored twice")
    inside = [name for name, path in zip(found, real, strict=True) if Path(path).parent == Path(os.path.realpath(out))]
    if inside:
        raise ValueError(f"{inside[0]} lies in {out}, where the result goes: choose another folder for the result")
    return found


def kind_of(path: str | Path) -> str:
    """Return the kind of a file, by its name; nothing for kinds that are not known."""
    path = Path(path)
    packed = path.suffix.lower() == PACKED
    kind = KINDS.get((path.with_suffix("") if packed else path).suffix.lower(), "")
    return "" if packed and kind == "parquet" else kind


def columns_of(path: str) -> list[str]:
    """Return the names of the columns; of a file of JSON those of its first row."""
    with readable(path):
        kind = kind_of(path)
        if os.path.getsize(path) == 0:
            raise ValueError("it is empty, 0 bytes")
        if kind == "parquet":
            return parquet.read_schema(path).names
        if kind == "jsonl":
            return [*next((row for _, row in objects(path)), {})]
        header = next((record for _, record in records(path, kind)), None)
        if header is None:
            raise ValueError("it has no header")
        return header


def scan(path: str, names: Sequence[str], before: int, every: int) -> tuple[Source, Contents]:
    """Count the rows of a file and look at the columns ``names``.

    Args:
        before: rows of the files before it.
        every: rows of a shard.

    Raises:
        ValueError: it cannot be read, or lacks a column.
    """
    columns, stat = columns_of(path), os.stat(path)
    kind, contents, starts = kind_of(path), Contents(columns), []
    with readable(path):
        if kind == "parquet":
            lacking(columns, names)
            about = parquet.ParquetFile(path)
            rows, schema = about.metadata.num_rows, about.schema_arrow
            contents.types = {name: {plain(schema.field(name).type)} for name in names}
        elif kind == "jsonl":
            contents.types, rows = {name: set() for name in names}, 0
            for place, row in objects(path):
                if rows and (before + rows) % every == 0:
                    starts.append((rows, place))
                rows += 1
                for name in names:
                    if name in row:
                        contents.types[name].add(json_type(row[name]))
            absent = [name for name in names if rows and not contents.types[name]]
            lacking([name for name in columns if name not in absent], absent)
        else:
            lacking(columns, names)
            contents.types, rows = {name: {pa.string()} for name in names}, 0
            for place, record in itertools.islice(records(path, kind), 1, None):
                if len(record) != len(columns):
                    raise ValueError(f"row {rows} (from 0) has {len(record)} fields, the header {len(columns)}")
                if rows and (before + rows) % every == 0:
                    starts.append((rows, place))
                rows += 1
    return Source(path, kind, stat.st_size, stat.st_mtime_ns, rows, tuple(starts)), contents


def lacking(columns: Sequence[str], names: Sequence[str]) -> None:
    """Raise ValueError for a column that is not there."""
    for name in names:
        if name not in columns:
            raise ValueError(f"it has no column {name!r}: its columns are {brief(*columns)}")


def read(source: Source, start: int, stop: int, text: Sequence[str], kept: pa.Schema) -> tuple[list[list], pa.Table]:
    """Return the texts (a list for each column of ``text``; what is no string is no text) and the kept columns of the
    rows [start, stop) of a file."""
    names = list(dict.fromkeys([*text, *kept.names]))
    with readable(source.path):
        if source.kind == "parquet":
            table = _read_parquet(source.path, start, stop, names)
            texts = [table[name].cast(plain(table.schema.field(name).type)).to_pylist() for name in text]
            columns = [table[field.name].cast(field.type) for field in kept]
        else:
            values = _read_lines(source, start, stop, names)
            texts = [values[name] for name in text]
            columns = [arrow(values[field.name], field.type) for field in kept]
    return texts, pa.table(columns, schema=kept)


def _read_parquet(path: str, start: int, stop: int, names: Sequence[str]) -> pa.Table:
    with parquet.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        ends = list(itertools.accumulate(sizes))
        groups = [i for i, end in enumerate(ends) if end > start and end - sizes[i] < stop]
        place, pieces = ends[groups[0]] - sizes[groups[0]] if groups else 0, []
        for batch in file.iter_batches(4096, groups, list(names)):
            low, high = max(start - place, 0), min(stop - place, len(batch))
            if low < high:
                pieces.append(batch.slice(low, high - low))
            place += len(batch)
        return pa.Table.from_batches(pieces, None if pieces else file.schema_arrow).select(list(names))


def _read_lines(source: Source, start: int, stop: int, names: Sequence[str]) -> dict[str, list]:
    """The values of the rows [start, stop); an empty field of a table is none."""
    first, place = max((s for s in source.starts if s[0] <= start), default=(0, 0))
    if source.kind == "jsonl":
        rows = (row for _, row in objects(source.path, place))
        chosen = list(itertools.islice(rows, start - first, stop - first))
        return {name: [row.get(name) for row in chosen] for name in names}
    header = next(record for _, record in records(source.path, source.kind))
    skip = start - first + (place == 0)  # the header
    wanted = itertools.islice(records(source.path, source.kind, place), skip, skip + stop - start)
    fields = [record for _, record in wanted]
    return {name: [line[header.index(name)] or None for line in fields] for name in names}


def objects(path: str, place: int = 0) -> Iterator[tuple[int, dict]]:
    """(byte, object) of each line of a file of JSON that is not blank, from a byte on."""
    for number, (start, _, line) in enumerate(lines(path, place), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is not JSON, one object a line ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} holds {line.strip()[:20]!r}, expected one object a line")
        yield start, row


def records(path: str, kind: str, place: int = 0) -> Iterator[tuple[int, list[str]]]:
    """(byte, fields) of each record of a table that is not blank, from a byte on, with the header if that is 0."""
    csv.field_size_limit(2**31 - 1)
    start = end = place

    def noted() -> Iterator[str]:
        nonlocal end
        for _, after, line in lines(path, place):
            end = after
            yield line

    reader = csv.reader(noted(), **FORMS[kind])
    try:
        for record in reader:
            if record:
                yield start, record
            start = end
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} is not {kind} ({error})") from None


def lines(path: str, place: int = 0) -> Iterator[tuple[int, int, str]]:
    """(first byte, byte after it, line) from a byte on, without the mark that some programs put at the top.

    Bytes are those of the unpacked file; what stands before is unpacked again.
    """
    with gzip.open(path) if Path(path).suffix.lower() == PACKED else open(path, "rb") as file:
        file.seek(place)
        for number, line in enumerate(file, 1):
            start, place = place, place + len(line)
            try:
                yield start, place, line.removeprefix(BOM if start == 0 else b"").decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} is not in UTF-8 ({error.reason} at its byte {error.start})") from None


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Name the file in whatever is wrong with it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} cannot be read: it is no whole gzip file ({error})") from None
    except (ValueError, pa.ArrowException) as error:
        line = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} cannot be read: {line}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None


def plain(kind: pa.DataType) -> pa.DataType:
    """The type of a column, where there are several for the same thing."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.string() if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else kind


def json_type(value: Any) -> str:
    """The name of a JSON type; a whole number that takes more than 64 bits is "other", as are lists and objects."""
    name = JSON_TYPES.get(type(value), "other")
    return "other" if name == "int" and not -(2**63) <= value < 2**63 else name


def of_json(types: set[str]) -> pa.DataType | None:
    """The Arrow type for values of such JSON types; of several kinds it is text, None where there are no values."""
    types = types - {"null"}
    if types == {"int", "float"}:
        return pa.float64()
    known = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "str": pa.string()}
    return None if not types else known.get(next(iter(types)), pa.string()) if len(types) == 1 else pa.string()


def arrow(values: list, kind: pa.DataType) -> pa.Array:
    """Values of JSON or of a table as a column; in a column of text, what is no text is written as JSON."""
    if kind == pa.string():
        values = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        if not all(v is None or is_text(v) for v in values):  # halves of characters, which JSON can hold
            values = [v if v is None else v.encode(errors="replace").decode() for v in values]
    return pa.array(values, kind)


def is_text(value: Any) -> bool:
    """Whether a value is a string of whole characters."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
