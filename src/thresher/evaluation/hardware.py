"""What this machine is and can do; the circumstances that every measurement states."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

import torch
import transformers

from ..core.compat import instructions
from .rows import whole

Measured = TypeVar("Measured")


def has_bf16() -> bool:
    """Whether bf16 autocast pays: on GPUs that have it and on CPUs with AMX or AVX-512 BF16 (elsewhere it is slower
    than fp32)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool({"AMX", "AVX-512 BF16"} & {*instructions()})


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch compute with ``count`` threads within the context (None: with as many as now), then with as many as
    before. Raises ValueError: ``count`` is below 1."""
    before = torch.get_num_threads()
    if count is not None and count < 1:
        raise ValueError(f"threads={count}: at least one is needed")
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def hardware() -> str:
    """Processor, cores and what it has for bf16 and int8; or the GPU if there is one."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    beside = [torch.cuda.get_device_name()] if torch.cuda.is_available() else instructions()
    return ", ".join([name, f"{os.cpu_count()} cores", *beside])


def command() -> str:
    """The command line; of absolute paths, what lies below the folder where it was called, else their last part."""
    here = os.getcwd() + os.sep

    def local(word: str) -> str:
        option, equals, path = word.rpartition("=")
        if os.path.isabs(path) and not path.startswith(here):
            path = os.path.basename(path.rstrip(os.sep))
        return option + equals + path.removeprefix(here)

    return shlex.join([os.path.basename(sys.argv[0]), *map(local, sys.argv[1:])])


def environment() -> dict[str, str]:
    """hardware, versions, command and date of a row."""
    from .. import __version__

    known = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    known += [f"transformers {transformers.__version__}", f"thresher {__version__}"]
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"hardware": hardware(), "versions": ", ".join(known), "command": command(), "date": date}


def cache_folder() -> Path:
    """Where is kept what would take long to measure again: ``$THRESHER_CACHE`` or ~/.cache/thresher."""
    return Path(os.environ.get("THRESHER_CACHE") or Path.home() / ".cache" / "thresher")


def remembered(
    kind: str,
    about: list,
    read: Callable[[dict], Measured],
    measure: Callable[[], Measured],
    cache: str | Path | None = None,
) -> Measured:
    """What was measured before, or is measured now and remembered where a file can be written.

    Args:
        kind: what it is; begins the name of the file.
        about: all that the measurement hangs on, for JSON.
        read: makes it from its fields; an error in it, as of a broken file, measures anew.
        measure: returns a dataclass.
        cache: folder, default ``$THRESHER_CACHE`` or ~/.cache/thresher.
    """
    folder = Path(cache or cache_folder())
    file = folder / f"{kind}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        return read(json.loads(file.read_text(encoding="utf-8")))
    measured = measure()
    with suppress(OSError), whole(file) as aside:
        aside.write_text(json.dumps(vars(measured)), encoding="utf-8")
    return measured
