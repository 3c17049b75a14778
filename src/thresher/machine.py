"""What this machine is and can do; the circumstances that every measurement states."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version

import torch

VERSIONS = ("torch", "transformers", "thresher")


def has_bf16() -> bool:
    """Whether bf16 autocast pays: on GPUs that have it and on CPUs with AMX (elsewhere it is slower than fp32)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def keep_memory() -> bool:
    """Let the process keep the memory of large tensors that are freed; returns whether its C library (glibc) can.

    By default glibc gives blocks of more than 32 MB back to the system, whose pages are fetched and zeroed anew for
    every tensor: a third of the time of a training step on a CPU. What the process holds stays at its peak.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt, trim, in_maps, never = ctypes.CDLL(None).mallopt, -1, -3, -1  # as unsigned: the largest size there is
    return bool(mallopt(trim, never) and mallopt(in_maps, never))


def hardware() -> str:
    """Processor and cores, and the GPU if there is one."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    name = f"{name}, {os.cpu_count()} cores{', AMX' if not torch.cuda.is_available() and has_bf16() else ''}"
    return f"{name}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name


def command() -> str:
    """The command line; of absolute paths, what lies below the folder where it was called, else their last part."""
    here = os.getcwd() + os.sep

    def local(word: str) -> str:
        option, equals, path = word.rpartition("=")
        if not os.path.isabs(path):
            return word
        return (
            option
            + equals
            + (path.removeprefix(here) if path.startswith(here) else os.path.basename(path.rstrip(os.sep)))
        )

    return shlex.join([os.path.basename(sys.argv[0]), *map(local, sys.argv[1:])])


def environment() -> dict[str, str]:
    """hardware, versions, command and date of a row."""
    known = [f"python {platform.python_version()}"]
    for name in VERSIONS:
        try:
            known.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"hardware": hardware(), "versions": ", ".join(known), "command": command(), "date": date}
