"""Files beside the weights of a model, in a folder or on the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.utils import cached_file


def reading(read: Callable, model: str, **options):
    """Call ``read(model, ...)``. Raises ValueError of one line for whatever is wrong with the folder or the hub."""
    try:
        return read(model, **options)
    except SafetensorError as error:
        raise ValueError(f"corrupted checkpoint: the weights in {model} cannot be read ({error})") from error
    except Exception as error:  # of many kinds: a file that was spoiled fails wherever it is used first
        if isinstance(error, ImportError):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        line = "its weights do not fit its config.json" if "ignore_mismatched_sizes" in line else line
        raise ValueError(f"{model!r} cannot be loaded, expected a model folder or a hub id: {line}") from error


def digest_of(folder: Path, files: Iterable[Path]) -> str:
    """Return a digest of ``files`` in a folder: their names and what they hold."""
    told = hashlib.sha256()
    for path in files:
        told.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                told.update(piece)
    return told.hexdigest()


def find_file(model: str, name: str) -> Path | None:
    """Return where a file of a folder, or of the hub, lies; None where there is none."""
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = Path(model) / name if Path(model).is_dir() else reading(cached_file, model, filename=name, **options)
    return Path(found) if found is not None and Path(found).is_file() else None


def read_json(model: str, name: str) -> Any:
    """Return what a file of a folder, or of the hub, holds; None where there is none. Raises ValueError."""
    found = find_file(model, name)
    try:
        return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{found} cannot be read: {error}") from None
