"""Tables: what they show, and that at any width of a terminal no cell is cut."""

import io
import json
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from support.rows import rows
from thresher.evaluation.rows import row
from thresher.reports.tables import Column, fit, fixed, markdown, schedules, summary, table

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ROWS = {str(file.relative_to(RESULTS)): json.loads(file.read_text())["rows"] for file in RESULTS.rglob("*.json")}
MEASURED = {name: rows for name, rows in ROWS.items() if all("layout" in row for row in rows)}  # not those of scripts
WIDTHS = (60, 80, 100, 120, 160)


def printed(shown, width: int) -> list[str]:
    console = Console(width=1000, file=io.StringIO())  # wider than asked: whatever is too wide shows
    console.print(shown)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_a_page_shows_what_was_measured():
    lines = markdown(rows()).splitlines()
    assert lines[0].startswith("| method | layout | batch | quality | drop [95 %] | FLOPs ÷ |") and len(lines) == 8
    assert lines[4] == "| ltp | packed | 1 | 69.2 | 0.8 [−0.2, 1.8] | 2.50 | 10.0 / 20.0 ms | 2.00 | 4.00 | 0.80 |"
    assert lines[7].split(" | ")[6] == "200 /s"
    assert lines[2].split(" | ")[0] == "| dense-padded" and lines[2].split(" | ")[4] == "–"
    shown = "\n".join(printed(table(rows(), 120, "title"), 120))
    for word in ("title", "dense-unpadded", "200 /s", "10.0 / 20.0 ms", "efficiency", "0.8 [−0.2, 1.8]"):
        assert word in shown


def test_columns_that_vary_are_shown_and_empty_ones_are_not():
    untimed = {"samples_per_second": None, "latency_ms_p50": None}
    two = [{**r, **untimed, "task": task} for r in rows() for task in ("a|b", "c")]
    lines = markdown(two).splitlines()
    assert lines[0].startswith("| task | method |") and "p50" not in lines[0]
    assert lines[2].startswith("| a/b | dense-padded |")
    bare = markdown([row(method="ltp", quality=50.0)])
    assert bare.splitlines()[0] == "| method | quality |"


def test_a_smaller_dense_model_keeps_its_name():
    smaller = {**rows()[1], "method": "L3", "quality": 68.0}
    assert "| L3 | packed | 1 | 68.0 | 2.0 |" in markdown([*rows(), smaller])


def test_what_all_rows_share_stands_above_the_table():
    head, *rest = printed(table(rows(), 100), 100)
    assert head == "synthetic, tiny, accuracy, torch, fp32, 1 thread, target 0.4"
    assert not any("synthetic" in line or "fp32" in line for line in rest)
    single = printed(table([r for r in rows() if r["batch_size"] == 32], 100), 100)
    assert "batch size 32" in single[0] and not any("batch" in line for line in single[1:])


@pytest.mark.parametrize("width", WIDTHS)
def test_every_cell_of_measured_rows_is_whole(width):
    for name, measured in MEASURED.items():
        shown = printed(table(measured, width, name), width)
        assert max(map(cell_len, shown)) <= width and "…" not in "".join(shown), name
        words = {word.strip(",") for word in " ".join(shown).split()}
        for r in measured:
            assert r["quality"] is None or fixed(r["quality"]) in words, name
            method = (r["method"] or "").split() if r["mode"] == "pruned" else ()
            assert words.issuperset(method), f"{name}: {r['method']} is cut"


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_all_tasks_and_models_fit_together(width):
    together = [r for of in MEASURED.values() for r in of[:2]]
    shown = printed(table(together, width), width)
    assert max(map(cell_len, shown)) <= width and "…" not in "".join(shown)
    assert {r["task"] for r in together} <= {word.strip(",") for word in " ".join(shown).split()}


def test_columns_leave_by_their_rank_and_are_named():
    speed = MEASURED["mrpc/minilm-l6-speed-0.49-s0.json"]
    narrow, wide = ("\n".join(printed(table(speed, width), width)) for width in (80, 160))
    assert "efficiency" in wide and "× unpadded" not in narrow.split("\n")[-1] and "not shown" not in wide
    assert narrow.split("\n")[-1].startswith("not shown in 80 columns: ") and "efficiency" in narrow.split("\n")[-1]
    assert "0.7 [−1.2, 2.7]" in narrow and "2.05" in narrow and "1.69" in narrow


def test_columns_are_shortened_before_they_leave_and_keys_are_joined():
    brief = Column("drop", ["1.0", "2.0"])
    columns = [
        Column("task", ["one", "two"], key=True, left=True),
        Column("batch", ["1", "32"], key=True),
        Column("drop", ["1.0 [0.0, 2.0]", "2.0 [1.0, 3.0]"], rank=2, short=brief),
        Column("pace", ["100 ms", "200 ms"], rank=5),
    ]
    assert fit(columns, 60) == (columns, [])
    assert fit(columns, 34) == (columns[:3], ["pace"])
    (joined, *others), gone = fit(columns, 26)
    assert joined.cells == ["one, batch=1", "two, batch=32"] and joined.heading == "task"
    assert others == [brief] and gone == ["pace"]


@pytest.mark.parametrize("width", WIDTHS)
def test_schedules_of_many_layers_are_whole(width):
    run = {"at": tuple(range(11)), "keep": (0.9, 0.85, 0.8, 0.7, 0.65, 0.6, 0.5, 0.4, 0.3, 0.2, 4), "latency_ms": 3.25}
    run |= {"flops_fraction": 0.5, "divergence": 0.01234, "disagreement": 0.021, "drop": None}
    run |= {"tested": 0.02, "bound": 0.034, "chosen": True}
    shown = printed(schedules([run, run | {"chosen": False, "tested": None, "bound": None}], width), width)
    assert max(map(cell_len, shown)) <= width and "…" not in "".join(shown)
    assert len([line for line in shown if "▶" in line]) == 1 and {"50.0%", "3.4%"} <= {*" ".join(shown).split()}


def test_numbers_never_show_a_negative_nothing():
    assert fixed(-0.04) == "0.0" and fixed(-0.06) == "−0.1" and fixed(None) is None


def test_three_lines_say_what_a_run_found():
    bench = [r | {"n_examples": 400, "mode": r["mode"] or "pruned"} for r in rows()]
    chance = {**bench[2], "method": "random", "quality": 60.0, "interval_low": 8.0, "interval_high": 12.0}
    quality, cost, choice = summary([*bench, chance])
    assert quality == "ltp: accuracy 70.0 -> 69.2, drop 0.8 [−0.2, 1.8] (400 texts)"
    assert cost == "2.50x fewer FLOPs; 2.00x at batch 1, 2.00x at 32 vs the fastest dense, 1 thread"
    assert choice == "random tokens, same counts and weights: 60.0, drop 10.0 [8.0, 12.0]"
    assert max(map(len, (quality, cost, choice))) <= 80
    assert len(summary(bench)) == 2 and summary(bench[:2]) == []
    untimed = {"speedup_unpadded": None, "samples_per_second": None, "latency_ms_p50": None}
    assert len(summary([r | untimed for r in [*bench, chance]])) == 2
