"""Decoders: timed, asked about long texts, shown."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from support.decoders import save_decoder
from support.questions import fields
from support.tiny import save_tiny
from thresher import SnapKV, TopK
from thresher.experiments.bench import bench
from thresher.experiments.compare import compare
from thresher.experiments.decoders import ANSWERS, CLAIM, TABLE, answered
from thresher.experiments.show import followed_texts
from thresher.reports.prompts import bench_table, comparison_table, terminal


def drawn(thing, width: int = 160) -> str:
    screen = Console(width=width, record=True, file=StringIO())
    screen.print(thing)
    return screen.export_text()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("decoders")
    rows = fields(30)
    data = folder / "fields.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pruned = save_decoder(folder / "pruned", SnapKV(keep=0.3, sinks=2, recent=4))
    return SimpleNamespace(dense=str(save_decoder(folder / "dense")), pruned=str(pruned), data=str(data), folder=folder)


# --- bench ------------------------------------------------------------------------------------------------------------
def test_bench_times_named_methods_and_the_folders_own(saved):
    named = bench(saved.dense, method="snapkv,keydiff", keep=40, contexts=(64, 80), repeats=1)
    assert [(r["context"], r["method"], r["held"]) for r in named] == [
        (n, name, held) for n in (64, 80) for name, held in (("full", n + 32), ("snapkv", 72), ("keydiff", 72))
    ]
    own = bench(saved.pruned, contexts=(60,), repeats=1)
    assert [(r["method"], r.get("keep")) for r in own] == [("full", None), ("snapkv", 0.3)]
    text = drawn(bench_table([*named, *own], 200))
    assert all(word in text for word in ("ms/token", "keydiff", "keep 40", "prefill", "peak"))


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("dense", {}, "name methods and a budget"),
        ("dense", {"keep": 0.5}, "name it"),
        ("dense", {"method": "topk", "keep": 0.5}, "prunes tokens"),
        ("dense", {"method": "snapkv", "keep": 0.5, "runtime": ("onnx",)}, "timed in torch alone"),
        ("dense", {"method": "snapkv", "keep": 0.5, "precision": ("bf16",)}, "leave precision out"),
        ("dense", {"method": "snapkv", "keep": 0.5, "batch_size": (4,)}, "leave batch_size out"),
        ("dense", {"method": "snapkv", "keep": 0.5, "metric": "f1"}, "leave metric out"),
        ("dense", {"method": "snapkv", "keep": 0.5, "contexts": (1,)}, "2 tokens or more"),
        ("dense", {"method": "snap", "keep": 0.5}, "unknown pruning method"),
        ("dense", {"method": "ltp-cache", "keep": 0.5}, "has to learn .* in Python"),
        ("dense", {"method": "snapkv,triattention", "keep": 0.5}, "triattention has to learn .* in Python"),
    ],
)
def test_bench_refuses(saved, model, options, said):
    with pytest.raises(ValueError, match=said):
        bench(getattr(saved, model), repeats=1, **options)


# --- compare ----------------------------------------------------------------------------------------------------------
def test_compare_asks_over_every_cache_and_resumes(saved, tmp_path):
    out, how = tmp_path / "out", {"methods": ("snapkv", "kvzip"), "targets": (0.5, 0.3), "tasks": ("needle", "squad")}
    first = compare(saved.dense, saved.data, out, limit=2, max_length=400, **how)
    kept = (out / ANSWERS).read_text().splitlines()
    rows = compare(saved.dense, saved.data, out, limit=3, max_length=400, **how)
    assert (out / ANSWERS).read_text().splitlines()[:2] == kept and (out / TABLE).exists()
    assert {r["n_examples"] for r in first} == {2} and {r["n_examples"] for r in rows} == {3}
    groups = {(r["task"], r["when"], r["keep"], r["method"]) for r in rows}
    names = {"snapkv", "random-cache", "streamingllm"}
    assert groups == {(t, w, 1.0, "full") for t in ("needle", "squad") for w in ("after", "before")} | {
        (t, w, k, name)
        for t in ("needle", "squad")
        for w in ("after", "before")
        for k in (0.5, 0.3)
        for name in names | ({"kvzip"} if w == "after" else set())
    }
    for r in rows:
        assert r["metric"] == ("qa_f1" if r["task"] == "squad" else "accuracy")
        assert r["cache_mb"] / r["cache_mb_full"] == pytest.approx(r["held"] / r["tokens_mean"])
        assert r["held"] == pytest.approx(r["tokens_mean"] * r["keep"], abs=1)
    assert "random-cache" in drawn(comparison_table(rows, 160))
    with pytest.raises(ValueError, match="of other targets"):
        compare(saved.dense, saved.data, out, limit=2, max_length=400, **how | {"targets": (0.5,)})
    data = Path(saved.data)
    known = data.read_bytes()
    data.write_bytes(b"".join(known.splitlines(keepends=True)[:-1]))
    try:
        with pytest.raises(ValueError, match="of other inputs"):
            compare(saved.dense, saved.data, out, limit=2, max_length=400, **how)
    finally:
        data.write_bytes(known)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ("haystack",)}, "no task 'haystack'"),
        ({"when": ("later",)}, "expected after or before"),
        ({"methods": ("topk",)}, "prunes tokens"),
        ({"targets": (1.5,)}, "expected a share"),
        ({"methods": ("ltp-cache",)}, r"ltp-cache has to learn .* in Python .*token_pruner.learn"),
        ({"methods": ("triattention",)}, r"triattention has to learn .* in Python .*token_pruner.calibrate"),
        ({"seeds": (0, 1)}, r"seeds=\(0, 1\)"),
        ({"seeds": ()}, r"seeds=\(\)"),
        ({"untrained": True}, "leave untrained out"),
        ({"epochs": 0}, "leave epochs out"),
        ({"prune_epochs": 3}, "leave prune_epochs out"),
        ({"lr": 5e-5}, "leave lr out"),
        ({"at": (1,)}, "leave at out"),
        ({"batch_size": 32}, "leave batch_size out"),
        ({"dropout": 0.0}, "leave dropout out"),
        ({"time": False}, "neither trained nor timed: leave time out"),
        ({"label": "text"}, "leave label out"),
        ({"metric": "accuracy"}, "leave metric out"),
        ({"repeats": 1}, "leave repeats out"),
    ],
)
def test_compare_refuses(saved, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        compare(saved.dense, saved.data, tmp_path / "out", limit=1, max_length=300, **options)
    with pytest.raises(ValueError, match="pruned already"):
        compare(saved.pruned, saved.data, tmp_path / "other", limit=1)


def test_answers_about_other_parts_are_not_mixed(saved, tmp_path):
    data = tmp_path / "fields"
    data.mkdir()
    for part in ("train", "validation", "test"):
        (data / f"{part}.jsonl").write_text(
            "".join(json.dumps({"text": f"{part} {n}. It rains."}) + "\n" for n in range(9))
        )
    out, how = tmp_path / "out", {"methods": ("snapkv",), "targets": (0.5,), "when": ("after",), "limit": 1}
    compare(saved.dense, str(data), out, max_length=60, **how)
    kept = (out / ANSWERS).read_text()
    for split in ("test_split", "train_split"):
        with pytest.raises(ValueError, match=f"of other {split}"):
            compare(saved.dense, str(data), out, max_length=60, **{split: "validation"}, **how)
    claim = json.loads((out / CLAIM).read_text())
    assert claim["test_split"] is None is claim["train_split"]
    del claim["test_split"], claim["train_split"]  # of a version before
    (out / CLAIM).write_text(json.dumps(claim))
    compare(saved.dense, str(data), out, max_length=60, **how)
    assert (out / ANSWERS).read_text() == kept


# --- show -------------------------------------------------------------------------------------------------------------
def test_show_tells_which_tokens_are_held(saved, tmp_path):
    text = "The farmer sows. The wheat grows, and then it is reaped."
    (own,) = followed_texts(saved.pruned, texts=[text])
    (named,) = followed_texts(saved.dense, texts=[text], method="streamingllm", keep=10, html=tmp_path / "page.html")
    kept = -(-len(text) * 3 // 10)
    assert len(own.tokens) == len(text) and [*own.held] == [0, 1, 2]
    assert all(sum(layer) == kept and layer[0] == layer[-1] == 1 for layer in own.held.values())
    assert [n for n, share in enumerate(named.shares) if share] == [*range(4), *range(len(text) - 6, len(text))]
    assert "".join(string for string, _ in own.pieces()) == text
    assert "10 of 56 entries" in drawn(terminal(named)) and "layer  2" in drawn(terminal(named, (100, 30)))
    assert "held by 100%" in (tmp_path / "page.html").read_text()
    with pytest.raises(ValueError, match="not pruned by one method"):
        followed_texts(saved.dense, texts=[text])
    with pytest.raises(ValueError, match="one by one: leave pair out"):
        followed_texts(saved.pruned, texts=[text], pair="wheat")


def test_a_method_of_a_cache_is_refused_where_there_is_none(tmp_path):
    folder = save_tiny(tmp_path / "encoder", TopK(keep=0.5))
    for given in ({"method": "snapkv", "keep": 0.5}, {"keep": 0.5}, {"hold": 64}):
        with pytest.raises(ValueError, match="is no decoder"):
            followed_texts(folder, texts=["wheat"], **given)


def test_an_answer_that_was_written_in_part_is_asked_for_again(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('[{"number": 0}]\n[{"number": 1}, {"num')
    assert answered(file) == [{"number": 0}]
    assert file.read_text() == '[{"number": 0}]\n', "what is added stands on a line of its own"
    file.write_text('[{"number"\n[{"number": 1}]\n')
    with pytest.raises(ValueError, match=r"answers\.jsonl holds a line that is no list of answers"):
        answered(file)
