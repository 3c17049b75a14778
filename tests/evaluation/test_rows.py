"""Rows: every public field and no other, files that are whole or not there."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from support.rows import rows
from thresher.evaluation import rows as report


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


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "deep" / "result"
    for _ in range(2):
        with report.folder_written_whole(folder) as aside:
            (aside / "a").write_text("a")
            assert not (folder / "a").exists() and aside.parent == folder.parent
        assert [p.name for p in folder.iterdir()] == ["a"] and [*folder.parent.iterdir()] == [folder]
        (folder / "a").unlink()  # an empty folder gives way
    (folder / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), report.folder_written_whole(folder, replace=True) as aside:
        (aside / "a").write_text("a")
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="not empty"), report.folder_written_whole(folder) as aside:
        (aside / "a").write_text("a")
    assert [p.name for p in folder.iterdir()] == ["old"] and [*folder.parent.iterdir()] == [folder]
    with report.folder_written_whole(folder, replace=True) as aside:
        (aside / "a").write_text("a")
        assert [p.name for p in folder.iterdir()] == ["old"]
    assert [p.name for p in folder.iterdir()] == ["a"] and [*folder.parent.iterdir()] == [folder]
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777, "as any new folder"


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    folder, move = tmp_path / "result", report.os.replace
    folder.mkdir()
    (folder / "old").write_text("old")

    def fails(source, target):
        if str(source).endswith(".tmp"):
            raise PermissionError(13, "Permission denied", str(target))
        move(source, target)

    monkeypatch.setattr(report.os, "replace", fails)
    with pytest.raises(PermissionError), report.folder_written_whole(folder, replace=True) as aside:
        (aside / "a").write_text("a")
    assert [p.name for p in folder.iterdir()] == ["old"] and [*tmp_path.iterdir()] == [folder]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space"), SafetensorError("I/O error"), RuntimeError("inline_container")]
)
def test_a_failure_says_where_it_was(tmp_path, error):
    place = f"cannot write in {tmp_path}, is the disk full"
    with pytest.raises(OSError, match=place), report.folder_written_whole(tmp_path / "result"):
        raise error
    for own in (RuntimeError("the model"), FileNotFoundError(2, "no", "there")):
        with pytest.raises(type(own), match=r"^(?!cannot write)"), report.folder_written_whole(tmp_path / "result"):
            raise own
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"rows": [{"speed": 1}]}', '{"rows": 3}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match="does not hold"):
        report.read_rows(tmp_path / "rows.json")
