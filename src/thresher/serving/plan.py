"""The plan of a scoring: files, model and options, fixed in a file before the first shard is made."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from transformers.utils import cached_file

from ..data.files import digest_of
from ..data.labels import TEXTS
from ..data.task import brief
from .inputs import Contents, Source, columns_of, find_files, of_json, scan

PLAN, REPORT = "_plan.json", "_report.json"  # readers of a folder of parquet files pass names with _ by
VERSION = 2  # of plans whose results agree: another one where the same model and options give other numbers
BESIDE = (".md", ".txt", ".html", ".png", ".log")  # files in a model's folder that do not decide its answers


@dataclass(frozen=True)
class Plan:
    """Fix what is scored, by which model and how.

    Attributes:
        model: digest of the files of the model.
        options: what else decides the result: text, keep, tokens, max_length, layout, threads, ...
        sources: the files, in their order.
        kept: the columns that are handed on.
    """

    model: str
    options: dict[str, Any]
    sources: tuple[Source, ...]
    kept: pa.Schema

    @cached_property
    def rows(self) -> int:
        """The rows of all files."""
        return sum(source.rows for source in self.sources)

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.rows // self.options["shard_rows"])

    @cached_property
    def identity(self) -> str:
        """A digest of what decides the bytes of the result: paths and dates do not."""
        files = [(source.kind, source.size, source.rows) for source in self.sources]
        told = [VERSION, self.model, self.options, files, str(self.kept)]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def name(self, shard: int) -> str:
        """The file of a shard."""
        return f"part-{shard:0{max(5, len(str(self.shards - 1)))}d}.parquet"

    def span(self, shard: int) -> tuple[int, int]:
        """The rows [start, stop) of a shard, counted over all files."""
        every = self.options["shard_rows"]
        return shard * every, min((shard + 1) * every, self.rows)

    def pieces(self, shard: int) -> list[tuple[Source, int, int]]:
        """The files that a shard reads, and the rows [start, stop) of each."""
        (first, last), before, pieces = self.span(shard), 0, []
        for source in self.sources:
            start, stop = max(first - before, 0), min(last - before, source.rows)
            if start < stop:
                pieces.append((source, start, stop))
            before += source.rows
        return pieces

    def to_json(self) -> str:
        """The plan as a text."""
        told = {
            "version": VERSION,
            "model": self.model,
            "options": self.options,
            "rows": self.rows,
            "shards": self.shards,
            "columns": {field.name: str(field.type) for field in self.kept},
            "schema": base64.b64encode(self.kept.serialize().to_pybytes()).decode(),
            "files": [asdict(source) for source in self.sources],
        }
        return json.dumps(told, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what ``to_json`` wrote. Raises ValueError for anything else."""
        try:
            told = json.loads(text)
            if told["version"] != VERSION:
                raise ValueError(
                    f"another thresher made it, version {told['version']} where this one expects {VERSION}"
                )
            kept = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(told["schema"])))
            files = [entry | {"starts": tuple(map(tuple, entry["starts"]))} for entry in told["files"]]
            return cls(told["model"], told["options"], tuple(Source(**entry) for entry in files), kept)
        except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise ValueError(f"no plan to go on with ({error}): choose another folder or start --fresh") from None


def make_plan(data: Sequence[str], out: Path, model: str, options: dict[str, Any]) -> Plan:
    """Look at all files, which reads those of lines once, and fix what is scored.

    ``options["text"]`` None stands for columns with a usual name.

    Raises:
        ValueError: a file cannot be read or lacks a column, files do not agree in a column, there are no rows.
    """
    files = find_files(data, out)
    text = options["text"] or usual_text(files[0])
    names = list(dict.fromkeys([*text, *options["keep"]]))
    sources: list[Source] = []
    contents: list[Contents] = []
    for path in files:
        before = sum(source.rows for source in sources)
        source, found = scan(path, names, before, options["shard_rows"])
        sources.append(source)
        contents.append(found)
    if not any(source.rows for source in sources):
        raise ValueError(f"no rows in {brief(*files)}: expected one text or more")
    for column in text:
        check_text(column, sources, contents)
    kept = pa.schema([(column, kept_type(column, sources, contents)) for column in options["keep"]])
    return Plan(model, options | {"text": list(text), "keep": list(options["keep"])}, tuple(sources), kept)


