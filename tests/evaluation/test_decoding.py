"""What a decoder costs: rows say what is held, and in how many bytes."""

from __future__ import annotations

import pytest
import torch

from support.decoders import build, make
from thresher.core.method import pruner_of
from thresher.evaluation.decoding import FULL, STATUS, measure_decoding, peak_memory

ENTRY = 2 * 2 * 8 * 4  # bytes of an entry of a layer: keys and values, heads, channels, fp32


def test_rows_of_each_method_and_length():
    model, told = build("llama"), []
    methods = {"snapkv": make("snapkv", "share"), "h2o": make("h2o", "hold")}
    rows = measure_decoding(
        model, methods, (20, 40), new=5, repeats=2, fields={"model": "tiny"}, progress=lambda *s: told.append(s)
    )
    assert pruner_of(model) is None
    assert len(told) == 2 * 3 * 3 and told[-1][1:] == (17, 18)
    assert [(r["context"], r["method"], r["mode"]) for r in rows] == [
        (n, name, mode) for n in (20, 40) for name, mode in ((FULL, "dense"), ("snapkv", "pruned"), ("h2o", "pruned"))
    ]
    for row in rows:
        read = row["context"] + 5
        held = {FULL: read, "snapkv": row["context"] * 0.3 + 5}.get(row["method"], row["held"])
        assert row["held"] == pytest.approx(held)
        assert row["cache_mb"] == pytest.approx(3 * held * ENTRY / 1e6)
        assert row["cache_mb_full"] == pytest.approx(3 * read * ENTRY / 1e6)
        assert row["model"] == "tiny" and row["repeats"] == 2 and row["precision"] == "fp32"
        assert row["prefill_ms"] > 0 and 0 < row["latency_ms_p50"] <= row["latency_ms_p95"]
        assert (row["scoring_ms"] > 0) == (row["method"] != FULL)
        assert row["peak_memory_mb"] is None or row["peak_memory_mb"] > 10
    assert rows[1]["keep"] == 0.3 and rows[2]["hold"] == 12 and 12 <= rows[2]["held"] < 15
    assert rows[0]["speedup_unpadded"] == 1


@pytest.mark.skipif(not STATUS.exists(), reason="only Linux tells the peak of a process")
def test_peaks_are_those_of_the_context():
    with peak_memory(torch.device("cpu")) as small:
        torch.zeros(1000).add_(1)
    with peak_memory(torch.device("cpu")) as large:
        torch.zeros(50_000_000).add_(1)
    with peak_memory(torch.device("cpu")) as after:
        torch.zeros(1000).add_(1)
    assert large() - small() > 150e6
    assert large() - after() > 150e6
