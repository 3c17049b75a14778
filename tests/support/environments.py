"""Environments of their own for packages that ask for other versions than Thresher."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest


def python_of(variable: str, name: str, packages: Iterable[str]) -> Path:
    """The python of the environment that ``variable`` names, else of ``thresher/NAME`` in the user's cache, which is
    made where it is missing; where that cannot be done the test is skipped."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get(variable) or cache / "thresher" / name)
    found, done = folder / "bin" / "python", folder / "complete"
    if not done.exists() and not os.environ.get(variable):
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        made = subprocess.run([found, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"{name} cannot be installed: {made.stderr.strip().splitlines()[-1:]}")
        done.touch()
    assert found.exists(), f"{folder} holds no environment: expected one with {', '.join(packages)}"
    return found
