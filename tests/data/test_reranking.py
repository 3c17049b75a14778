"""Reranking is judged query by query, as the definitions of the metrics say, from the data to the reported row."""

from __future__ import annotations

import csv
import json
import random
import warnings
from types import SimpleNamespace

import numpy as np
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
        ([("a", "b", i % 3) for i in range(30)], PAIR, "'map' is no metric for classification"),
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
