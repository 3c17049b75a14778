"""What the machine's C library does with freed memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from thresher.machine import keep_memory

def faults(n=64 << 20):
    for _ in range(3):
        torch.ones(n // 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(n // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_memory(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_large_tensors_keep_their_pages():
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=plain)
    before, can, after = run.stdout.split()
    assert can == "True" and int(after) < 64 < int(before)
