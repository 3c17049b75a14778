"""What is odd in a data set is counted, kept out of train, and told once; test never loses a row."""

import random
import warnings

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from support.files import reviews, write
from support.questions import questions
from thresher.data.load import load_task
from thresher.data.task import DataError


def loaded(path, **options):
    """The task, and its notices."""
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always")
        task = load_task(path, **options)
    return task, [str(notice.message) for notice in notices]


def texts(part, columns=("text",)):
    return {tuple(" ".join(row[c].casefold().split()) for c in columns) for row in part}


def disjoint(task, columns=("text",)):
    train, validation, test = (texts(part, columns) for part in (task.train, task.validation, task.test))
    return not (train & validation or train & test or validation & test)


def shouted(text: str) -> str:
    """The same text, blanks and case aside."""
    return "  ".join(text.upper().split()) + "\n"


def test_copies_in_one_file_lie_in_one_part(tmp_path):
    rows = reviews(60) + [row | {"text": shouted(row["text"])} for row in reviews(60)] * 3
    random.Random(0).shuffle(rows)
    task, notices = loaded(write(tmp_path / "joined.jsonl", rows))
    assert disjoint(task) and task.removed == {}, "no row is lost"
    assert (len(task.train), len(task.validation), len(task.test)) == (196, 20, 24)
    assert notices == [
        "180 of 240 rows of train repeat the text of another row: all copies lie in one part, and each of them counts"
    ]


def test_clean_data_are_cut_as_ever_and_nothing_is_told(tmp_path):
    task, notices = loaded(write(tmp_path / "some.csv", reviews(300, ("a", "b", "c"))))
    assert notices == [] and task.removed == {} and disjoint(task)
    assert task.test["text"][:5] == [f"text number {i}" for i in (13, 16, 48, 56, 64)]


@pytest.mark.parametrize("dev", [False, True])
def test_texts_of_test_leave_train(tmp_path, dev):
    write(tmp_path / "train.jsonl", [*reviews(40), *({**row, "text": shouted(row["text"])} for row in reviews(3))])
    write(tmp_path / ("dev.jsonl" if dev else "test.jsonl"), reviews(40, start=35))
    if dev:
        write(tmp_path / "other.jsonl", reviews(40))
    task, notices = loaded(tmp_path)
    assert task.removed == {"also in test": 5} and len(task.test) == 40 and disjoint(task)
    assert len(task.train) + len(task.validation) == 38
    assert notices == [
        "5 of 43 rows of train have a text that test has as well (blanks and case aside); they are removed"
    ]
    write(tmp_path / ("dev.jsonl" if dev else "test.jsonl"), reviews(41))
    with pytest.raises(DataError, match=r"^all 43 rows of train have a text that test has as well .* nothing is left"):
        load_task(tmp_path)


def test_pairs_are_compared_as_pairs_in_either_order(tmp_path):
    def pairs(part, numbers):
        return [{"sentence1": f"{part} {i}", "sentence2": f"also {i}", "label": i % 2} for i in numbers]

    swapped = [
        {"sentence1": shouted(row["sentence2"]), "sentence2": row["sentence1"], "label": 0}
        for row in pairs("test", [2])
    ]
    write(tmp_path / "train.jsonl", pairs("train", range(40)) + pairs("test", [1]) + swapped)
    write(tmp_path / "test.jsonl", pairs("test", range(20)))
    task, notices = loaded(tmp_path)
    assert task.removed == {"also in test": 2} and len(notices) == 1, "half a pair is no copy"
    assert "have a sentence1 and sentence2 that test has as well" in notices[0]


def test_queries_of_test_leave_train(tmp_path):
    def ranked(numbers, spell=str):
        return [
            {"question": spell(f"who threshes {i}"), "answer": f"farmer {i} {j} {spell('A')}", "label": j % 2}
            for i in numbers
            for j in range(4)
        ]

    write(tmp_path / "train.jsonl", ranked(range(30), shouted))
    write(tmp_path / "test.jsonl", ranked(range(28, 40)))
    task, notices = loaded(tmp_path, metric="map")
    assert task.removed == {"also in test": 8} and len(task.test) == 48 and disjoint(task, ("question",))
    assert notices[0].startswith("8 of 120 rows of train have a question that test has as well")
    one = write(tmp_path / "one" / "some.jsonl", ranked(range(30), shouted) + ranked(range(20)))
    task, _ = loaded(one, metric="map")
    assert disjoint(task, ("question",)), "a query in two spellings is one"


def test_paragraphs_of_test_leave_train(tmp_path):
    train, test = questions(40), questions(12, seed=1)
    copied = [row | {"question": "another question", "title": "t99"} for row in test[:3]]
    write(tmp_path / "train.jsonl", train + copied)
    write(tmp_path / "test.jsonl", test)
    task, notices = loaded(tmp_path)
    assert task.removed == {"also in test": 3} and len(task.test) == 12 and disjoint(task, ("context",))
    assert notices == [
        "3 of 43 rows of train have a context that test has as well (blanks and case aside); they are removed"
    ]
    assert {*task.train["question"]} == {*task.test["question"]}, "one question of many paragraphs is no copy"


def test_paragraphs_under_several_titles_lie_in_one_part(tmp_path):
    rows = [row | {"title": f"u{i}"} for i, row in enumerate(questions(40))] + questions(40)
    task, notices = loaded(write(tmp_path / "train.jsonl", rows))
    assert disjoint(task, ("context",)) and {*task.removed} == {"also in test", "also in validation"}
    assert len(notices) == 3 and notices[0].startswith("40 of 80 rows of train repeat the text of another row")


