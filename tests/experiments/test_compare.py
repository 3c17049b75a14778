"""Several methods under one protocol: the groups, the runs, the table, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from support.toy import OPTIONS, make_toy, write
from thresher.cli import app as cli
from thresher.cli.compare import followed
from thresher.evaluation.rows import read_rows, row
from thresher.experiments import train as jobs
from thresher.experiments.compare import BASELINES, Run, compare
from thresher.reports.plots import leaderboard, pareto
from thresher.reports.tables import comparison
from thresher.stats.bootstrap import pooled_interval
from thresher.stats.metrics import compute_metric

SMALL = {name: OPTIONS[name] for name in ("batch_size", "max_length", "bf16")} | {"epochs": 0, "untrained": True}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> SimpleNamespace:
    """A data set, and a model that was trained on it."""
    toy = make_toy(tmp_path_factory.mktemp("toy"))
    out = tmp_path_factory.mktemp("dense") / "out"
    options = {name: v for name, v in OPTIONS.items() if name != "target_flops"} | {"prune_epochs": 0}
    jobs.train(toy.model, toy.data, str(out), **options | {"method": "dense"})
    toy.model = str(out)
    return toy


@pytest.fixture(scope="module")
def compared(toy, tmp_path_factory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("compared") / "out"
    told: list[tuple] = []
    options = {"methods": ("topk", "tome"), "targets": (0.5,), "seeds": (0, 1), "repeats": 1} | SMALL
    rows = compare(toy.model, toy.data, out, progress=lambda runs: told.append(tuple(r.state for r in runs)), **options)
    return SimpleNamespace(out=out, rows=rows, told=told, options=options)


def printed(shown) -> str:
    """What a console writes, on lines that are long enough."""
    out = io.StringIO()
    Console(width=200, file=out).print(shown)
    return out.getvalue()


# --- the comparison --------------------------------------------------------------------------------------------------
def test_rows_are_those_of_the_runs(toy, compared):
    modes = {(r["method"], r["mode"], r["batch_size"]) for r in compared.rows}
    timed = [("dense", "dense-padded"), ("dense", "dense-unpadded"), *((m, "pruned") for m in ("topk", *BASELINES))]
    assert modes == {(*who, size) for who in timed for size in (1, 32)} | {("tome", "pruned", None)}
    texts = (Path(toy.data) / "test.csv").read_text().splitlines()[1:]
    labels = [{"chaff": 0, "wheat": 1}[line.rsplit(",", 1)[1]] for line in texts]
    for r in compared.rows:
        if r["mode"] != "pruned" or r["method"] == "tome":
            continue
        summaries = [json.loads((compared.out / f"{r['method']}-0.5-s{s}" / jobs.SUMMARY).read_text()) for s in (0, 1)]
        own, dense = ([s["predictions"][of] for s in summaries] for of in ("pruned", "dense"))
        assert r["quality"] == pytest.approx(np.mean([compute_metric("accuracy", a, labels) for a in own]))
        low, high = pooled_interval("accuracy", [(labels, a, b) for a, b in zip(dense, own, strict=True)])
        assert (r["interval_low"], r["interval_high"]) == pytest.approx((low, high))
        assert (r["seeds"], r["seed"], r["target_flops"], r["trained_steps"]) == ([0, 1], None, 0.5, 0)
        assert r["flops_ratio"] == pytest.approx(2, rel=0.15) and r["latency_ms_p50"] > 0 and r["group"]
        assert summaries[0]["reached"]["flops_fraction"] == pytest.approx(0.5, rel=0.03)
    order = [r["quality"] for r in compared.rows if r["mode"] == "pruned" and r["batch_size"] == 1]
    assert order == sorted(order, reverse=True)
    assert compared.told[0] == ("running", *["waiting"] * 9) and set(compared.told[-1]) == {"done", "failed"}


def test_a_run_that_fails_is_noted_and_stops_no_other(compared):
    (failed,) = (r for r in compared.rows if r["method"] == "tome")
    assert failed["quality"] is None and "group" not in failed
    assert failed["note"].startswith("failed with seed 0, 1: target_flops=0.5 cannot be reached at=[0, 1]")
    text = printed(comparison(compared.rows, 120))
    assert "tome, 0.5: failed with seed 0, 1: target_flops=0.5 cannot be reached" in text
    assert len([line for line in text.splitlines() if " firstk " in line]) == 1, "both batch sizes on one line"
    for width in (60, 80, 100, 120, 160):
        narrow = printed(comparison(compared.rows, width))
        assert max(len(line.rstrip()) for line in narrow.splitlines()) <= width and "…" not in narrow


def test_files_hold_the_rows(compared):
    with open(compared.out / "compare.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == [r["method"] for r in compared.rows]
    for line, r in zip(lines, compared.rows, strict=True):
        assert line["quality"] == ("" if r["quality"] is None else f"{r['quality']:.6g}") or float(
            line["quality"]
        ) == pytest.approx(r["quality"], rel=1e-5)
        assert json.loads(line["seeds"] or "[]") == r.get("seeds", [])
    assert (compared.out / "compare.png").read_bytes().startswith(b"\x89PNG")
    page = (compared.out / "compare.html").read_text(encoding="utf-8")
    methods = {r["method"] for r in compared.rows if r["mode"] == "pruned"}
    assert all(f'class="first">{method}</th>' in page for method in methods) and 'class="point"' in page


def test_the_same_call_trains_nothing_and_more_may_be_asked(toy, compared, monkeypatch):
    trained = []
    run = jobs.load_data
    monkeypatch.setattr(jobs, "load_data", lambda spec: trained.append(spec.out.name) or run(spec))
    rows = compare(toy.model, toy.data, compared.out, time=False, **compared.options)
    assert set(trained) == {"tome-0.5-s0", "tome-0.5-s1"}, "what failed is tried again"
    known = {r["method"]: r["quality"] for r in compared.rows}
    assert {r["method"]: r["quality"] for r in rows} == known and not any(r["latency_ms_p50"] for r in rows)
    trained.clear()
    options = compared.options | {"methods": ("vatp",), "seeds": (0,)}
    rows = compare(toy.model, toy.data, compared.out, time=False, **options)
    assert trained == ["vatp-0.5-s0"] and {r["method"] for r in rows} == {"dense", "vatp", *BASELINES}
    with pytest.raises(ValueError, match=r"belongs to another comparison \(batch_size: 16 there, 8 asked\)"):
        compare(toy.model, toy.data, compared.out, **compared.options | {"batch_size": 8})


def test_methods_are_trained_from_one_teacher_by_seed(toy, tmp_path):
    options = {name: v for name, v in SMALL.items() if name != "untrained"} | {"lr": 4e-3, "limit": 48}
    rows = compare(
        toy.model, toy.data, tmp_path, methods=("ltp",), targets=(0.6,), time=False, prune_epochs=1, **options
    )
    assert {r["trained_steps"] for r in rows if r["mode"] == "pruned"} == {3}
    recipes = [json.loads((tmp_path / f"{m}-0.6-s0" / jobs.SUMMARY).read_text())["recipe"] for m in ("ltp", *BASELINES)]
    assert {r["dense_model"] for r in recipes} == {str(tmp_path / "dense-s0")}
    assert len({json.dumps({k: v for k, v in r.items() if k != "method"}, sort_keys=True) for r in recipes}) == 1


# --- mistakes --------------------------------------------------------------------------------------------------------
MISTAKES = {
    "method": (lambda t: {"methods": ("nope",)}, "unknown pruning method 'nope'; those with a budget: .*topk"),
    "no budget": (
        lambda t: {"methods": ("threshold",)},
        "threshold has no target_flops to compare at; those that have",
    ),
    "untrained": (lambda t: {"methods": ("top",)}, "method top meets no budget untrained; those that do: .*ltp"),
    "zero": (lambda t: {"targets": (0.5, 0.0)}, r"target 0\.0: expected a share of the dense MACs in \(0, 1\]"),
    "above one": (lambda t: {"targets": (1.5,)}, r"target 1\.5: expected a share"),
    "no target": (lambda t: {"targets": ()}, "nothing to compare: name one target and one seed"),
    "no labels": (lambda t: {"data": str(unlabelled(t))}, "label"),
    "taken": (lambda t: {"out": taken(t)}, r"is not empty and holds no compare\.json"),
    "no model": (lambda t: {"model": str(t / "none")}, "cannot be loaded"),
}


def unlabelled(folder: Path) -> Path:
    lines = write(folder / "texts.csv", 40, 0).read_text().splitlines()
    (folder / "texts.csv").write_text("\n".join(line.rsplit(",", 1)[0] for line in lines))
    return folder / "texts.csv"


def taken(folder: Path) -> Path:
    (folder / "taken").mkdir()
    (folder / "taken" / "thesis.txt").write_text("years of work")
    return folder / "taken"


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_anything_runs(toy, tmp_path, mistake):
    change, message = MISTAKES[mistake]
    options = {"model": toy.model, "data": toy.data, "out": tmp_path / "out", **SMALL, **change(tmp_path)}
    with pytest.raises(ValueError, match=message):
        compare(**options)
    assert not list(tmp_path.glob("*/*/config.json"))
    if mistake == "taken":
        assert [f.name for f in (tmp_path / "taken").iterdir()] == ["thesis.txt"]
    if mistake == "no model":  # a slip in the call does not take the folder
        rows = compare(**options | {"model": toy.model, "methods": ("topk",), "targets": (0.6,), "time": False})
        assert len(rows) == 4


# --- the benchmarks' leaderboards -------------------------------------------------------------------------------------
def test_leaderboards_are_apart_from_the_other_tables(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import tables
    from entries import BOARD, ENTRIES, board_speed

    dense = {e.seed: e for e in ENTRIES if e.task == "mrpc" and e.method == "dense"}
    chosen = [e for e in ENTRIES if e.task == "mrpc" and e.target == BOARD and e.method in ("tofu", "topk", "ats")]
    results, labels = tmp_path / "results", np.ones(300, int)
    shares = {"dense": 0.9, "topk": 0.85, "tofu": 0.84, "ats": 0.5}
    for entry in (*dense.values(), *chosen):
        if entry.kind != "train" or (entry.method, entry.seed, entry.variant) == ("ats", 2, ""):
            continue  # one has not been run yet
        draws = (np.random.default_rng(s).random(300) for s in (entry.seed + 7 * len(entry.method), entry.seed + 35))
        said, dense_said = (
            (draw < shares[name]).astype(int) for draw, name in zip(draws, (entry.method, "dense"), strict=True)
        )
        told = {"metric": "accuracy", "quality": 100 * said.mean(), "flops_ratio": 2.0, "quality_dense": 90.0}
        answers = {"dense": dense_said.tolist(), "pruned": said.tolist()}
        result = {"rows": [told], "labels": labels.tolist(), "predictions": answers}
        file = results / f"{entry.name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result | {"reached": {"flops_fraction": BOARD}}))
    timed = {"mode": "pruned", "speedup_padded": 2.5, "repeats": 5, "threads": 1, "hardware": "one", "spread": 0.07}
    timed = [
        timed | {"method": "topk", "batch_size": size, "speedup_unpadded": up} for size, up in ((1, 0.9), (32, 1.5))
    ]
    (results / f"{board_speed('mrpc').name}.json").write_text(json.dumps({"rows": timed}))
    tables.write(results, tmp_path / "docs" / "results.md")
    before, *boards = (tmp_path / "docs" / "results.md").read_text().split("## Not run yet")[0].split("Every method at")
    assert "| dense | 0, 1, 2 |" in before and "tofu" not in before and len(boards) == 2
    trained, untrained = ([line.split(" | ") for line in one.splitlines() if "[+" in line] for one in boards)
    assert {line[0]: line[1:3] for line in trained}["| ats"] == ["b", "0, 1"]
    assert {line[0] for line in trained} >= {"| topk", "| tofu"} and {line[2] for line in untrained} == {"0"}
    assert [line[0] for line in untrained][-1] == "| ats"
    assert {line[0]: line[6:] for line in trained}["| topk"] == ["1.50, 2.50", "0.90, 2.50 |"]
    assert {len(line) for line in trained} == {8} and {len(line) for line in untrained} == {6}
    for kind in ("trained", "untrained"):
        assert f"(img/board-mrpc-{kind}.svg)" in (tmp_path / "docs" / "results.md").read_text()
        assert b"tofu" in (tmp_path / "docs" / "img" / f"board-mrpc-{kind}.svg").read_bytes()


# --- figures and the command line ------------------------------------------------------------------------------------
def test_figures_need_something_to_draw(tmp_path, compared, monkeypatch):
    for draw in (pareto, leaderboard):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw([row(mode="dense-unpadded")], tmp_path / "none.png")
    one, two = tmp_path / "one.svg", tmp_path / "two.svg"
    for file in (one, two):
        leaderboard([r for r in compared.rows if r["batch_size"] == 1], file, "farm")
    assert one.read_bytes() == two.read_bytes() and b"firstk" in one.read_bytes() and one.stat().st_size < 20_000
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="needs matplotlib"):
        pareto(compared.rows, tmp_path / "none.png")


def test_the_command(toy, tmp_path):
    options = "--epochs 0 --untrained --methods topk --targets 0.5 --seeds 0 --no-time --batch-size 16 --max-length 32"
    words = ["compare", toy.model, "--data", toy.data, *options.split(), "--no-bf16", "--out"]
    result = CliRunner().invoke(cli.app, [*words, str(tmp_path / "new"), "--json", str(tmp_path / "rows.json")])
    assert result.exit_code == 0, result.output
    assert "topk-0.5-s0: " in result.stderr and "times fewer FLOPs" in result.stderr and "group" in result.stdout
    assert [r["method"] for r in read_rows(tmp_path / "rows.json")][:1] == ["dense"]
    for bad, said in (("--targets=2", "target 2.0: expected a share"), ("--methods=nope", "unknown pruning method")):
        result = CliRunner().invoke(cli.app, [*words, str(tmp_path / "bad"), bad])
        assert result.exit_code == 2 and said in result.stderr.splitlines()[-1]
        assert not (tmp_path / "bad").exists()


def test_progress_is_a_table_of_seeds():
    runs = [Run("dense", None, 0, "done", {"quality": 90.0, "metric": "accuracy", "flops_ratio": 1.0})]
    runs += [Run("ltp", 0.5, 0, "running"), Run("ltp", 0.5, 1, "failed", reason="out of reach\nand more")]
    lines = [line.split() for line in printed(followed(runs)).splitlines() if line.strip()]
    assert lines[0] == ["method", "target", "seed", "0", "seed", "1"]
    assert (
        lines[2][:3] == ["dense", "90.00", "accuracy,"] and " ".join(lines[3]) == "ltp 0.5 running failed, out of reach"
    )
