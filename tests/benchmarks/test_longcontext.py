"""The benchmark of long texts, at the size of a toy."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from support.decoders import save_decoder
from support.questions import fields


@pytest.fixture
def bench(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import longcontext

    small = {"HELD": 40, "EVERY": 4, "BLOCK": 100, "WINDOWS": 2, "TAIL": 5}
    for name, value in {**small, "CHUNK": 32, "RUNS": tmp_path / "runs", "RESULTS": tmp_path / "results"}.items():
        monkeypatch.setattr(longcontext, name, value)
    rows = fields(40)
    (tmp_path / "squad").mkdir()
    (tmp_path / "squad" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("THRESHER_DATA", str(tmp_path))
    model = str(save_decoder(tmp_path / "tiny"))
    common = {
        "model": model,
        "precision": "fp32",
        "length": 300,
        "count": 2,
        "tasks": "needle,squad",
        "keys": 3,
        "digits": 3,
        "when": "after,before",
    }
    options = Namespace(
        **common,
        ask=None,
        kvzip=False,
        methods=None,
        method="keydiff",
        entries=(64, 128),
        tokens=300,
        minutes=9.0,
        results=None,
    )

    def run(step: str, **more) -> list[dict]:
        longcontext.STEPS[step](Namespace(**vars(options) | more))
        found = tmp_path / "results" / "longcontext" / f"tiny-{'quality' if step == 'rows' else step}.json"
        return json.loads(found.read_text())["rows"] if found.exists() else []

    return run


def test_qualities_land_with_their_intervals(bench):
    bench("quality")
    bench("quality", kvzip=True, ask="needle")
    rows = bench("rows")
    methods = {(row["method"], row["keep"]) for row in rows}
    assert len(methods) == 1 + 2 * 9 + 2 * 3 and {row["n_examples"] for row in rows} == {2}
    assert {row["task"] for row in rows if row["method"] == "kvzip"} == {"needle"}
    bench("quality", methods="snapkv,tova", digits=4)
    more = bench("rows")
    assert {row["method"] for row in more if row["digits"] == 4} == {"full", "snapkv", "tova"}
    assert [row for row in more if row["digits"] == 3] == rows or len(more) > len(rows)
    snapkv = next(row for row in rows if row["method"] == "snapkv" and row["keep"] == 0.5)
    assert {*snapkv["gains"]} == {f"{name}@{keep}" for name in ("random-cache", "streamingllm") for keep in (0.5, 0.2)}


def runs(tmp_path) -> dict[str, int]:
    """Files of results, and how many texts each has."""
    return {file.name: len(file.read_text().splitlines()) for file in (tmp_path / "runs").iterdir()}


def test_a_file_resumes_only_what_has_the_same_prompts_and_options(bench, tmp_path, monkeypatch):
    few = {"methods": "snapkv", "tasks": "multikey", "when": "before"}
    bench("quality", **few, count=1)
    (first,) = runs(tmp_path)
    bench("quality", **few, count=2)
    assert runs(tmp_path) == {first: 2}, "more texts go on in the same file"
    for other in ({"methods": "tova"}, {"keys": 2}, {"when": "after"}, {"length": 200}, {"digits": 2}):
        bench("quality", **few | other, count=1)
    assert sorted(runs(tmp_path).values()) == [1, 1, 1, 1, 1, 2]

    import longcontext
    from thresher import SnapKV
    from thresher.data.longcontext import Book

    with monkeypatch.context() as changed:
        changed.setitem(longcontext.METHODS, "snapkv", lambda keep: SnapKV(keep=keep, kernel=3))
        bench("quality", **few, count=1)
    with monkeypatch.context() as changed:
        changed.setattr(Book, "filler", lambda self, rng, tokens, first=(): self.passages[:3])
        bench("quality", **few, count=1)
    assert sorted(runs(tmp_path).values()) == [1] * 7 + [2], "other options and another filler have files of their own"
    rows = [row for row in bench("rows") if (row["length"], row["digits"], row["when"]) == (300, 3, "before")]
    assert {(row["keys"], row["n_examples"]) for row in rows} >= {(3, 2), (2, 1)}
    assert {row["n_examples"] for row in rows if row["method"] == "snapkv"} == {1}, "the last options, of one text"


def test_rows_of_fewer_examples_do_not_take_the_place_of_others(bench, tmp_path):
    asked = {"methods": "snapkv", "tasks": "needle", "when": "before"}
    bench("quality", **asked, count=2)
    assert {row["n_examples"] for row in bench("rows")} == {2}
    (file,) = (tmp_path / "runs").iterdir()
    file.write_text(file.read_text().splitlines()[0] + "\n")
    assert {row["n_examples"] for row in bench("rows")} == {2}
    bench("quality", **asked, count=3)
    assert {row["n_examples"] for row in bench("rows")} == {3}


def test_steps_and_prompts_are_timed(bench, capsys):
    rows = bench("time")
    assert {(row["context"], row["method"]) for row in rows} >= {(64, "full"), (128, "full"), (128, "tova")}
    for row in rows:
        assert row["bytes"] == row["held"] * 3 * 2 * 2 * 8 * 4 and row["ms_per_token"] > row["ms_scoring"]
        assert row["held"] == (row["context"] if row["method"] == "full" else 40)
    bench("prefill")
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 40 * 384 <= said["bytes"] < 44 * 384 and said["peak_memory_mb"] >= said["start_mb"] > 0


def test_a_text_without_end_is_read_in_the_same_bytes(bench):
    assert [row.get("tokens") for row in bench("endless", minutes=0.0)] == [100, None], "no time but for one block"
    *blocks, anew = bench("endless")
    assert [row["tokens"] for row in blocks] == [100, 200, 300]
    assert len({row["bytes"] for row in blocks}) == 1 and blocks[0]["bytes"] < 44 * 384 + 1
    assert anew["nll"] > 0 and anew["nll_streamed_there"] > 0