def test_empty_texts_leave_train_and_are_told(tmp_path):
    for part, start in (("train", 0), ("test", 40)):
        rows = [{"question": f"q{i}", "answer": f"a{i}", "label": i % 2} for i in range(start, start + 40)]
        rows[3]["question"], rows[5]["answer"] = " \n", ""
        write(tmp_path / f"{part}.jsonl", rows)
    task, notices = loaded(tmp_path)
    assert task.removed == {"empty": 2} and len(task.test) == 40
    assert notices == [
        "2 of 40 rows of train have an empty text; they are removed",
        "2 of 40 rows of test have an empty text",
    ]


# Labels


def test_whole_floats_are_classes(tmp_path):
    path = write(tmp_path / "some.csv", [{"text": f"t{i}", "label": float(i % 2)} for i in range(40)])
    task, notices = loaded(path)
    assert (task.kind, task.metric, task.labels) == ("classification", "accuracy", ["0", "1"])
    assert notices == [
        "column 'label' holds only 0.0, 1.0, which are read as 2 classes: for a regression name the metric pearson"
    ]
    assert loaded(path, labels=[], metric="f1")[0].kind == "classification", "of a model with one output, too"
    for options in ({"metric": "pearson"}, {"labels": []}):
        task, notices = loaded(path, **options)
        assert (task.kind, notices) == ("regression", []) and {*task.train["label"]} == {0.0, 1.0}


def test_whole_floats_beside_fractions_are_numbers(tmp_path):
    write(tmp_path / "train.csv", [{"text": f"t{i}", "label": i / 4} for i in range(40)])
    write(tmp_path / "test.csv", [{"text": f"test{i}", "label": float(i % 2)} for i in range(40)])
    assert loaded(tmp_path)[0].kind == "regression"


def test_hidden_numbers_give_way_to_validation(tmp_path):
    for part, label in (("train", None), ("validation", None), ("test", -1.0)):
        rows = [{"sentence": f"{part} {i}", "label": i / 4 if label is None else label} for i in range(20)]
        write(tmp_path / "stsb" / f"{part}.parquet", rows)
    assert load_task(tmp_path / "stsb").test["sentence"][0] == "validation 0"


def test_infinite_labels_are_refused(tmp_path):
    rows = [{"text": f"t{i}", "label": i / 4 if i else np.inf} for i in range(40)]
    with pytest.raises(DataError, match="train column 'label' holds infinity in 1 rows: expected numbers"):
        load_task(write(tmp_path / "some.parquet", rows))


def test_classes_that_differ_in_blanks_or_case_are_named(tmp_path):
    task, notices = loaded(write(tmp_path / "some.csv", reviews(60, ("Good", "bad", "good ", "fine"))))
    assert task.labels == ["Good", "bad", "fine", "good "], "they are not merged"
    assert notices == [
        "the classes 'Good', 'good ' in 'label' differ only in blanks or case and are counted as 2 classes: "
        "write them alike if they are one"
    ]


def test_classes_of_one_row_are_named(tmp_path):
    rows = [*reviews(40), {"text": "alone", "label": "rare"}, {"text": "too", "label": "seldom"}]
    _, notices = loaded(write(tmp_path / "some.csv", rows))
    assert notices == ["2 classes of 'label' have one row only (rare, seldom): they cannot be both learned and tested"]


def test_classes_that_train_or_test_lack_are_named(tmp_path):
    write(tmp_path / "train.csv", reviews(40))
    write(tmp_path / "test.csv", reviews(10, ("good",), start=50))
    assert loaded(tmp_path)[1] == ["test has only the class 'good' in 'label': its quality says little"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good", "odd"])})
    (tmp_path / "named").mkdir()
    for part, start, classes in (("train", 0, 2), ("test", 50, 3)):
        rows = {"text": [f"t{start + i}" for i in range(30)], "label": [i % classes for i in range(30)]}
        Dataset.from_dict(rows, features).to_parquet(tmp_path / "named" / f"{part}.parquet")
    _, notices = loaded(tmp_path / "named")
    assert notices == ["no row of train has the classes odd of test: nothing teaches them"]


def test_contradicting_copies_are_counted(tmp_path):
    write(tmp_path / "train.csv", [*reviews(40), {"text": "TEXT number 7", "label": "bad"}])
    write(tmp_path / "test.csv", reviews(40, start=50))
    _, notices = loaded(tmp_path)
    assert notices == [
        "1 texts have more than one class in 'label', first 'text number 7': no model can be right on all of their rows"
    ]


def test_columns_that_hold_no_texts_are_refused(tmp_path):
    same = write(tmp_path / "same.csv", [{"text": "Always this", "label": i % 2} for i in range(20)])
    with pytest.raises(DataError, match="all 20 rows have one text in text: name the column of texts"):
        loaded(same)
    path = write(
        tmp_path / "some.csv", [{"text": ("good ", "bad")[i % 2], "label": ("Good", "Bad")[i % 2]} for i in range(20)]
    )
    with pytest.raises(DataError, match="train column 'text' holds the label 'label' in every row"):
        loaded(path)
    for options, problem in (
        ({"text": "label"}, "the column 'label' is named as text and as label"),
        ({"text": ["text", "text"]}, "2 text columns among text, label: name one or two"),
    ):
        with pytest.raises(DataError, match=problem):
            load_task(path, **options)
