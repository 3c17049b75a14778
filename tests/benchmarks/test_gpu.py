"""The script for GPUs is ready when one is at hand: on a CPU it runs small, checks first, and lands what it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import thresher


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import gpu

    yield gpu
    sys.modules.pop("gpu")


@pytest.fixture
def run(gpu, tmp_path):
    return gpu.Run(torch.device("cpu"), tmp_path / "gpu.json", tiny=True, repeats=2, warm=1)


def test_removing_is_masking_before_anything_is_timed(gpu, run):
    said = gpu.equality(run)
    assert said["wrong"] == [] and len(said) == 6


def test_answers_that_differ_are_named(gpu, run, monkeypatch):
    whole = thresher.prune

    def other(net, method, layout, **how):  # as if packed rows kept other tokens than masked ones
        return whole(net, thresher.FirstK(keep=0.2, at=(0,)) if layout == "packed" else method, layout=layout, **how)

    monkeypatch.setattr(thresher, "prune", other)
    wrong = gpu.equality(run)["wrong"]
    assert "tiny 2x packed over mask" in wrong and "tiny 2x padded over mask" not in wrong


def test_a_section_that_fails_is_written_down_and_the_others_go_on(gpu, run):
    gpu.section(run, "attention", lambda: 1 / 0)
    gpu.section(run, "machine", lambda: gpu.machine(run))
    rows = gpu.section(run, "forwards", lambda: gpu.forwards(run))
    found = json.loads(run.out.read_text())
    assert found["attention"] == {"failed": "ZeroDivisionError: division by zero"} and found["rows"] == rows
    dense = [row for row in rows if row["method"] == "dense" and row["batch_size"] == 4]
    assert len(dense) == 3 and max(row["speedup_unpadded"] for row in dense) == 1
    assert all(row["flops_ratio"] > 1.2 for row in rows if row["method"] != "dense")


def test_the_ways_to_attend_that_are_timed_agree(gpu, run):
    said = gpu.attention(run)["tiny"]
    assert said["differences"]["padded"] < 1e-6 and said["rows"] == 4
