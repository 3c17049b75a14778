"""A reranker of one logit from end to end: trained from an encoder, pruned with labels or by its teacher alone."""

from __future__ import annotations

import csv
import json
import random
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from support.toy import FILLERS, OPTIONS, make_toy
from thresher.cli import app as cli
from thresher.data.models import is_reranker, load
from thresher.data.task import DataError
from thresher.experiments import train as jobs
from thresher.experiments.audit import audit
from thresher.experiments.evaluate import evaluate
from thresher.stats.bootstrap import bootstrap_interval

PER = 4
RERANK = OPTIONS | {"task": "rerank", "method": "topk", "batch_size": 16, "epochs": 6, "max_length": 48}


def pairs_of(path, queries: int, seed: int, labels: bool = True):
    """Queries of which the candidate with the most "wheat" is the best: grades 0, 0, 1 and 2."""
    draw = random.Random(seed)
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("query", "document", *(["label"] if labels else [])))
        for number in range(queries):
            query = f"{seed} {number}"
            for grade in draw.sample([0, 0, 1, 2], 4):
                words = draw.choices(FILLERS, k=draw.randint(12, 20)) + ["wheat"] * grade + ["chaff"] * (2 - grade)
                draw.shuffle(words)
                table.writerow((query, " ".join(words), *([grade] if labels else [])))
    return path


@pytest.fixture(scope="module")
def ranked(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("ranked")
    model = make_toy(folder).model
    for part, queries, seed in (("train", 60, 0), ("test", 14, 1)):
        pairs_of(folder / "pairs" / f"{part}.csv", queries, seed)
        pairs_of(folder / "bare" / f"{part}.csv", queries, seed, labels=False)
    rows = jobs.train(model, str(folder / "pairs"), str(folder / "out"), **RERANK)
    return SimpleNamespace(
        model=model, data=str(folder / "pairs"), bare=str(folder / "bare"), out=folder / "out", rows=rows
    )


def test_an_encoder_becomes_a_reranker_and_is_pruned(ranked):
    summary = json.loads((ranked.out / jobs.SUMMARY).read_text())
    row, said = ranked.rows[-1], summary["predictions"]
    assert row["metric"] == "ndcg@10" and row["n_examples"] == len(said["pruned"]) == 14
    assert row["quality_dense"] > 90 and row["quality"] > 88, "chance is 75"
    assert row["quality"] == pytest.approx(100 * np.mean(said["pruned"]), abs=1e-2)
    low, high = bootstrap_interval("ndcg@10", np.ones(14), said["dense"], said["pruned"])
    assert low <= row["quality_dense"] - row["quality"] <= high
    for folder in (ranked.out, ranked.out / "dense"):
        net, _ = load(str(folder))
        assert net.config.num_labels == 1 and is_reranker(net.config), "one logit, which serving makes a probability"
    assert row["flops_ratio"] == pytest.approx(2, rel=0.15)


@pytest.mark.filterwarnings("ignore:.*in groups of less than")
def test_a_reranker_is_judged_as_it_was_trained(ranked):
    rows = evaluate(str(ranked.out))
    assert rows[-1]["metric"] == "ndcg@10" and rows[-1]["quality"] == pytest.approx(ranked.rows[-1]["quality"], abs=0.1)
    found = audit(str(ranked.out), ranked.data, examples=0)[0]
    assert found["score"] == "accuracy" and found["n"] == 14 * PER and found["pruned"] > 60


def test_a_reranker_is_pruned_without_labels(ranked, tmp_path):
    dense = str(ranked.out / "dense")
    rows = jobs.train(dense, ranked.bare, str(tmp_path / "out"), **RERANK | {"epochs": None})
    assert rows[0]["quality"] == pytest.approx(100) and rows[1]["quality"] > 90, "of the dense model's order"
    summary = json.loads((tmp_path / "out" / jobs.SUMMARY).read_text())
    assert summary["steps"]["dense"] == 0 < summary["steps"]["prune"] and summary["task"]["label"] is None
    judged = evaluate(str(tmp_path / "out"), ranked.data, metric="ndcg@10")
    assert judged[-1]["quality"] > 85, "by labels that it never saw"


def test_the_command_takes_the_task(ranked, tmp_path):
    given = f"train {ranked.out / 'dense'} --data {ranked.data} --out {tmp_path / 'out'} --task rerank --metric mrr"
    given += " --method topk --target-flops 0.6 --prune-epochs 1 --batch-size 16 --max-length 48 --lr 0.001 --no-bf16"
    run = CliRunner().invoke(cli.app, given.split())
    assert run.exit_code == 0, run.output
    assert AutoConfig.from_pretrained(tmp_path / "out").num_labels == 1
    summary = json.loads((tmp_path / "out" / jobs.SUMMARY).read_text())
    assert summary["steps"]["dense"] == 0, "it is a reranker already"
    assert summary["recipe"]["task"] == "rerank" and summary["rows"][0]["metric"] == "mrr"


def test_what_cannot_be_reranked_is_told(ranked, tmp_path):
    options = {"out": str(tmp_path / "out"), "progress": False}
    with pytest.raises(ValueError, match="no task 'rank': expected classify, rerank, embed"):
        jobs.train(ranked.model, ranked.data, task="rank", **options)
    with pytest.raises(DataError, match="name the label column, or a trained reranker"):
        jobs.train(ranked.model, ranked.bare, task="rerank", **options)
    with pytest.raises(DataError, match="has no labels: 'mrr' needs them, use ndcg@10"):
        jobs.train(str(ranked.out / "dense"), ranked.bare, task="rerank", metric="mrr", **options)


@pytest.mark.filterwarnings("ignore:.*questions have no answer")
def test_what_was_made_of_paragraphs_is_made_again(ranked, tmp_path):
    rows = []
    for title in range(8):
        texts = [f"{word} {title} grain and {word} the" for word in ("wheat", "chaff", "farmer", "script")]
        answer = {"text": ["grain"], "answer_start": [8]}
        rows += [(f"t{title}", text, f"{text[:5]} {title}", answer) for text in texts]
    names = ("title", "context", "question", "answers")
    pandas.DataFrame([dict(zip(names, row, strict=True)) for row in rows]).to_parquet(tmp_path / "squad.parquet")
    options = RERANK | {"metric": "mrr", "epochs": 1, "prune_epochs": 0, "method": "dense", "target_flops": None}
    jobs.train(ranked.model, str(tmp_path / "squad.parquet"), str(tmp_path / "dense"), **options)
    assert evaluate(str(tmp_path / "dense"))[0]["metric"] == "mrr"
