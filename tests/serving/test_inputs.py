"""Files of texts: any range of rows of any kind of file, and one line for whatever is wrong with one."""

from __future__ import annotations

import gzip
import itertools
import json

import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from support.files import write
from thresher.serving.inputs import arrow, columns_of, find_files, of_json, read, scan

ROWS = [{"id": str(i), "text": f"text {i}\n" * (i % 3) + 'with "quotes", ä and \u2028'} for i in range(23)]
KEPT = pa.schema([("id", pa.string())])


def packed(path):
    """The file packed by gzip, in two pieces, as some programs do."""
    content, target = path.read_bytes(), path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(content[:200]) + gzip.compress(content[200:]))
    path.unlink()
    return target


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "ndjson", "csv", "jsonl.gz", "csv.gz"])
@pytest.mark.parametrize("before", [0, 3])
def test_any_range_of_rows(tmp_path, kind, before):
    path = tmp_path / f"some.{kind}"
    if kind.endswith(".gz"):
        assert packed(write(path.with_suffix(""), ROWS)) == path
    else:
        write(path.with_suffix(".jsonl"), ROWS).rename(path) if kind == "ndjson" else write(path, ROWS)
    source, contents = scan(str(path), ["text", "id"], before, 5)
    assert (source.rows, contents.columns) == (23, ["id", "text"])
    for start in range(0, 23):
        for stop in (start, start + 1, start + 4, 23):
            (texts,), kept = read(source, start, stop, ["text"], KEPT)
            assert texts == [row["text"] for row in ROWS[start:stop]]
            assert kept["id"].to_pylist() == [row["id"] for row in ROWS[start:stop]]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(
        st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=8), min_size=1
    ),
    every=st.integers(1, 7),
    kind=st.sampled_from(["csv", "jsonl"]),
    mark=st.booleans(),
)
def test_shards_of_files_of_lines_meet(tmp_path, values, every, kind, mark):
    path = write(tmp_path / f"some.{kind}", [{"text": value, "more": "x"} for value in values])
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + path.read_bytes().replace(b"\r\n", b"\n\n"))
    source, _ = scan(str(path), ["text"], 0, every)
    parts = [
        read(source, i, min(i + every, source.rows), ["text"], pa.schema([]))[0][0]
        for i in range(0, source.rows, every)
    ]
    assert [*itertools.chain(*parts)] == [value or (None if kind == "csv" else "") for value in values]
    assert [row for row, _ in source.starts] == [*range(every, len(values), every)]


def test_row_groups_of_parquet(tmp_path):
    path = tmp_path / "some.parquet"
    parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=4)
    source, _ = scan(str(path), ["text"], 0, 5)
    assert read(source, 3, 9, ["text"], pa.schema([]))[0] == [[row["text"] for row in ROWS[3:9]]]


def test_text_of_other_types_of_arrow(tmp_path):
    path = tmp_path / "some.parquet"
    table = pa.table(
        {"a": pa.array(["x", None, "x"], pa.large_string()), "b": pa.array(["u", "v", "u"]).dictionary_encode()}
    )
    parquet.write_table(table, path)
    source, contents = scan(str(path), ["a", "b"], 0, 9)
    assert contents.types == {"a": {pa.string()}, "b": {pa.string()}}
    assert read(source, 0, 3, ["a", "b"], KEPT.empty_table().select([]).schema)[0] == [
        ["x", None, "x"],
        ["u", "v", "u"],
    ]


def test_types_of_json():
    assert (
        of_json({"null"}) is None
        and of_json({"int", "null"}) == pa.int64()
        and of_json({"int", "float"}) == pa.float64()
    )
    assert of_json({"str", "int"}) == of_json({"other"}) == pa.string()
    assert arrow(["a", 1, None, [1, "ä"]], pa.string()).to_pylist() == ["a", "1", None, '[1, "ä"]']
    assert arrow(["half \ud800"], pa.string()).to_pylist() == ["half ?"]
    assert arrow([1, 2.5, None], pa.float64()).to_pylist() == [1.0, 2.5, None]


def test_files_folders_and_patterns(tmp_path):
    for name in ("b.csv", "a.jsonl", "_hidden.csv", "notes.txt", "a.parquet.gz"):
        (tmp_path / name).write_text("text\nx\n")
    both = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv")]
    out = tmp_path / "out"
    assert find_files([str(tmp_path)], out) == both
    assert find_files([both[1], f"{tmp_path}/*.jsonl"], out) == both[::-1]
    for data, said in (
        ([str(tmp_path / "no.csv")], "no such file"),
        ([str(tmp_path / "*.parquet")], "no such file"),
        ([str(tmp_path / "notes.txt")], "unknown kind"),
        ([str(tmp_path / "a.parquet.gz")], "unknown kind"),
        ([both[0], str(tmp_path)], "named twice"),
    ):
        with pytest.raises(ValueError, match=said):
            find_files(data, out)
    with pytest.raises(ValueError, match="where the result goes"):
        find_files(both, tmp_path)


BROKEN = {
    "nothing.csv": (b"", "0 bytes"),
    "nothing.parquet": (b"", "0 bytes"),
    "nothing.jsonl": (b"", "0 bytes"),
    "blank.csv": (b"\n\n", "no header"),
    "no.parquet": (b"text", "parquet"),
    "fields.csv": (b"text,id\na,1\nb\n", r"row 1 \(from 0\) has 1 fields, the header 2"),
    "quotes.csv": (b'text,id\n"a,1\n', "line 2 is not csv"),
    "bytes.csv": (b"text\na\n\xff\n", "line 3 is not in UTF-8"),
    "no.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "array.json": (b'[{"text": "a"}]', "one object a line"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100000, "line 1 is not JSON"),
    "column.jsonl": (b'{"other": "a"}\n', "no column 'text': its columns are other"),
    "no.csv.gz": (b"text\na\n", "no whole gzip file"),
    "short.csv.gz": (gzip.compress(b"text\n" + b"some words\n" * 99)[:-20], "no whole gzip file"),
    "spoiled.jsonl.gz": (gzip.compress(b"{}")[:12] + b"\xff" * 20, "no whole gzip file"),
    "line.jsonl.gz": (gzip.compress(b'{"text": "a"}\n['), "line 2 is not JSON"),
    "column.csv": (b"other\na\n", "no column 'text': its columns are other"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path, name):
    content, said = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as told:
        scan(str(tmp_path / name), ["text"], 0, 5)
    assert name in str(told.value) and len(str(told.value).splitlines()) == 1


def test_a_file_that_changed_is_noticed(tmp_path):
    path = write(tmp_path / "some.csv", ROWS)
    source, _ = scan(str(path), ["text"], 0, 5)
    source.check()
    path.write_text(path.read_text() + "99,more\n")
    with pytest.raises(ValueError, match="has changed"):
        source.check()
    path.unlink()
    with pytest.raises(ValueError, match="is gone"):
        source.check()


def test_columns_of_every_kind(tmp_path):
    for kind in ("csv", "tsv", "jsonl", "parquet"):
        assert columns_of(str(write(tmp_path / f"a.{kind}", [{"id": "1", "text": "x"}]))) == ["id", "text"]
    empty = tmp_path / "schema.parquet"
    Dataset.from_dict({"text": ["x"]}).select([]).to_parquet(empty)
    assert scan(str(empty), ["text"], 0, 5)[0].rows == 0
    (tmp_path / "blank.jsonl").write_text("\n")
    assert scan(str(tmp_path / "blank.jsonl"), ["text"], 0, 5)[0].rows == 0 and json.loads("{}") == {}
