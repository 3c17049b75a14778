"""The command ``score``: every row once, in its order, the same bytes however the run was interrupted."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from support.embedders import SIZE, save_embedder
from support.files import write
from support.tiny import save_tiny, tiny_model, tiny_tokenizer
from thresher import TopK
from thresher.cli import app as cli
from thresher.experiments.score import claimed, score
from thresher.serving import shards
from thresher.serving.plan import PLAN, REPORT, Plan
from thresher.serving.score import Scorer

WORDS = ["the", "farmer", "wheat", "chaff", "and", "grain", "script", "thresh"]
ROWS, EVERY = 60, 16  # four shards


def texts(count: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, draw.integers(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "topk", TopK(keep=0.6))


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "in" / "some.jsonl", [{"id": i, "text": text} for i, text in enumerate(texts(ROWS))])


def run(*arguments: object):
    return CliRunner().invoke(cli.app, ["score", *map(str, arguments)])


def fails(*arguments: object) -> str:
    """The one line that a mistake is answered with; nothing half-written is left."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert not result.stdout and len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")
    if "--out" in arguments:
        out = Path(str(arguments[arguments.index("--out") + 1]))
        assert not out.is_dir() or all(path.name[0] != "." for path in out.iterdir())
    return result.stderr


def content(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def scored(model, data, out, **options) -> dict:
    return score(model, data, out, shard_rows=EVERY, workers=1, **options)


# --- results ---------------------------------------------------------------------------------------------------------
def test_rows_keep_their_order_and_their_columns(model, data, tmp_path):
    out, report = tmp_path / "out", tmp_path / "report.json"
    result = run(
        model, "--data", data, "--out", out, "--keep", "id", "--shard-rows", EVERY, "--workers", 1, "--json", report
    )
    assert result.exit_code == 0, result.output
    assert f"the result is in {out}" in result.stderr and "padded / needed" in result.stdout
    names = [PLAN, REPORT, *(f"part-0000{i}.parquet" for i in range(4))]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    frame, expected = pd.read_parquet(out), Scorer(model)(texts(ROWS))  # the other files are passed by
    assert frame["row"].tolist() == frame["id"].tolist() == [*range(ROWS)]
    assert frame["label"].tolist() == expected["label"].tolist()
    assert np.abs(frame["probability_LABEL_1"] - expected["probability_LABEL_1"]).max() < 1e-6
    assert [len(parquet.read_table(out / name)) for name in names[2:]] == [16, 16, 16, 12]
    (told,) = json.loads(report.read_text())["rows"]
    assert (told["rows"], told["unread"], told["shards"], told["shards_made"]) == (ROWS, 0, 4, 4)
    assert told["flops_ratio"] > 1 and 1 <= told["padding_ratio"] < 2 and told["rows_per_second"] > 0
    fixed = json.loads((out / PLAN).read_text())
    assert fixed["files"][0]["rows"] == ROWS and fixed["columns"] == {"id": "int64"} and len(fixed["model"]) == 64


def test_files_of_several_kinds_as_a_shell_names_them(model, tmp_path):
    rows = [{"id": f"n{i}", "text": text} for i, text in enumerate(texts(50))]
    parts = [write(tmp_path / f"{name}", rows[a:b]) for name, a, b in (("b.csv", 0, 20), ("a.parquet", 20, 25))]
    parts.append(write(tmp_path / "c.jsonl", rows[25:]))
    options = ("--out", tmp_path / "out", "--keep", "id", "--shard-rows", 22, "--workers", 1, "--quiet")
    result = run(model, "--data", *parts, *options)
    assert result.exit_code == 0, result.output
    assert pd.read_parquet(tmp_path / "out")["id"].tolist() == [row["id"] for row in rows]
    whole = write(tmp_path / "whole.parquet", rows)
    again = scored(model, whole, tmp_path / "again", keep="id")
    assert again["rows"] == 50
    expected = pd.read_parquet(tmp_path / "again").drop(columns="row")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out").drop(columns="row"), expected, atol=1e-6)


def test_kept_columns_of_any_type(model, tmp_path):
    table = pa.table(
        {"text": texts(9), "at": pa.array(range(9), pa.timestamp("us")), "tags": [[str(i)] for i in range(9)]}
    )
    parquet.write_table(table, tmp_path / "some.parquet")
    scored(model, tmp_path / "some.parquet", tmp_path / "out", keep=("tags", "at"), best=True, prefix="m_")
    made = parquet.read_table(tmp_path / "out" / "part-00000.parquet")
    assert made.column_names == ["m_row", "tags", "at", "m_label", "m_probability"]
    assert made["at"].equals(table["at"]) and made["tags"].to_pylist() == table["tags"].to_pylist()


def test_rows_without_text_are_counted_and_null(model, tmp_path):
    rows = [{"text": value} for value in ("the wheat", None, 7, ["a"], "chaff")] + [{"other": 1}]
    data = write(tmp_path / "some.jsonl", rows)
    result = run(model, "--data", data, "--out", tmp_path / "out", "--workers", 1)
    assert result.exit_code == 0 and "4 of 6 rows have no text (null, or no string)" in result.stderr
    made = parquet.read_table(tmp_path / "out" / "part-00000.parquet")
    assert [value is None for value in made["label"].to_pylist()] == [False, True, True, True, False, True]
    assert made["probability"].null_count == 4 and made["row"].null_count == 0
    assert json.loads((tmp_path / "out" / REPORT).read_text())["unread"] == 4


def test_pairs_and_one_number(tmp_path):
    one = save_tiny(tmp_path / "one", num_labels=1)
    rows = [{"query": a, "passage": b} for a, b in zip(texts(9), texts(9, 1), strict=True)]
    scored(one, write(tmp_path / "some.csv", rows), tmp_path / "out")  # usual names
    made = pd.read_parquet(tmp_path / "out")
    expected = Scorer(one)([(row["query"], row["passage"]) for row in rows])["score"]
    assert list(made) == ["row", "score"] and np.abs(made["score"] - expected).max() < 1e-6


# --- once, and the same bytes ----------------------------------------------------------------------------------------
class Killed(BaseException):
    pass


def test_a_run_that_is_interrupted_at_any_step_ends_in_the_same_bytes(model, data, tmp_path, monkeypatch):
    scored(model, data, tmp_path / "undisturbed", keep="id")
    expected, steps, at = content(tmp_path / "undisturbed"), 0, None
    replace, fsync = os.replace, os.fsync

    def counting(do):
        def step(*arguments):
            nonlocal steps
            steps += 1
            if steps == at:
                raise Killed
            return do(*arguments)

        return step

    monkeypatch.setattr(os, "replace", counting(replace))
    monkeypatch.setattr(os, "fsync", counting(fsync))
    for stop in range(1, 40):
        out, steps, at = tmp_path / f"out{stop}", 0, stop
        try:
            scored(model, data, out, keep="id")
        except Killed:
            out.mkdir(exist_ok=True)
            for name in (".part-00001.parquet.99.tmp", "._plan.json.99.tmp") if not (out / REPORT).exists() else ():
                (out / name).write_bytes(b"half")  # as a process leaves it that is killed
            stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}
            at = None
            told = scored(model, data, out, keep="id")
            assert told["shards_made"] == 4 - len(stamps)
            assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
        else:
            break
        assert content(out) == expected
    assert stop == 3 * 6 + 1  # file, rename, folder: of four shards, the plan and the report


