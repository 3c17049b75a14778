"""The stages of a training, each alone: what it leaves in its folder, and that it is not run again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support.toy import OPTIONS, make_toy
from thresher import prune
from thresher.data.models import load
from thresher.evaluation.predict import predict
from thresher.experiments import pruning, stages
from thresher.experiments import train as jobs
from thresher.experiments.spec import SUMMARY, TrainSpec
from thresher.experiments.workspace import Workspace
from thresher.training.trainer import Distill, PruningTrainer, Ranking, ranking_of

FEW = {name: value for name, value in OPTIONS.items() if name != "progress"} | {"epochs": 1, "prune_epochs": 1}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> SimpleNamespace:
    return make_toy(tmp_path_factory.mktemp("toy"))


def run_of(toy, out, **options) -> stages.Run:
    spec = TrainSpec(model=toy.model, data=toy.data, out=out, **FEW | options).completed()
    work = Workspace(spec)
    assert work.finished(fresh=False) is None
    return stages.Run(spec, work, stages.load_data(spec), False, stages.asked)


@pytest.fixture(scope="module")
def staged(toy, tmp_path_factory) -> SimpleNamespace:
    run = run_of(toy, tmp_path_factory.mktemp("staged") / "out")
    dense = stages.fine_tune(run)
    taught = stages.teach(run, dense)
    pruned = pruning.prune_and_train(run, dense, run.work.folder / "pruned", run.spec.method_options)
    return SimpleNamespace(run=run, dense=dense, taught=taught, pruned=pruned)


def refused(*_, **__):
    raise AssertionError("the stage was run again")


def test_each_stage_has_a_folder_of_its_own(staged):
    folder = staged.run.work.folder
    assert {path.name for path in folder.iterdir()} == {
        "recipe.json",
        "dense",
        "taught-train",
        "pruned",
    }
    assert (staged.dense, staged.pruned) == (folder / "dense", folder / "pruned")
    assert not staged.run.spec.out.exists()
    stage = json.loads((staged.pruned / "stage.json").read_text())
    assert stage["steps"] == 9 and stage["reached"]["flops_fraction"] == pytest.approx(0.5, rel=0.05)


def test_the_teacher_is_the_dense_model(staged):
    run, net = staged.run, staged.run.model(staged.dense).eval()
    expected = predict(net, run.data.train, batch_size=64).logits
    torch.testing.assert_close(torch.tensor(staged.taught["teacher_logits"]), expected, atol=1e-6, rtol=0)
    assert staged.taught["input_ids"] == run.data.train["input_ids"]


def test_a_teacher_tells_what_its_answers_hang_on(toy, tmp_path):
    options = {"method": "top", "method_options": {"target_flops": 0.7, "ranking": "saliency"}, "target_flops": None}
    run = run_of(toy, tmp_path / "out", epochs=0, **options)
    run.work.claim()
    taught = stages.teach(run, toy.model)
    net = prune(run.model(toy.model).eval(), Ranking("saliency"))
    for row in (0, 5):
        ids = torch.tensor([taught["input_ids"][row]])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        net(**batch)
        expected = ranking_of(net, batch)[0]
        assert expected.max() > 0
        torch.testing.assert_close(torch.tensor(taught["teacher_ranking"][row]), expected, atol=1e-5, rtol=1e-3)


def test_states_are_distilled_from_the_dense_model(toy, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(pruning, "PruningTrainer", lambda *a, **k: made.append(PruningTrainer(*a, **k)) or made[-1])
    monkeypatch.setattr(pruning, "settled", lambda run, stage, make, epochs, lr: make(epochs=1, lr=1e-3))
    run = run_of(toy, tmp_path / "out", distill_states=0.25, epochs=0, dense_model=str(toy.model))
    monkeypatch.setattr(pruning, "finish_training", lambda *_: None)
    pruning.prune_and_train(run, toy.model, run.work.folder / "pruned", run.spec.method_options)
    (trainer,) = made
    assert trainer.distill == Distill(run.spec.distill, states=0.25) and trainer.taught_by is trainer.teacher.bert
    assert run.spec.saved()["distill_states"] == 0.25


def test_what_is_there_is_not_made_again(staged, monkeypatch):
    monkeypatch.setattr(stages, "run_trainer", refused)
    monkeypatch.setattr(stages, "predict", refused)
    again = stages.Run(**vars(staged.run) | {"ask": refused})
    dense = stages.fine_tune(again)
    taught = stages.teach(again, dense)
    assert taught[:] == staged.taught[:]
    assert pruning.prune_and_train(again, dense, staged.pruned, {}) == staged.pruned


def test_answers_may_come_from_elsewhere(staged):
    asked = []

    def ask(net, folder, texts, **how):
        asked.append((folder, len(texts)))
        return predict(net, texts, **how)

    run = stages.Run(**vars(staged.run) | {"ask": ask})
    summary = jobs.measure(run, staged.dense, staged.pruned)
    assert asked == [(staged.dense, 48)], "the pruned model is new and asked here"
    dense, pruned = summary["rows"]
    assert summary == jobs.measure(staged.run, staged.dense, staged.pruned) | {"rows": [dense, pruned]}
    said = predict(load(str(staged.pruned))[0], run.data.test)
    assert pruned["flops_ratio"] == pytest.approx(said.macs_dense / said.macs_used)


def test_a_model_pruned_without_training_needs_no_teacher(toy, tmp_path, monkeypatch):
    run = run_of(toy, tmp_path / "out", epochs=0, prune_epochs=0)
    dense = stages.fine_tune(run)
    monkeypatch.setattr(pruning, "teach", refused)
    pruned = pruning.prune_and_train(run, dense, run.work.folder / "pruned", run.spec.method_options)
    started = time.time()
    jobs.finish(run, dense, pruned, jobs.measure(run, dense, pruned) | {"seconds": time.time() - started})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "dense", SUMMARY} <= names and "stage.json" not in names
    assert json.loads((tmp_path / "out" / "dense" / SUMMARY).read_text())["task"]["max_length"] == 32


# --- until it is trained ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["topk", "ltp"])
def test_what_is_open_is_chosen_on_held_out_rows(toy, tmp_path, monkeypatch, method):
    monkeypatch.setattr(stages, "LEAST", 150)
    monkeypatch.setattr(stages, "EPOCHS", 2)
    monkeypatch.setattr(stages, "SOFT_STEPS", 40)
    monkeypatch.setattr(pruning, "CONTEST_STEPS", 20)
    monkeypatch.setattr(stages, "RATES", (1e-5, 4e-3))
    options = {"epochs": None, "prune_epochs": None, "lr": None, "method": method, "target_flops": 0.6}
    run = run_of(toy, tmp_path / "out", **options)
    dense = stages.fine_tune(run)
    trained = json.loads((dense / SUMMARY).read_text())["trained"]
    assert trained["rate"] == 4e-3 and 0 < trained["steps"] <= 150
    pruned = pruning.prune_and_train(run, dense, run.work.folder / "pruned", run.spec.method_options)
    stage = json.loads((pruned / "stage.json").read_text())
    assert (stage["contest"] is not None) == (method == "ltp")
    before = 60 if method == "ltp" else 0  # it learns, and has to beat its start
    assert stage["rate"] in stages.RATES and before < stage["steps"] <= before + 150
    best, losses = json.loads((run.work.folder / "schedule-0.6.json").read_text())
    assert losses[best][-1] == min(loss[-1] for loss in losses.values() if len(loss) == 2)
    space = stages.space_of(run, run.model(dense))
    keep = "keep" if method == "topk" else "schedule"
    assert stage["schedule"][keep] == [*space.falling(float(best), 0.6)["keep"]]
    assert stage["reached"]["flops_fraction"] == pytest.approx(0.6, rel=0.05)
    said = predict(load(str(pruned))[0], run.data.validation)
    assert said.macs_used / said.macs_dense == pytest.approx(0.6, rel=0.05)
    (out,) = [jobs.measure(run, dense, pruned)]
    assert out["rates"] == {"dense": 4e-3, "prune": stage["rate"]} and out["schedule"] == stage["schedule"]


def test_the_first_layers_alone_are_a_baseline(toy, tmp_path):
    run = run_of(toy, tmp_path / "out", method="dense", layers=1, target_flops=None)
    dense = stages.fine_tune(run)
    pruned = pruning.prune_and_train(run, dense, run.work.folder / "pruned", {})
    net = load(str(pruned))[0]
    assert len(net.bert.encoder.layer) == 1 == net.config.num_hidden_layers
    row = jobs.measure(run, dense, pruned)["rows"][1]
    assert row["flops_ratio"] == pytest.approx(2.0), "against all layers"
    with pytest.raises(ValueError, match=r"layers=9: .* has 2"):
        run.model(dense, layers=9)


@pytest.mark.parametrize("fresh", [True, False], ids=["a new head", "a head that was trained"])
def test_a_new_head_of_one_number_starts_at_the_mean(toy, tmp_path, fresh):
    for part in ("train", "test"):
        text = (Path(toy.data) / f"{part}.csv").read_text()
        (tmp_path / "grades").mkdir(exist_ok=True)
        graded = text.replace(",wheat", ",4.5").replace(",chaff", ",2.75")
        (tmp_path / "grades" / f"{part}.csv").write_text(graded)
    net, tokenizer = load(toy.model)
    net.config.num_labels, net.classifier = 1, torch.nn.Linear(net.config.hidden_size, 1)
    for part in (net.base_model if fresh else net, tokenizer):
        part.save_pretrained(tmp_path / "model")
    before = net.classifier.bias.item()
    data = SimpleNamespace(model=str(tmp_path / "model"), data=str(tmp_path / "grades"))
    run = run_of(data, tmp_path / "out", epochs=0, target_flops=0.7)
    bias = load(str(stages.fine_tune(run)))[0].classifier.bias.item()
    mean = sum(run.data.train["labels"]) / len(run.data.train)
    assert bias == pytest.approx(mean if fresh else before) and 2.75 < mean < 4.5
