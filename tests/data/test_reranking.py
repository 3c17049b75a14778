"""Reranking is judged query by query, as the definitions of the metrics say, from the data to the reported row."""

from __future__ import annotations

import csv
import json
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
from typer.testing import CliRunner

from support.tiny import tiny_tokenizer
from support.toy import FILLERS, OPTIONS, make_toy
from thresher.cli import app as cli
from thresher.data.load import load_task
from thresher.data.task import DataError
from thresher.data.tokenize import tokenize
from thresher.experiments import train as jobs
from thresher.experiments.audit import audit
from thresher.experiments.compare import compare
from thresher.stats.bootstrap import bootstrap_interval
from thresher.stats.metrics import compute_metric
from thresher.stats.ranking import query_gains

PER = 4  # candidates of a query
PAIR = ("question", "answer", "label")


def pairs_of(path, queries: int, seed: int, empty: int = 0):
    """Questions of which half the candidates are relevant: those with "wheat"; of the first ``empty`` ones none is."""
    draw = random.Random(seed)
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("question", "answer", "label"))
        for number in range(queries):
            question = f"{seed} {number} " + " ".join(draw.choices(FILLERS, k=3))
            for i in range(PER):
                relevant = int(i % 2 == 0 and number >= empty)
                words = draw.choices(FILLERS, k=draw.randint(3, 8))
                words.insert(draw.randint(0, len(words)), ("chaff", "wheat")[relevant])
                table.writerow((question, " ".join(words), relevant))
    return path


@pytest.fixture(scope="module")
def ranked(tmp_path_factory) -> SimpleNamespace:
    """A data set of pairs, and what a short training makes of it."""
    folder = tmp_path_factory.mktemp("ranked")
    model = make_toy(folder).model
    pairs_of(folder / "pairs" / "train.csv", 40, 0)
    pairs_of(folder / "pairs" / "test.csv", 14, 1, empty=2)
    options = OPTIONS | {"method": "topk", "metric": "map"}
    rows = jobs.train(model, str(folder / "pairs"), str(folder / "out"), **options)
    return SimpleNamespace(model=model, data=str(folder / "pairs"), out=folder / "out", rows=rows)