def test_a_finished_result_is_left_alone(model, data, tmp_path):
    scored(model, data, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    result = run(model, "--data", data, "--out", tmp_path / "out", "--shard-rows", EVERY)
    assert (
        result.exit_code == 0 and "nothing was scored" in result.stderr and "4 of 4 shards are there" in result.stderr
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_shard_that_was_spoiled_or_removed_is_made_again(model, data, tmp_path):
    out = tmp_path / "out"
    scored(model, data, out)
    before = content(out)
    (out / "part-00001.parquet").write_bytes(before["part-00001.parquet"][:-7])
    (out / "part-00002.parquet").write_bytes(before["part-00003.parquet"])
    (out / REPORT).unlink()
    assert scored(model, data, out)["shards_made"] == 2 and content(out) == before


def test_fresh_removes_what_was_there(model, data, tmp_path):
    out = tmp_path / "out"
    score(model, data, out, shard_rows=10, workers=1)
    assert scored(model, data, out, fresh=True)["shards_made"] == 4
    assert len([*out.glob("part-*")]) == 4
    before = content(out)
    assert scored(model, data, out, fresh=True)["shards_made"] == 4 and content(out) == before


def test_the_plan_survives_its_file(model, data, tmp_path):
    scored(model, data, tmp_path / "out", keep="id")
    text = (tmp_path / "out" / PLAN).read_text()
    plan = Plan.from_json(text)
    assert plan.to_json() == text and plan.shards == 4 and plan.span(3) == (48, 60)
    assert [(start, stop) for _, start, stop in plan.pieces(3)] == [(48, 60)]
    with pytest.raises(ValueError, match="no plan"):
        Plan.from_json("{}")


def test_a_plan_of_another_version_is_refused_and_nothing_is_mixed(model, data, tmp_path):
    """The same model and options may have given other numbers there."""
    out = tmp_path / "out"
    scored(model, data, out)
    (out / "part-00001.parquet").unlink()
    (out / REPORT).unlink()
    told = json.loads((out / PLAN).read_text())
    assert told["version"] == 2, "functions and prompts of cross-encoders came with it"
    (out / PLAN).write_text(json.dumps(told | {"version": 1}))
    before = content(out)
    with pytest.raises(ValueError, match=r"version 1 where this one expects 2.*another folder or start --fresh"):
        scored(model, data, out)
    assert content(out) == before
    scored(model, data, out, fresh=True)
    assert (out / "part-00001.parquet").exists() and json.loads((out / PLAN).read_text())["version"] == 2


# --- what is refused -------------------------------------------------------------------------------------------------
def test_what_a_resumed_run_refuses(model, data, tmp_path):
    out, other = tmp_path / "out", save_tiny(tmp_path / "other", TopK(keep=0.5))
    scored(model, data, out)
    before = content(out)
    call = ("--data", data, "--out", out, "--shard-rows", EVERY, "--workers", 1)
    assert "another model" in fails(other, *call)
    assert "shard_rows: 16 there, 8 asked" in fails(model, *call[:5], 8)
    assert "tokens: 8192 there, 99 asked" in fails(model, *call, "--tokens", 99)
    assert "keep: [] there, ['id'] asked" in fails(model, *call, "--keep", "id")
    more = write(tmp_path / "more.jsonl", [{"text": "the"}])
    assert "more.jsonl is new" in fails(model, *call, more)
    data.write_text(data.read_text().replace("wheat", "chaff"))
    assert "some.jsonl has changed since the plan was made" in fails(model, *call)
    data.unlink()
    assert "no such file" in fails(model, *call)
    assert content(out) == before


def test_a_plan_without_a_shard_binds_nobody(model, data, tmp_path):
    out = tmp_path / "out"
    scored(model, data, out)
    for path in out.glob("part-*"):
        path.unlink()
    assert score(model, data, out, shard_rows=50, workers=1)["shards"] == 2


def test_what_is_wrong_with_a_call_is_one_line_and_leaves_nothing(model, data, tmp_path):
    out = tmp_path / "out"
    call = ("--data", data, "--out", out, "--workers", 1)
    base = tmp_path / "base"
    tiny_model().base_model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    assert "no column 'body': its columns are id, text" in fails(model, *call, "--text", "body")
    assert "no column 'url'" in fails(model, *call, "--keep", "url")
    assert "holds int, expected text" in fails(model, *call, "--text", "id")
    assert "one column of text, or two" in fails(model, *call, "--text", "a,b,c")
    assert "name it with --text, of x, y" in fails(
        model, "--data", write(tmp_path / "xy.csv", [{"x": 1, "y": 2}]), "--out", out
    )
    assert "say --prefix model_" in fails(model, *call, "--keep", "label")
    assert "kept twice" in fails(model, *call, "--keep", "id,id")
    assert "BertModel: expected a classifier" in fails(base, *call)
    assert "nowhere" in fails(tmp_path / "nowhere", *call)
    assert "layout" in fails(model, *call, "--layout", "fast")
    assert "device='tpu' cannot be used" in fails(model, *call, "--device", "tpu")
    assert "name the model first" in fails(data, "--data", data, "--out", out)
    for name, said in (("nothing.jsonl", "0 bytes"), ("nothing.parquet", "0 bytes"), ("notes.txt", "unknown kind")):
        (tmp_path / name).touch()
        assert said in fails(model, "--data", tmp_path / name, "--out", out)
    (tmp_path / "header.csv").write_text("text\n")
    assert "no rows in" in fails(model, "--data", tmp_path / "header.csv", "--out", out)
    other = write(tmp_path / "other.csv", [{"id": "a", "text": "b"}])
    assert "'id' is int64 in" in fails(model, *call, other, "--keep", "id")
    assert not out.exists()


def test_actors_need_a_number_and_ray(model, data, tmp_path, monkeypatch):
    call = ("--data", data, "--out", tmp_path / "out", "--ray", "auto")
    assert "say how many actors there are to be (--workers N)" in fails(model, *call)
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    assert "pip install 'thresher-pruning[ray]'" in fails(model, *call, "--workers", 2)
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_take_the_result(model, data, tmp_path):
    call = ("--data", data, "--workers", 1)
    (tmp_path / "file").touch()
    assert "it is a file" in fails(model, *call, "--out", tmp_path / "file")
    assert "cannot write" in fails(model, *call, "--out", "/proc/scored")
    assert "is not empty and holds no _plan.json" in fails(model, *call, "--out", tmp_path)
    assert "is not empty" in fails(model, *call, "--out", data.parent)
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        assert "Permission denied" in fails(model, *call, "--out", tmp_path / "locked")


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(model, tmp_path):
    kept = "".join(np.random.default_rng(0).choice([*"abcdefgh"], 9000))
    data = write(tmp_path / "some.jsonl", [{"text": "the", "more": kept if i == 40 else ""} for i in range(ROWS)])
    call = (model, "--data", data, "--out", tmp_path / "out", "--shard-rows", EVERY, "--workers", 1, "--keep", "more")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # bytes of a file
    try:
        said = fails(*call)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write in" in said and "is the disk full?" in said
    assert [path.name for path in sorted((tmp_path / "out").glob("part*"))] == [
        "part-00000.parquet",
        "part-00001.parquet",
    ]
    assert run(*call).exit_code == 0 and len(pd.read_parquet(tmp_path / "out")) == ROWS


def test_a_file_that_changes_while_it_is_read(model, data, tmp_path, monkeypatch):
    def reading(source, *arguments):
        result = read(source, *arguments)
        os.utime(data)
        return result

    read = shards.read
    monkeypatch.setattr(shards, "read", reading)
    with pytest.raises(ValueError, match="has changed since"):
        scored(model, data, tmp_path / "out")
    assert not [*(tmp_path / "out").glob("*part*")]


def test_one_process_works_in_a_folder(tmp_path):
    with claimed(tmp_path / "out") as claim:
        claim()
        with claimed(tmp_path / "out") as other, pytest.raises(ValueError, match="another process is at work"):
            other()
    assert not (tmp_path / "out").exists()


def test_a_folder_remembers_its_column_and_its_length(model, tmp_path):
    folder = tmp_path / "trained"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "thresher.json").write_text(json.dumps({"task": {"text": ["body"], "max_length": 8}}))
    data = write(tmp_path / "some.csv", [{"text": "the", "body": "the " * 20}])
    result = run(folder, "--data", data, "--out", tmp_path / "out", "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "as trained: text body" in result.stderr and "1 of 1 texts were cut" in result.stderr


def test_vectors_are_lists_of_a_fixed_size(tmp_path):
    embedder = save_embedder(tmp_path / "embedder")
    rows = [{"text": "the wheat"}, {"text": None}, {"text": "grain and chaff"}]
    for name, given in (("some", rows), ("none", rows[1:2])):
        score(embedder, write(tmp_path / f"{name}.jsonl", given), tmp_path / name, workers=1)
    made = parquet.read_table(tmp_path / "some" / "part-00000.parquet")
    assert made.schema.field("embedding").type == pa.list_(pa.float32(), SIZE)
    got, expected = made["embedding"].to_pylist(), Scorer(embedder)(["the wheat", "grain and chaff"])["embedding"]
    assert got[1] is None and np.abs(np.array([got[0], got[2]]) - expected).max() < 1e-6
    none = parquet.read_table(tmp_path / "none" / "part-00000.parquet")
    assert none["embedding"].null_count == 1 and none.schema == made.schema
    frame = Scorer(embedder)(pd.DataFrame(rows))
    assert (
        np.abs(np.stack(frame["embedding"][[0, 2]]) - expected).max() < 1e-6 and np.isnan(frame["embedding"][1]).all()
    )
