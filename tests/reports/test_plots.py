"""Figures: what they need, that they are written whole, and that the same rows are the same file."""

import sys

import pytest

from support.rows import rows
from thresher.core.pareto import pareto_front
from thresher.evaluation.rows import row
from thresher.reports import plots
from thresher.reports.style import drawing

HISTORY = [
    {"epoch": 0.5, "loss": 0.4, "flops_fraction": 0.9, "cost_target": 0.8, "cost_expected": 0.85, "cost_hard": 0.9},
    {"epoch": 1.0, "eval_quality": 90.0, "eval_flops_fraction": 0.8, "eval_kept_0": 0.7},
    {"epoch": 1.5, "loss": 0.3, "flops_fraction": 0.5},
    {"epoch": 2.0, "eval_quality": 88.0, "eval_flops_fraction": 0.5, "eval_kept_0": 0.5},
]
SCHEDULE = {"latency_ms": None, "disagreement": 0.1, "tested": None, "bound": None, "chosen": False}
SCHEDULES = [
    SCHEDULE | {"flops_fraction": 0.9, "divergence": 0.01},
    SCHEDULE | {"flops_fraction": 0.5, "divergence": 0.2, "chosen": True, "tested": 0.1, "bound": 0.2},
    SCHEDULE | {"flops_fraction": 0.6, "divergence": 0.3},
]


def is_png(file) -> bool:
    return file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000


def test_the_front_is_what_nothing_beats():
    points = [(1, 5), (2, 4), (3, 4.5), (2.5, 1), (3, 2)]
    assert pareto_front(points, lambda p: -p[0], lambda p: -p[1]) == [(3, 4.5), (1, 5)]
    assert pareto_front([(1, 2), (1, 2), (2, 2), (3, 1)], lambda p: p[0], lambda p: p[1]) == [(1, 2), (3, 1)]


def test_times_and_quality(tmp_path):
    file = tmp_path / "plots" / "speed.png"
    unmeasured = [{**r, "quality": None, "flops_ratio": None, "latency_ms_p95": None} for r in rows()]
    for given in (rows()[3:5], unmeasured, [*rows(), {**rows()[1], "method": "L3", "task": "other"}]):
        plots.bench(given, file, "title")
        assert is_png(file)
    assert [p.name for p in file.parent.iterdir()] == ["speed.png"]
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.bench([row(task="sst2")], file)


def test_a_training(tmp_path):
    with pytest.raises(ValueError, match="there is nothing to draw: no epoch was watched"):
        plots.training(HISTORY[::2], 2, tmp_path / "x.png")
    plots.training(HISTORY, 2, tmp_path / "x.png", dense=91.0)
    assert is_png(tmp_path / "x.png")


def test_a_search(tmp_path):
    with pytest.raises(ValueError, match="there is nothing to draw: no schedule was run"):
        plots.search([], {}, tmp_path / "x.png")
    plots.search(SCHEDULES, {0: {0.5: 0.2}, 1: {0.5: 0.1}}, tmp_path / "x.png", 0.15)
    assert is_png(tmp_path / "x.png")


def test_the_same_rows_are_the_same_file_and_a_failure_leaves_the_older_one(tmp_path):
    one, two = tmp_path / "one.svg", tmp_path / "two.svg"
    for file in (one, two):
        plots.search(SCHEDULES, {0: {0.5: 0.2}}, file)
    assert one.read_bytes() == two.read_bytes()
    before = one.read_bytes()
    with pytest.raises(ZeroDivisionError), drawing(one, 3, 3):
        1 / 0  # noqa: B018
    assert one.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw, what in ((plots.bench, rows()), (plots.pareto, rows()), (plots.leaderboard, rows())):
        with pytest.raises(ValueError, match=r"pip install 'thresher-pruning\[plot\]'"):
            draw(what, tmp_path / "speed.png")
    assert not list(tmp_path.iterdir())
