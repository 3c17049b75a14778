"""The benchmark of prompts that shorten, at the size of a toy."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from support.decoders import save_decoder
from support.questions import fields


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "prompts", raising=False)  # a folder of tests has the same name
    import longcontext
    import prompts

    rows = [row | {"context": f"{row['context']} Nr {n}."} for n, row in enumerate(fields(40))]
    (tmp_path / "squad").mkdir()
    (tmp_path / "squad" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(prompts, "DATA", tmp_path / "squad" / "validation.parquet")
    monkeypatch.setattr(prompts, "TRAINED", 4)
    monkeypatch.setattr(longcontext, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(prompts, "RUNS", tmp_path / "runs")
    told = ["--model", str(save_decoder(tmp_path / "tiny")), "--precision", "fp32", "--out", str(tmp_path / "out")]

    def run(only: str, *more: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["prompts.py", "--only", only, *told, *more])
        assert prompts.main() == 0
        return json.loads((tmp_path / "out" / f"{only}.json").read_text())

    return run


def test_answers_are_counted_and_go_on_where_they_stopped(bench, tmp_path):
    first = bench("answers", "--prompts", "2", "--tokens", "300")
    assert {row["n_examples"] for row in first["rows"]} == {2} and len(first["prompts"]) == 2 * len(first["rows"])
    (file,) = (tmp_path / "runs").iterdir()
    lines = file.read_text().splitlines()
    file.write_text(lines[0] + "\n")
    assert bench("answers", "--prompts", "2", "--tokens", "300")["rows"][0]["n_examples"] == 2
    assert file.read_text().splitlines()[0] == lines[0], "the first text was not asked about again"
    full, *others = first["rows"]
    assert full["method"] == "full" and full["drop"] == 0 and full["precision"] == "fp32"
    short = [row for row in others if row["method"].startswith("gemfilter")]
    assert len(short) == 2 and all(row["tokens_out"] < row["tokens_in"] for row in short)


def test_times_are_of_all_ways_in_turn(bench):
    rows = bench("times", "--lengths", "280", "--minutes", "0.01")["rows"]
    assert len({row["method"] for row in rows}) == 5 and {row["length"] for row in rows} == {280}
    assert next(row for row in rows if row["method"] == "full")["times_full"] == 1
