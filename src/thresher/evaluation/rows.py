"""Rows of measurements: the one form in which they are written.

A row is a dictionary with every name in ``ROW_FIELDS``; what was not measured is None.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

ROW_FIELDS = tuple(
    """task model method target_flops seed runtime precision mode layout batch_size threads metric quality
    quality_dense flops_ratio flops_ratio_padded latency_ms_p50 latency_ms_p95 samples_per_second speedup_unpadded
    speedup_padded speedup_reference efficiency peak_memory_mb split selected_on max_length n_examples tokens_mean
    trained_steps hardware versions command date""".split()  # noqa: SIM905
)
EXTRA_FIELDS = {  # what a row may hold besides
    "spread": "interquartile range of the total time over the repeats, relative to its median",
    "interval_low": "lower end of the 95 % interval of the drop (quality_dense - quality), points",
    "interval_high": "upper end of it",
    "flops_used": "MACs over the n_examples",
    "flops_dense": "MACs of the dense model on them without padding",
    "flops_ratio_timed": "flops_ratio on the timed examples only",
    "floor_ms": "least ms of a call on this machine, by its peak and its memory (median over the calls)",
    "memory_start_mb": "resident memory of a process after its first hundred calls; peak_memory_mb after the last",
    "slower": "the other ways to run this dense model, and how many times longer they took",
    "n_timed": "examples whose time was taken",
    "repeats": "times each of them ran",
    "tried": "configurations tried before this one was chosen",
    "recipe": "how the model was trained",
    "seeds": "training seeds, where the quality is their mean",
    "group": "letters; methods of a task and target that share one cannot be told apart",
    "keep": "share or number of the prompt's entries that a cache method keeps",
    "hold": "entries to which it returns while decoding",
    "when": "whether the question is read after entries have left the cache, or before",
    "context": "tokens of a prompt",
    "held": "entries of each layer and head that are held, mean",
    "cache_mb": "megabytes of keys and values that are held",
    "cache_mb_full": "megabytes of those of everything that was read",
    "prefill_ms": "milliseconds of reading the prompt",
    "tower_ms": "milliseconds from a picture to what the language model gets",
    "visual": "tokens of pictures that enter each layer of the language model",
    "visual_mean": "their mean over the layers",
    "scoring_ms": "of these or of a step, milliseconds spent on scores and choices",
    "note": "anything else",
}


def row(**values: Any) -> dict:
    """A row with all of ``ROW_FIELDS`` in their order, None where no value is given, then the extra ones given.

    Raises:
        ValueError: a name is in neither ``ROW_FIELDS`` nor ``EXTRA_FIELDS``.
    """
    unknown = [name for name in values if name not in ROW_FIELDS and name not in EXTRA_FIELDS]
    if unknown:
        raise ValueError(f"unknown row fields {', '.join(unknown)}; extra ones may be {', '.join(EXTRA_FIELDS)}")
    extra = {name: values[name] for name in EXTRA_FIELDS if name in values}
    return {name: values.get(name) for name in ROW_FIELDS} | extra


def write_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """Write ``{"rows": [...]}``, whole or not at all. Floats get 6 digits; NaN and infinity become null.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full; an older file is then what it was.
    """
    text = json.dumps({"rows": [_plain(row(**r)) for r in rows]}, indent=1, ensure_ascii=False, allow_nan=False)
    with whole(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a file, as ``row`` makes them. Raises ValueError where it holds something else."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
        return [row(**r) for r in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'{path} does not hold {{"rows": [...]}} of measurements: {error}') from None


def write_csv(path: str | Path, rows: Iterable[dict]) -> None:
    """Write the rows as a table with a header, as ``write_rows`` does; what is no number or text is JSON."""
    rows = [_plain(row(**r)) for r in rows]
    names = [*ROW_FIELDS, *(name for name in EXTRA_FIELDS if any(name in r for r in rows))]
    with whole(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for r in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, (dict, list)) else v for k, v in r.items()})


def _plain(value: Any) -> Any:
    """The value as JSON has it."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    value = value.item() if hasattr(value, "item") else value  # numbers of numpy and torch
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


@contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary file in the folder of ``path``, moved there at the end or removed if anything went wrong."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_written_whole(folder: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``folder``, moved there at the end or removed if anything went wrong.

    An empty folder gives way to it; with ``replace`` one that holds something, too.

    Raises:
        OSError: it cannot be written, or what is there is not empty.
    """
    folder = Path(folder)
    temporary, before = _beside(folder), _beside(folder, "before")
    with writing(folder.parent):
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # of a process of the same number
            temporary.mkdir(parents=True)
            yield temporary
            if folder.exists() and not replace:
                folder.rmdir()
            if folder.exists():
                os.replace(folder, before)
            try:
                os.replace(temporary, folder)
            except BaseException:
                if before.exists():
                    os.replace(before, folder)
                raise
            shutil.rmtree(before, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path, kind: str = "tmp") -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Say where writing failed: libraries name neither the file nor, in torch.save, the reason."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        named = isinstance(error, OSError) and error.filename is not None
        if named or (isinstance(error, RuntimeError) and "inline_container" not in str(error)):
            raise
        raise OSError(f"cannot write in {folder}, is the disk full? ({str(error).splitlines()[0]})") from error
