"""The page of a comparison: every figure is in the table, every point says it, and the plot is of what was measured."""

from __future__ import annotations

import itertools
import re
from html import unescape

import pytest

from thresher.evaluation.rows import row
from thresher.reports.compare_page import html, lines_of, ticks


def made(method: str, target: float, quality: float, speeds: tuple[float, float], **more) -> list[dict]:
    """The rows of a method at a target, at batch sizes 1 and 32."""
    shared = {"task": "farm", "model": "toy", "metric": "accuracy", "method": method, "target_flops": target}
    shared |= {"mode": "pruned", "quality": quality, "quality_dense": 90.0, "flops_ratio": 1 / target} | more
    shared |= {"interval_low": 90 - quality - 2, "interval_high": 90 - quality + 3}
    return [row(**shared, batch_size=size, speedup_unpadded=x) for size, x in zip((1, 32), speeds, strict=True)]


@pytest.fixture
def rows() -> list[dict]:
    dense = {"task": "farm", "model": "toy", "metric": "accuracy", "method": "dense", "quality": 90.0}
    found = [row(**dense, mode="dense-unpadded", batch_size=size) for size in (1, 32)]
    found += made("topk", 0.5, 88.5, (1.2, 1.7), group="a") + made("topk", 0.3, 85.0, (1.4, 2.6))
    found += made("<b>odd</b>", 0.5, 80.25, (1.1, 1.6), group="b")
    blank = {"task": "farm", "model": "toy", "metric": "accuracy", "method": "late", "target_flops": 0.5}
    return [*found, row(**blank, mode="pruned", note="failed with seed 0: out of reach")]


def test_rows_of_one_method_and_budget_are_one_line(rows):
    lines = lines_of(rows)
    assert [(line.method, line.budget) for line in lines[:2]] == [
        ("topk", "0.5 of the MACs"),
        ("topk", "0.3 of the MACs"),
    ]
    assert lines[0].saved == {"× fewer FLOPs": 2.0, "× faster, batch size 1": 1.2, "× faster, batch size 32": 1.7}
    assert lines[0].drop == 1.5 and lines[-1].drop is None and len(lines) == 4


def test_the_page_has_every_figure_and_asks_for_nothing(rows, tmp_path):
    page = html(rows, tmp_path / "compare.html")
    assert (tmp_path / "compare.html").read_text(encoding="utf-8") == page
    assert not re.search(r"https?://|\bsrc=|<link|@import|url\(", page) and "<b>odd" not in page
    plots = re.findall(r'<svg class="plot".*?</svg>', page, re.DOTALL)
    assert len(plots) == 3 and [" hidden" in plot.partition(">")[0] for plot in plots] == [False, True, True]
    assert "batch size 1" in plots[0].partition(">")[0], "what was timed stands first"
    assert [plot.count('class="point"') for plot in plots] == [3, 3, 3]
    tips = unescape(plots[0])
    assert "topk 0.3 of the MACs: 85.0, drop 5.0 [3.0 to 8.0]\n× faster, batch size 1 1.40" in tips
    body = unescape(page.partition("<tbody>")[2])
    assert body.count("<tr>") == 5 and "failed with seed 0: out of reach" in body
    assert '<td data-value="9.75">9.8</td>' in body and "7.8 to 12.8" in body and "2.60" in body


def test_a_point_lies_where_its_figures_are(rows):
    """Marks of one plot, by their places: what is better is higher, what is faster is further to the right."""
    plot = re.findall(r'<svg class="plot".*?</svg>', html(rows), re.DOTALL)[0]
    places = [tuple(map(float, found)) for found in re.findall(r"translate\(([\d.]+) ([\d.]+)\)", plot)]
    (x_half, y_half), (x_less, y_less), (x_odd, y_odd) = places
    assert x_odd < x_half < x_less and y_half < y_less < y_odd
    assert (y_less - y_half) / (y_odd - y_less) == pytest.approx(3.5 / 4.75, abs=0.01)


def test_caches_are_compared_by_what_they_hold():
    of = {"model": "toy", "metric": "exact", "mode": "pruned", "quality": 50.0, "quality_dense": 60.0}
    rows = [
        row(**of, task="needle", method="snapkv", keep=keep, when=when, cache_mb=8 * keep, cache_mb_full=8.0)
        for when in ("after", "before")
        for keep in (0.5, 0.25)
    ]
    page = html(rows)
    assert page.count("<section>") == 2 and "needle, question after" in page and "needle, question before" in page
    assert page.count('class="plot"') == 2 and page.count("× smaller cache</button>") == 2 and "fieldset>" not in page
    assert [line.saved["× smaller cache"] for line in lines_of(rows[:2])] == [2, 4]


def test_tasks_of_several_metrics_name_their_own(rows):
    page = html([*rows, *({**one, "task": "moods", "metric": "spearman"} for one in rows)])
    assert "<h2>farm: accuracy</h2>" in page and "<h2>moods: spearman</h2>" in page
    assert "Quality is accuracy or spearman in points" in page and "<h2>farm</h2>" in html(rows)


def test_nothing_is_no_page(rows):
    with pytest.raises(ValueError, match="no row holds a quality"):
        html(rows[-1:])


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (84.2, 91.7), (-3.0, 250.0), (1.02, 1.09)])
def test_ticks_are_round_and_within(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 7 and low <= found[0] and found[-1] <= high
    steps = {round(b - a, 9) for a, b in itertools.pairwise(found)}
    assert len(steps) == 1 and f"{steps.pop():e}"[0] in "125"
