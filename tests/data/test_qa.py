"""Question answering: windows, answers, their F1, and the main job on questions that can be learned."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification

from support.families import NO_DROPOUT, TEXT
from support.files import write
from support.questions import questions
from support.tiny import tiny_tokenizer
from support.toy import OPTIONS, make_toy
from thresher import ToP, dense, prune
from thresher.data import qa
from thresher.data.load import load_task
from thresher.data.models import load
from thresher.data.task import DataError
from thresher.data.tokenize import tokenize
from thresher.evaluation import predict as predicting
from thresher.experiments import stages
from thresher.experiments import train as jobs
from thresher.experiments.bench import bench
from thresher.experiments.evaluate import evaluate
from thresher.training.trainer import Collator, distillation

NO_TARGET = {"target_flops": None}


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qa")
    write(folder / "farm" / "train.jsonl", questions(200))
    write(folder / "farm" / "test.jsonl", questions(40, 1))
    torch.manual_seed(0)
    config = BertConfig(**TEXT | NO_DROPOUT | {"num_hidden_layers": 2, "initializer_range": 0.1})
    BertForQuestionAnswering(config).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    return folder


def pointing(row: dict, start: int, end: int) -> np.ndarray:
    """Logits (2, n) that point at one span."""
    logits = np.zeros((2, len(row["input_ids"])))
    logits[0, start] = logits[1, end] = 5
    return logits


def test_one_file_is_cut_by_article(tmp_path):
    path = write(tmp_path / "validation.jsonl", questions(120))
    task = load_task(path)
    parts = [{*part["context"]} for part in (task.train, task.validation, task.test)]
    titles = [{row["context"]: row["title"] for row in questions(120)}[text] for part in parts for text in part]
    sizes = [len(part) for part in parts]
    cuts = np.split(np.array(titles), np.cumsum(sizes)[:-1])
    assert all(not {*a} & {*b} for i, a in enumerate(cuts) for b in cuts[:i]), "no article is in two parts"
    assert (task.kind, task.metric, task.label_column) == ("qa", "qa_f1", "answers")
    assert len(task.test) == 32 and len(task.validation) == 12 and len(task.train) == 76
    assert len(load_task(path, limit=10).train) == 10
    assert task.selected_on == "10% of train by title (seed 0), 12 rows"


def test_answers_are_found_again_in_their_windows(farm):
    task = load_task(farm / "farm")
    rows, several = tokenize(task.test, task, tiny_tokenizer(), 32)
    assert several == 0 and len(rows) == 40
    logits = [pointing(row, row["start_positions"], row["end_positions"]) for row in rows]
    assert qa.best_answers(logits, rows) == [answers["text"][0] for answers in task.test["answers"]]
    assert qa.question_f1(logits, rows).tolist() == [1.0] * 40


def test_a_long_paragraph_is_read_in_windows(farm):
    task = load_task(farm / "farm")
    with pytest.warns(UserWarning, match="paragraphs are read in several windows of 12 tokens"):
        rows, several = tokenize(task.test, task, tiny_tokenizer(), 12)
    assert several and len(rows) > 40 and {*rows["row"]} == {*range(40)}
    assert max(map(len, rows["input_ids"])) == 12
    logits = [
        pointing(row, row["start_positions"], row["end_positions"])
        if row["start_positions"]
        else pointing(row, 5, 5) / 2
        for row in rows
    ]
    assert qa.question_f1(logits, rows).mean() == 1, "the best span of all windows is the answer"


def test_only_the_paragraph_answers_and_only_in_order(farm):
    task = load_task(farm / "farm")
    rows, _ = tokenize(task.test.select([0]), task, tiny_tokenizer(), 32)
    inside = [i for i, c in enumerate(rows[0]["first"]) if c >= 0]
    logits = pointing(rows[0], 1, 2) + pointing(rows[0], inside[2], inside[2]) / 2  # the question's words score higher
    words = rows[0]["context"].split()
    assert qa.best_answers([logits], rows) == [words[2]]
    logits = pointing(rows[0], inside[3], inside[1]) + pointing(rows[0], inside[1], inside[1]) / 2
    assert qa.best_answers([logits], rows) in ([words[1]], [" ".join(words[1:4])], [words[3]])


def test_questions_without_an_answer(tmp_path):
    rows = questions(40)
    for row in rows[::2]:
        row["answers"] = {"text": [], "answer_start": []}
    task = load_task(write(tmp_path / "validation.jsonl", rows))
    found, _ = tokenize(task.test, task, tiny_tokenizer(), 32)
    logits = [pointing(row, row["start_positions"], row["end_positions"]) for row in found]
    assert qa.question_f1(logits, found).tolist() == [1.0] * len(task.test)
    said = qa.best_answers(logits, found)
    assert [text == "" for text in said] == [not answers["text"] for answers in task.test["answers"]]


@pytest.mark.parametrize(
    ("said", "gold", "expected"),
    [
        ("The  Wheat!", "wheat", 1.0),
        ("red wheat", "wheat", 2 / 3),
        ("wheat wheat", "wheat", 2 / 3),
        ("chaff", "wheat", 0.0),
        ("", "wheat", 0.0),
        ("an", "the", 1.0),
        ("", "", 1.0),
    ],
)
def test_f1(said, gold, expected):
    assert qa.f1(said, gold) == pytest.approx(expected)


def test_teachers_point_at_tokens_that_are_there(farm):
    rows = [
        {
            "input_ids": [2] * n,
            "attention_mask": [1] * n,
            "teacher_start_logits": [1.0] * n,
            "teacher_ranking": [0.5] * n,
        }
        for n in (3, 5)
    ]
    batch = Collator(tiny_tokenizer())(rows)
    assert batch["teacher_start_logits"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    student = {"start_logits": torch.randn(2, 5, generator=torch.Generator().manual_seed(0))}
    teacher = {"start_logits": batch["teacher_start_logits"]}
    found = distillation(student, teacher, mask=batch["attention_mask"])
    alone = [
        distillation({"start_logits": student["start_logits"][i : i + 1, :n]}, {"start_logits": torch.ones(1, n)})
        for i, n in enumerate((3, 5))
    ]
    assert found.item() == pytest.approx(sum(alone).item() / 2, rel=1e-5), "padding takes no part"


def test_the_main_job_on_questions(farm, tmp_path):
    options = OPTIONS | {"epochs": 4, "target_flops": 0.6, "method": "top"}
    out = tmp_path / "out"
    rows = jobs.train(str(farm / "model"), str(farm / "farm"), str(out), **options)
    assert [row["metric"] for row in rows] == ["qa_f1"] * 2
    assert rows[0]["quality"] > 80 and rows[1]["quality"] > 60, [row["quality"] for row in rows]
    assert 1 / rows[1]["flops_ratio"] == pytest.approx(0.6, rel=0.05)
    summary = json.loads((out / jobs.SUMMARY).read_text())
    assert len(summary["predictions"]["pruned"]) == 40
    assert np.mean(summary["predictions"]["pruned"]) * 100 == pytest.approx(rows[1]["quality"], abs=1e-3)
    evaluated = evaluate(str(out), str(farm / "farm"), max_length=32)
    assert evaluated[0]["quality"] == pytest.approx(rows[1]["quality"], abs=1e-6)
    timed = bench(str(out), str(farm / "farm"), max_length=32, repeats=1, batch_size=(8,), baselines=("random",))
    assert {row["metric"] for row in timed} == {"qa_f1"}
    assert next(r for r in timed if r["method"] == "top")["quality"] == pytest.approx(rows[1]["quality"], abs=1e-6)


def test_pruned_answers_have_a_logit_for_every_token(farm):
    model = prune(load(str(farm / "model"))[0], ToP(bins=4, protect=(0,)))
    model.token_pruner.mask[:, 2:] = False
    task = load_task(farm / "farm")
    rows, _ = tokenize(task.test, task, tiny_tokenizer(), 32)
    found = predicting.predict(model, rows, batch_size=8)
    assert [logits.shape[1] for logits in found.logits] == [len(ids) for ids in rows["input_ids"]]
    assert found.macs_used < found.macs_dense
    with dense(model):
        base = predicting.predict(model, rows, batch_size=8)
    assert base.macs_used == base.macs_dense == found.macs_dense, "the head is charged on neither side"


def test_examples_are_questions_with_all_their_windows(farm):
    task = load_task(farm / "farm")
    with pytest.warns(UserWarning, match="several windows"):
        rows, _ = tokenize(task.test, task, tiny_tokenizer(), 12)
    chosen = rows.select(qa.rows_of(rows, [0, 7, 39]))
    assert {*chosen["row"]} == {0, 7, 39} and len(chosen) == sum(r in (0, 7, 39) for r in rows["row"])
    again = chosen.select(qa.rows_of(chosen, [1]))
    assert {*again["row"]} == {7}, "numbers are of what is there"
    logits = [pointing(row, row["start_positions"], row["end_positions"]) for row in chosen]
    assert len(qa.question_f1(logits, chosen)) == 3
    rows = rows.remove_columns("row")
    assert qa.examples(rows)[:3] == [0, 1, 2] and qa.rows_of(rows, [2, 0]) == [0, 2]


def test_limits_and_counts_are_of_questions(farm, tmp_path):
    out, untrained = str(tmp_path / "out"), OPTIONS | {"epochs": 0, "prune_epochs": 0, "max_length": 12}
    with pytest.warns(UserWarning, match="several windows"):
        rows = jobs.train(
            str(farm / "model"), str(farm / "farm"), out, keep=0.5, **untrained | NO_TARGET | {"method": "topk"}
        )
        assert [row["n_examples"] for row in rows] == [40, 40]
        assert {row["n_examples"] for row in evaluate(out, str(farm / "farm"), max_length=12, limit=20)} == {20}
        timed = bench(out, str(farm / "farm"), max_length=12, limit=20, repeats=1, batch_size=(4,), baselines=())
        assert {row["n_examples"] for row in timed} == {20}


def test_a_head_of_another_size_is_made_anew(farm, tmp_path):
    torch.manual_seed(0)
    config = BertConfig(**TEXT | {"num_hidden_layers": 2, "num_labels": 3})
    BertForSequenceClassification(config).save_pretrained(tmp_path / "mnli")
    tiny_tokenizer().save_pretrained(tmp_path / "mnli")
    untrained = OPTIONS | NO_TARGET | {"epochs": 0, "prune_epochs": 0}
    rows = jobs.train(
        str(tmp_path / "mnli"), str(farm / "farm"), str(tmp_path / "out"), **untrained | {"method": "dense"}
    )
    assert rows[0]["metric"] == "qa_f1"


def test_models_and_data_have_to_fit(farm, tmp_path):
    toy = make_toy(tmp_path)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification: .* wants a model that answers questions"):
        evaluate(toy.model, str(farm / "farm"), max_length=32)
    with pytest.raises(ValueError, match=r"BertForQuestionAnswering: .* wants a classifier"):
        evaluate(str(farm / "model"), toy.data, max_length=32)


def test_parts_are_chosen_as_for_other_data(tmp_path):
    made = questions(40)
    assert load_task(write(tmp_path / "test.jsonl", made)).train is None
    hidden = [row | {"answers": {"text": [], "answer_start": []}} for row in made]
    for name, rows in (("train", made), ("validation", questions(8, seed=1)), ("test", hidden)):
        write(tmp_path / "parts" / f"{name}.jsonl", rows)
    assert len(load_task(tmp_path / "parts").test) == 8, "a test part without answers is hidden"
    assert len(load_task(tmp_path / "parts", test_split="train", train_split="validation").test) == 40
    with pytest.raises(DataError, match="there is no part nope"):
        load_task(tmp_path / "parts", train_split="nope")
    for options, problem in (
        ({"metric": "accuracy"}, "'accuracy' is no metric for question answering"),
        ({"limit": 0}, "limit is 0, expected 1 or more rows"),
    ):
        with pytest.raises(DataError, match=problem):
            load_task(tmp_path / "parts", **options)


def test_a_diverged_model_is_not_judged(farm):
    task = load_task(farm / "farm")
    rows, _ = tokenize(task.test.select([0]), task, tiny_tokenizer(), 32)
    with pytest.raises(DataError, match=r"NaN or infinity: .* has the model diverged"):
        qa.question_f1([pointing(rows[0], 1, 1) * np.nan], rows)


BAD = {
    "string": ({"answers": "wheat"}, r"row 3 \(from 0\) has the answers wheat: expected \{\"text\""),
    "lengths": ({"answers": {"text": ["wheat"], "answer_start": []}}, "expected .* as many of both"),
    "no list": ({"answers": {"text": "wheat", "answer_start": 3}}, "expected .* as many of both"),
    "no number": ({"answers": {"text": ["wheat"], "answer_start": ["x"]}}, "expected .* as many of both"),
    "elsewhere": ({"answers": {"text": ["wheat"], "answer_start": [999]}}, "'wheat' is not at character 999"),
    "title": ({"title": None}, r"column 'title' has no text in 1 rows, first in row 3 \(from 0\)"),
    "question": ({"question": None}, "column 'question' has no text in 1 rows"),
    "context": ({"context": None}, "column 'context' has no text in 1 rows"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_tables_are_named(kind, tmp_path):
    change, problem = BAD[kind]
    made = questions(12)
    made[3] = made[3] | change
    with pytest.raises(DataError, match=problem):
        load_task(write(tmp_path / "validation.jsonl", made))


def test_bad_questions_are_named(tmp_path, farm):
    with pytest.raises(DataError, match="all 4 rows are on one title"):
        load_task(write(tmp_path / "validation.jsonl", questions(4)))
    task = load_task(farm / "farm")
    for length in (4, 6):
        with pytest.raises(DataError, match=f"max_length={length} leaves .* beside the longest question, of 2"):
            tokenize(task.test, task, tiny_tokenizer(), length)


def test_a_training_on_questions_knows_when_it_is_over(farm, tmp_path, monkeypatch):
    """The positions of the answers are labels of windows that are held out."""
    for name, value in (("LEAST", 60), ("EPOCHS", 1), ("RATES", (1e-3, 4e-3)), ("RATE_STEPS", (5,))):
        monkeypatch.setattr(stages, name, value)
    monkeypatch.setattr(stages, "SCHEDULE_STEPS", (5,))
    options = OPTIONS | {"epochs": None, "prune_epochs": None, "lr": None, "method": "topk", "target_flops": 0.6}
    jobs.train(str(farm / "model"), str(farm / "farm"), str(tmp_path / "out"), **options)
    summary = json.loads((tmp_path / "out" / jobs.SUMMARY).read_text())
    assert {*summary["rates"].values()} <= {1e-3, 4e-3} and all(0 < n <= 60 for n in summary["steps"].values())
    assert summary["schedule"]["at"] and any("eval_quality" in line for line in summary["history"])