def test_parts_are_cut_by_query_and_only_queries_with_an_order_are_judged(ranked):
    task = load_task(ranked.data, metric="map")
    train, validation, test = ({*part["question"]} for part in (task.train, task.validation, task.test))
    assert not train & validation and len(validation) == 4 and "by question" in task.selected_on
    assert len(test) == 12 and len(task.test) == 12 * PER, "two of 14 have no relevant candidate"
    rows, _ = tokenize(task.test, task, tiny_tokenizer(), 32)
    assert rows["row"] == [i // PER for i in range(12 * PER)]
    assert "row" not in tokenize(task.test, load_task(ranked.data), tiny_tokenizer(), 32)[0].column_names
    assert load_task(ranked.data).metric == "accuracy" and len(load_task(ranked.data).test) == 14 * PER


def test_a_test_part_is_held_out_by_query(ranked, tmp_path):
    task = load_task(pairs_of(tmp_path / "all" / "train.csv", 40, 0), metric="mrr")
    parts = [{*part["question"]} for part in (task.train, task.validation, task.test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 40


def test_a_training_reports_what_the_queries_gained(ranked):
    summary = json.loads((ranked.out / jobs.SUMMARY).read_text())
    row, found = ranked.rows[-1], summary["predictions"]["pruned"]
    assert row["metric"] == "map" and row["n_examples"] == len(found) == 12
    assert row["quality"] == pytest.approx(100 * np.mean(found), abs=1e-2)
    assert row["quality"] > 80 and row["quality_dense"] > 80, "chance is 68"
    low, high = bootstrap_interval("map", np.ones(12), summary["predictions"]["dense"], found)
    assert low <= row["quality_dense"] - row["quality"] <= high
    assert compute_metric("map", found, np.ones(12)) == pytest.approx(row["quality"], abs=1e-2)


def test_evaluation_audit_and_comparison_judge_queries(ranked, tmp_path):
    said = tmp_path / "said.json"
    run = CliRunner().invoke(cli.app, f"eval {ranked.out} --data {ranked.data} --metric mrr --json {said}".split())
    assert run.exit_code == 0, run.output
    assert {(row["metric"], row["n_examples"]) for row in json.loads(said.read_text())["rows"]} == {("mrr", 12)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in groups of less than")
        first = audit(str(ranked.out), ranked.data, metric="map", examples=0)[0]
    assert first["metric"] == "map" and first["metric_pruned"] == pytest.approx(ranked.rows[-1]["quality"])
    assert first["n"] == 12 * PER, "slices are of pairs"
    given = {"methods": ("topk",), "targets": (0.5,), "seeds": (0,), "epochs": 0, "untrained": True, "metric": "map"}
    dense, given = str(ranked.out / "dense"), given | {"max_length": 32, "progress": False}
    rows = compare(dense, ranked.data, str(tmp_path / "compared"), **given)
    assert {row["metric"] for row in rows} == {"map"} and all(row["quality"] > 50 for row in rows)
    assert all(row["n_examples"] == 12 for row in rows)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (
            [("a", "b", 0), ("c", "d", 0), ("e", "f", 1), ("g", "h", 1)] * 5,
            PAIR,
            "no query in 'question' has candidates",
        ),
        ([("a", "b", "xyz"[i % 3]) for i in range(30)], PAIR, "'map' is no metric for classification"),
        ([("a", i % 2) for i in range(30)], PAIR[1:], "'map' is no metric for classification"),
        ([("a", "b", i % 2) for i in range(30)], PAIR, "all 30 rows are on one question"),
    ],
)
def test_data_that_cannot_be_ranked_are_refused(tmp_path, rows, columns, message):
    (tmp_path / "bad").mkdir()
    for part in ("train", "test"):
        if part == "test" and "all 30" in message:
            continue
        with open(tmp_path / "bad" / f"{part}.csv", "w", newline="") as file:
            csv.writer(file).writerows([columns, *((f"{part} {row[0]}", *row[1:]) for row in rows)])
    with pytest.raises(DataError, match=message):
        load_task(tmp_path / "bad", metric="map", text=columns[:-1])


# --- one score for a candidate ----------------------------------------------------------------------------------------
def graded(path, part: str, queries: int, grades=(0, 1, 3)):
    path.mkdir(exist_ok=True)
    with open(path / f"{part}.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("query", "document", "label"))
        rows = [(f"{part} {q}", f"grain {i}", grades[i % len(grades)]) for q in range(queries) for i in range(6)]
        table.writerows(rows)
    return path


def test_grades_are_numbers_that_an_order_is_judged_by(tmp_path):
    for part in ("train", "test"):
        graded(tmp_path / "graded", part, 30)
    task = load_task(tmp_path / "graded", metric="ndcg@10")
    assert (task.kind, task.labels, task.metric) == ("reranking", [], "ndcg@10")
    assert {*task.test["label"]} == {0.0, 1.0, 3.0} and len({*task.validation["query"]}) == 3
    rows, _ = tokenize(task.test, task, tiny_tokenizer(), 32)
    found = query_gains([[float(y)] for y in rows["labels"]], rows["row"], rows["labels"], "ndcg@10")
    assert found.tolist() == [1.0] * 30


def test_a_model_of_one_logit_makes_two_classes_grades(ranked):
    asked = [load_task(ranked.data, metric="mrr", labels=given) for given in (None, [])]
    assert [task.kind for task in asked] == ["classification", "reranking"]
    assert asked[1].test["label"] == [float(y) for y in asked[0].test["label"]]
    assert load_task(ranked.data, metric="recall@2").metric == "recall@2"


def test_a_limit_takes_whole_queries(ranked):
    whole, some = (load_task(ranked.data, metric="map", limit=limit).train for limit in (None, 3 * PER - 1))
    assert len(some) == 3 * PER and len({*some["question"]}) == 3
    assert {*zip(some["question"], some["answer"], strict=True)} <= {
        *zip(whole["question"], whole["answer"], strict=True)
    }
    again = load_task(ranked.data, metric="map", limit=3 * PER - 1, seed=1).train
    assert {*again["question"]} != {*some["question"]}


# --- paragraphs with questions ----------------------------------------------------------------------------------------
def articles(path, count: int, paragraphs: int = 5, first: int = 0):
    """Articles of so many paragraphs, two questions each; one question of each article is unanswerable."""
    rows = []
    for title in range(first, first + count):
        for p in range(paragraphs):
            context = f"article {title} paragraph {p} grain"
            for q in range(2):
                answer = {"text": ["grain"], "answer_start": [context.index("grain")]}
                rows.append((f"t{title}", context, f"what {title} {p} {q}?", answer))
        rows.append((f"t{title}", context, f"nothing {title}?", {"text": [], "answer_start": []}))
        rows.append((f"t{title}", context, "asked of all?", answer))
    names = ("title", "context", "question", "answers")
    path.parent.mkdir(exist_ok=True)
    pandas.DataFrame([dict(zip(names, row, strict=True)) for row in rows]).to_parquet(path)
    return path


def test_a_question_is_to_find_its_paragraph_among_those_of_its_article(tmp_path):
    path = articles(tmp_path / "squad" / "validation.parquet", 12, paragraphs=30)
    with pytest.warns(UserWarning, match="23 questions have no answer, or were asked in another article"):
        task = load_task(path, metric="mrr")
    assert (task.kind, task.metric, task.text_columns) == ("reranking", "mrr", ("query", "passage"))
    tested = pandas.DataFrame(task.test.to_dict())
    assert len({text.split()[1] for text in tested["passage"]}) == 2, "a fifth of 12 articles"
    sizes = tested.groupby("query").agg({"label": "sum", "passage": "nunique"})
    assert (sizes["passage"] == 30).all() and (sizes["label"] == 1).all() and len(sizes) == 2 * 20
    train = pandas.DataFrame(task.train.to_dict())
    sizes = train.groupby("query").agg({"label": "sum", "passage": "nunique"})
    assert (sizes["passage"] == 4).all() and (sizes["label"] == 1).all()
    own = train[train["query"] != "asked of all?"]
    far = [q.split()[1] != p.split()[1] for q, p in zip(own["query"], own["passage"], strict=True)]
    assert sum(far) * 4 == len(own), "one of four is of another article"
    assert len({*task.validation["query"]}) == 10, "a tenth of ten articles"
    of = [{text.split()[1] for text in part["passage"]} for part in (task.train, task.validation, task.test)]
    assert not of[0] & of[1] and not of[1] & of[2] and not of[0] & of[2]
    for query, passage, label in zip(tested["query"], tested["passage"], tested["label"], strict=True):
        if query != "asked of all?":
            assert (passage.split()[1:4:2] == query.rstrip("?").split()[1:3]) == (label == 1)
    with pytest.warns(UserWarning, match="left out"):
        again = load_task(path, metric="mrr")
    assert again.train.to_dict() == task.train.to_dict() and again.test.to_dict() == task.test.to_dict()


@pytest.mark.filterwarnings("ignore:.*questions have no answer")
def test_parts_that_are_there_are_taken(tmp_path):
    articles(tmp_path / "squad" / "train.parquet", 10)
    articles(tmp_path / "squad" / "validation.parquet", 4, first=8)
    task = load_task(tmp_path / "squad", metric="ndcg@10")
    of = [{int(text.split()[1]) for text in part["passage"]} for part in (task.train, task.validation, task.test)]
    assert of[2] == {8, 9, 10, 11} and of[0] | of[1] == {*range(8)}, "what is in test is in no other part"


def test_paragraphs_that_cannot_be_ranked_are_refused(tmp_path):
    path = articles(tmp_path / "squad.parquet", 3)
    pandas.read_parquet(path).drop(columns="title").to_parquet(tmp_path / "bare.parquet")
    with pytest.raises(DataError, match="has no column title: articles are told apart"):
        load_task(tmp_path / "bare.parquet", metric="mrr")
    with pytest.raises(DataError, match="'accuracy' is no metric for question answering"):
        load_task(path, metric="accuracy")
    with pytest.raises(DataError, match="1 articles have two paragraphs"):
        load_task(articles(tmp_path / "one.parquet", 1), metric="mrr")
    with pytest.raises(DataError, match="no part 'dev2'"):
        load_task(path, metric="mrr", test_split="dev2")