def usual_text(path: str) -> list[str]:
    """The columns of text that have a usual name, one or two."""
    columns = columns_of(path)
    found = next((names.split() for names in TEXTS.split(", ") if {*names.split()} <= {*columns}), None)
    if found is None:
        raise ValueError(f"{path} has no column of text with a usual name: name it with --text, of {brief(*columns)}")
    return found


def check_text(column: str, sources: Sequence[Source], contents: Sequence[Contents]) -> None:
    """Raise ValueError for a file in which a column can hold no text."""
    for source, found in zip(sources, contents, strict=True):
        types = found.types[column]
        if types and types.isdisjoint({pa.string(), pa.null(), "str"}) and types != {"null"}:
            held = "/".join(sorted(map(str, types)))
            raise ValueError(f"{source.path}: the column {column!r} holds {held}, expected text: name another (--text)")


def kept_type(column: str, sources: Sequence[Source], contents: Sequence[Contents]) -> pa.DataType:
    """The type of a column that is handed on, which all files must agree in."""
    json_types = {kind for found in contents for kind in found.types[column] if isinstance(kind, str)}
    seen: dict[pa.DataType, str] = {}
    for source, found in zip(sources, contents, strict=True):
        types = {of_json(json_types) if isinstance(kind, str) else kind for kind in found.types[column]}
        for kind in types - {None, pa.null()}:
            seen.setdefault(kind, source.path)
    if len(seen) > 1:
        (one, its), (other, others) = [*seen.items()][:2]
        raise ValueError(
            f"the column {column!r} is {one} in {its} and {other} in {others}: write them alike, or do not keep it"
        )
    return next(iter(seen), pa.string())


def files_digest(model: str) -> str:
    """A digest of the files of a model, pruned, dense or exported: its weights, configuration and tokenizer.

    Raises:
        ValueError: there is no such model.
    """
    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(str(cached_file(model, "config.json"))).parent
        except (OSError, ValueError) as error:
            line = str(error).strip().splitlines()[0]
            raise ValueError(f"{model!r} cannot be loaded, expected a model folder or a hub id: {line}") from None
    found = sorted([*folder.iterdir(), *folder.glob("[0-9]*_*/*")])  # and the modules of sentence-transformers
    own = (path for path in found if path.is_file() and not path.name.startswith("."))
    return digest_of(folder, (path for path in own if path.suffix.lower() not in BESIDE))


def differences(here: Plan, model: str, options: dict[str, Any]) -> list[str]:
    """What a call asks otherwise than a plan; a column of text that it leaves open is the plan's."""
    found = [] if here.model == model else ["another model"]
    for name, value in options.items():
        value = list(value) if isinstance(value, tuple) else value
        if here.options.get(name) != value and not (name == "text" and value is None):
            found.append(f"{name}: {here.options.get(name)!r} there, {value!r} asked")
    return found


def same_files(here: Plan, data: Sequence[str], out: Path) -> None:
    """Raise ValueError where other files are named than in a plan, or they have changed."""
    named, known = [*map(os.path.abspath, find_files(data, out))], [source.path for source in here.sources]
    if named != [*map(os.path.abspath, known)]:
        new = [path for path in named if path not in {*map(os.path.abspath, known)}]
        which = f"{brief(*new)} is new" if new else f"{len(known)} files there, {len(named)} asked"
        raise ValueError(f"{out} was planned for other files ({which}): choose another folder or start --fresh")
    for source in here.sources:
        source.check()
