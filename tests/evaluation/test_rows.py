"""Rows: every public field and no other, files that are whole or not there, tables and a figure."""

import io
import json
import math
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from thresher.evaluation import rows as report


def rows():
    shared = {"task": "synthetic", "model": "tiny", "runtime": "torch", "precision": "fp32", "metric": "accuracy"}
    shared |= {"quality_dense": 70.0, "threads": 1}
    dense, ltp = {"method": "dense", "quality": 70.0}, {"method": "ltp", "quality": 69.25, "target_flops": 0.4}
    ltp |= {"interval_low": -0.25, "interval_high": 1.75, "mode": "pruned", "layout": "packed"}
    padded = dense | {"mode": "dense-padded", "layout": "padded"}
    unpadded = dense | {"mode": "dense-unpadded", "layout": "packed"}
    made = []
    for size, ms in ((1, 20.0), (32, 320.0)):
        for own, speed in ((padded, 0.5), (unpadded, 1.0), (ltp, 2.0)):
            own = own | {"latency_ms_p50": ms / speed, "latency_ms_p95": 2 * ms / speed}
            own |= {"batch_size": size, "samples_per_second": 1000 * size * speed / ms}
            own |= {"speedup_unpadded": speed, "speedup_padded": 2 * speed, "flops_ratio": 1.25 * speed}
            made.append(report.row(**shared, **own, efficiency=0.8))
    return made


def test_a_row_has_every_field_in_order():
    assert len(report.ROW_FIELDS) == 34 and report.ROW_FIELDS[:3] == ("task", "model", "method")
    found = report.row(spread=0.1, task="sst2")
    assert list(found) == [*report.ROW_FIELDS, "spread"]
    assert found["task"] == "sst2" and found["quality"] is None and found["spread"] == 0.1
    assert "interval_low" not in found


def test_unknown_fields_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown row fields speed, Task"):
        report.row(speed=2, Task="sst2")
    with pytest.raises(ValueError, match="unknown row fields speed"):
        report.write_rows(tmp_path / "rows.json", [{"speed": 2}])
    assert not list(tmp_path.iterdir())


def test_rows_are_written_and_read(tmp_path):
    file = tmp_path / "new" / "rows.json"
    values = {"quality": np.float32(91.2345678), "seed": np.int64(3), "threads": torch.tensor(2)}
    values |= {"versions": {"torch": "2"}, "flops_used": 12345678901, "split": "übrig"}
    report.write_rows(file, [{**values, "efficiency": math.nan, "flops_ratio": math.inf}])
    text = file.read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text and "übrig" in text
    (found,) = report.read_rows(file)
    assert found["quality"] == 91.2346 and found["seed"] == 3 and found["threads"] == 2
    assert found["flops_used"] == 12345678901 and found["versions"] == {"torch": "2"}
    assert found["efficiency"] is None and found["flops_ratio"] is None
    assert set(json.loads(text)) == {"rows"} and [p.name for p in file.parent.iterdir()] == ["rows.json"]


def test_an_older_file_survives_a_failure(tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    report.write_rows(file, rows())
    before = file.read_text()

    def full(path, text, **options):
        with open(path, "w") as out:
            out.write(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        report.write_rows(file, rows()[:1])
    assert file.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["rows.json"]
    with pytest.raises(OSError):
        report.write_rows(file / "below" / "rows.json", rows())  # a file where a folder is needed


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"rows": [{"speed": 1}]}', '{"rows": 3}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match="does not hold"):
        report.read_rows(tmp_path / "rows.json")


def test_tables_show_what_was_measured():
    text = report.markdown(rows())
    lines = text.splitlines()
    assert lines[0].startswith("| method | layout | batch | quality | drop | FLOPs ÷ |") and len(lines) == 8
    assert lines[4] == "| ltp | packed | 1 | 69.2 | 0.8 (−0.2 … 1.8) | 2.50 | 10.0 / 20.0 ms | 2.00 | 4.00 | 0.80 |"
    assert lines[7].split(" | ")[6] == "200 /s"
    assert lines[2].split(" | ")[0] == "| dense-padded" and lines[2].split(" | ")[4] == "–"
    console = Console(width=120, file=io.StringIO())
    console.print(report.table(rows(), "title"))
    shown = console.file.getvalue()
    for word in ("title", "dense-unpadded", "200 /s", "10.0 / 20.0 ms", "efficiency", "0.8 (−0.2 … 1.8)"):
        assert word in shown


def test_columns_that_vary_are_shown_and_empty_ones_are_not():
    untimed = {"samples_per_second": None, "latency_ms_p50": None}
    two = [{**r, **untimed, "task": task} for r in rows() for task in ("a|b", "c")]
    lines = report.markdown(two).splitlines()
    assert lines[0].startswith("| task | method |") and "p50" not in lines[0]
    assert lines[2].startswith("| a/b | dense-padded |")
    bare = report.markdown([report.row(method="ltp", quality=50.0)])
    assert bare.splitlines()[0] == "| method | quality |"


def test_a_smaller_dense_model_keeps_its_name():
    smaller = {**rows()[1], "method": "L3", "quality": 68.0}
    assert "| L3 | packed | 1 | 68.0 | 2.0 |" in report.markdown([*rows(), smaller])


def test_figure(tmp_path):
    file = tmp_path / "plots" / "speed.png"
    unmeasured = [{**r, "quality": None, "flops_ratio": None, "latency_ms_p95": None} for r in rows()]
    for given in (rows()[3:5], unmeasured, [*rows(), {**rows()[1], "method": "L3", "task": "other"}]):
        report.plot(given, file, "title")
        assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000
    assert [p.name for p in file.parent.iterdir()] == ["speed.png"]
    with pytest.raises(ValueError, match="nothing to plot"):
        report.plot([report.row(task="sst2")], file)


def test_the_figure_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'thresher\[plot\]'"):
        report.plot(rows(), tmp_path / "speed.png")
