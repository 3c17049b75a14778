"""The main job from end to end on a toy that can be learned: its result, its mistakes, and what interrupts it."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

from support.families import TEXT
from support.tiny import tiny_tokenizer
from support.toy import OPTIONS, make_toy, write
from thresher.cli import app as cli
from thresher.data.models import load
from thresher.data.task import DataError
from thresher.evaluation.rows import ROW_FIELDS
from thresher.experiments import stages
from thresher.experiments import train as jobs
from thresher.experiments.bench import bench
from thresher.experiments.evaluate import evaluate
from thresher.experiments.workspace import Workspace
from thresher.training.checkpoints import step_of

UNTRAINED = OPTIONS | {"epochs": 0, "prune_epochs": 0}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> SimpleNamespace:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("trained") / "out"
    rows = jobs.train(toy.model, toy.data, str(out), **OPTIONS)
    return SimpleNamespace(out=out, rows=rows, summary=json.loads((out / jobs.SUMMARY).read_text()))


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def assert_same(found: Path, expected: Path) -> None:
    """The same result, but for the time that it took."""
    summaries = [json.loads((folder / jobs.SUMMARY).read_text()) for folder in (found, expected)]
    for summary in summaries:
        del summary["seconds"]
        for row in summary["rows"]:
            row.update(date=None, command=None)
    assert summaries[0] == summaries[1]
    for name, tensor in weights(expected).items():
        torch.testing.assert_close(
            weights(found)[name], tensor, atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def fails(*arguments: object) -> str:
    """The one line that the command line answers with."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in result.stderr
    return line


# --- the result ------------------------------------------------------------------------------------------------------
def test_the_rows_are_complete_and_true(toy, trained):
    dense, pruned = trained.rows
    assert set(dense) == set(pruned) == set(ROW_FIELDS)
    for row in trained.rows:
        known = ("farm", "model", 0, "torch", "fp32", "accuracy", "test", 32, 48)
        names = ("task", "model", "seed", "runtime", "precision", "metric", "split", "max_length", "n_examples")
        assert tuple(row[name] for name in names) == known
        assert row["selected_on"].startswith("10% of train") and row["threads"] == torch.get_num_threads()
        assert row["quality_dense"] == dense["quality"] and row["hardware"] and row["versions"] and row["date"]
        assert row["latency_ms_p50"] is None, "nothing was timed"
    assert (dense["method"], dense["mode"], dense["flops_ratio"], dense["target_flops"]) == (
        ("dense", "dense-unpadded", 1.0, None)
    )
    assert (pruned["method"], pruned["mode"], pruned["target_flops"]) == ("ltp", "pruned", 0.5)
    assert (dense["trained_steps"], pruned["trained_steps"]) == (27, 18)
    assert trained.summary["steps"] == {"dense": 27, "prune": 18}
    assert dense["quality"] > 90 and pruned["quality"] > 90, "the toy is easy"
    assert 1 / pruned["flops_ratio"] == pytest.approx(0.5, rel=0.1), "on texts that chose nothing"
    assert trained.summary["reached"]["flops_fraction"] == pytest.approx(0.5, rel=0.02)
    tokens = [len(ids) for ids in tiny_tokenizer()([line["text"] for line in csv_rows(toy, "test")])["input_ids"]]
    assert pruned["tokens_mean"] == pytest.approx(sum(tokens) / 48)


def csv_rows(toy, part: str) -> list[dict]:
    with open(Path(toy.data) / f"{part}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_folder_is_whole(trained):
    names = {file.name for file in trained.out.iterdir()}
    assert {"config.json", "model.safetensors", "dense", jobs.SUMMARY, "tokenizer.json"} <= names
    assert [file.name for file in trained.out.parent.iterdir()] == ["out"], "nothing is left beside it"
    own, dense = (json.loads((f / "config.json").read_text()) for f in (trained.out, trained.out / "dense"))
    assert own["token_pruning"]["method"] == "ltp" and "token_pruning" not in dense
    assert own["id2label"] == {"0": "chaff", "1": "wheat"}
    assert "token_pruner.threshold" in weights(trained.out) and (trained.out / "dense" / "model.safetensors").exists()
    assert json.loads((trained.out / jobs.SUMMARY).read_text())["rows"] == trained.rows


def test_what_was_saved_does_what_was_measured(toy, trained):
    model, tokenizer = load(str(trained.out))
    right, said = 0, []
    for line in csv_rows(toy, "test"):
        with torch.no_grad():
            said.append(model(**tokenizer(line["text"], return_tensors="pt")).logits.argmax().item())
        right += model.config.id2label[said[-1]] == line["label"]
    assert model.token_pruner.name == "ltp" and model.token_pruner.report[-1]["tokens_kept"] < 6
    assert 100 * right / 48 == pytest.approx(trained.rows[1]["quality"])
    assert said == trained.summary["predictions"]["pruned"]


def test_evaluate_says_the_same(toy, trained):
    pruned, dense = evaluate(str(trained.out), toy.data, max_length=32)
    for name in ("quality", "quality_dense", "flops_ratio", "mode", "method", "tokens_mean", "n_examples"):
        assert pruned[name] == pytest.approx(trained.rows[1][name]), name
    assert dense["flops_ratio"] == 1 and dense["mode"] == "dense-unpadded"
    with (
        pytest.warns(UserWarning, match="max_length=10000: the model was trained at 32"),
        pytest.warns(UserWarning, match="max_length=10000 is more than the 512 positions"),
    ):
        (row,) = evaluate(str(trained.out / "dense"), toy.data, max_length=10**4, limit=8)
    assert row["max_length"] == 512, "what the positions allow"
    assert row["method"] == "dense" and row["n_examples"] == 8


def test_bench_rows(toy, trained):
    said = []
    few = {"repeats": 1, "limit": 8, "max_length": 32}
    rows = bench(str(trained.out), toy.data, batch_size=(1, 4), progress=lambda *a: said.append(a), **few)
    found = {(row["method"], row["mode"], row["batch_size"]) for row in rows}
    modes = {("dense", "dense-padded"), ("dense", "dense-unpadded"), ("ltp", "pruned")}
    modes |= {("random", "pruned"), ("firstk", "pruned")}
    assert found == {(*mode, size) for mode in modes for size in (1, 4)} and len(rows) == 10 and said
    expected = evaluate(str(trained.out), toy.data, max_length=32, limit=8)[0]
    for row in rows:
        assert row["latency_ms_p50"] > 0 and row["n_examples"] == 8 and row["split"] == "test"
        if row["method"] == "ltp":
            assert row["flops_ratio"] == pytest.approx(expected["flops_ratio"])
            assert row["efficiency"] == pytest.approx(row["speedup_unpadded"] / row["flops_ratio"])
    with pytest.raises(ValueError, match="is not pruned: there is nothing to compare"):
        bench(str(trained.out / "dense"), toy.data, **few)


def test_bf16_is_for_training_alone(toy, trained, tmp_path, monkeypatch):
    """The Trainer leaves autocast behind; what the row calls fp32 is fp32."""
    seen, predict = [], jobs.predict
    monkeypatch.setattr(jobs, "predict", lambda *a, **k: seen.append(predict(*a, **k)) or seen[-1])
    options = OPTIONS | {"epochs": 0, "prune_epochs": 1, "bf16": True, "dense_model": str(trained.out / "dense")}
    rows = jobs.train(toy.model, toy.data, str(tmp_path / "out"), **options)
    assert len(seen[-1].logits) == 48 and not torch.equal(seen[-1].logits, seen[-1].logits.bfloat16().float())
    assert evaluate(str(tmp_path / "out"), toy.data)[0]["flops_ratio"] == pytest.approx(rows[1]["flops_ratio"])


# --- other recipes ---------------------------------------------------------------------------------------------------
def test_replay_keeps_the_same_counts(toy, trained, tmp_path):
    options = {k: v for k, v in OPTIONS.items() if k != "target_flops"} | {"epochs": 0, "prune_epochs": 1}
    options |= {"dense_model": str(trained.out / "dense"), "replay": str(trained.out)}
    for method in ("topk", "firstk"):
        out = tmp_path / method
        dense, row = jobs.train(toy.model, toy.data, str(out), **options | {"method": method})
        assert json.loads((out / jobs.SUMMARY).read_text())["kept"] == pytest.approx(trained.summary["kept"])
        assert row["method"] == method and row["trained_steps"] == 9 and dense["trained_steps"] == 0
        assert not (out / "dense").exists(), "it was given"
        if method == "topk":  # first-k needs no scores, which cost something
            assert row["flops_ratio"] == pytest.approx(trained.rows[1]["flops_ratio"], rel=1e-9)


def test_dense_is_trained_on_and_not_pruned(toy, trained, tmp_path):
    options = OPTIONS | {"target_flops": None, "epochs": 0, "prune_epochs": 1}
    rows = jobs.train(str(trained.out / "dense"), toy.data, str(tmp_path / "out"), **options | {"method": "dense"})
    assert [row["method"] for row in rows] == ["dense", "dense"] and rows[1]["flops_ratio"] == 1
    assert rows[1]["mode"] == "dense-unpadded" and rows[1]["trained_steps"] == 9
    model, _ = load(str(tmp_path / "out"))
    assert not hasattr(model, "token_pruner") and "token_pruner.threshold" not in weights(tmp_path / "out")
    moved = weights(tmp_path / "out")["classifier.weight"] - weights(trained.out / "dense")["classifier.weight"]
    assert moved.abs().max() > 1e-4


# --- the same call again ---------------------------------------------------------------------------------------------
def test_the_same_call_returns_at_once(toy, trained, monkeypatch):
    monkeypatch.setattr(stages, "load_task", lambda *a, **k: pytest.fail("the data were read again"))
    assert jobs.train(toy.model, toy.data, str(trained.out), **OPTIONS) == trained.rows
    with pytest.raises(ValueError, match=r"another recipe \(lr: 0\.004 there, 0\.001 asked; seed: 0 there, 3 asked\)"):
        jobs.train(toy.model, toy.data, str(trained.out), **OPTIONS | {"lr": 1e-3, "seed": 3})


NEWER = ("runtime", "precision", "serve_batch")


def test_a_folder_made_before_there_was_an_option_had_its_default(toy, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "load_task", lambda *a, **k: pytest.fail("the data were read again"))
    old = {name: value for name, value in trained.summary["recipe"].items() if name not in NEWER}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / jobs.SUMMARY).write_text(json.dumps(trained.summary | {"recipe": old}))
    assert jobs.train(toy.model, toy.data, str(tmp_path / "out"), **OPTIONS) == trained.rows
    timed = OPTIONS | {"method": "top", "target_flops": None, "target_latency_ms": 20.0, "serve_batch": 8}
    with pytest.raises(ValueError, match=r"another recipe \(.*serve_batch: 1 there, 8 asked"):
        jobs.train(toy.model, toy.data, str(tmp_path / "out"), **timed)


def test_what_another_version_began_is_not_gone_on_with(toy, trained, tmp_path):
    folder = tmp_path / ".out.training"
    folder.mkdir()
    old = {name: value for name, value in trained.summary["recipe"].items() if name not in NEWER}
    (folder / "recipe.json").write_text(json.dumps(old))
    told = r"begun by another version, which did not know precision, runtime, serve_batch: choose another folder"
    with pytest.raises(ValueError, match=told):
        jobs.train(toy.model, toy.data, str(tmp_path / "out"), **OPTIONS)
    with pytest.raises(ValueError, match=r"another recipe \(seed: 0 there, 1 asked\)"):
        jobs.train(toy.model, toy.data, str(tmp_path / "out"), **OPTIONS | {"seed": 1})


def test_fresh_starts_anew(toy, tmp_path):
    out = tmp_path / "out"
    jobs.train(toy.model, toy.data, str(out), **UNTRAINED)
    (out / "mark").touch()
    jobs.train(toy.model, toy.data, str(out), **UNTRAINED)
    assert (out / "mark").exists()
    with pytest.raises(DataError):  # a mistake costs nothing
        jobs.train(toy.model, str(tmp_path / "none.csv"), str(out), fresh=True, **UNTRAINED)
    assert (out / "mark").exists()
    rows = jobs.train(toy.model, toy.data, str(out), fresh=True, **UNTRAINED | {"seed": 3})
    assert not (out / "mark").exists() and rows[0]["seed"] == 3


def test_a_finished_result_stays_until_the_new_one_is_there(toy, tmp_path, monkeypatch):
    out = tmp_path / "out"
    jobs.train(toy.model, toy.data, str(out), **UNTRAINED)
    whole = jobs.measure

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        jobs.train(toy.model, toy.data, str(out), fresh=True, **UNTRAINED | {"seed": 3})
    assert json.loads((out / jobs.SUMMARY).read_text())["recipe"]["seed"] != 3, "the old one is there"
    monkeypatch.setattr(jobs, "measure", whole)
    rows = jobs.train(toy.model, toy.data, str(out), **UNTRAINED | {"seed": 3})
    assert rows[0]["seed"] == 3, "the same call without it goes on"
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_fresh_does_not_remove_what_it_reads(toy, tmp_path):
    out = tmp_path / "out"
    jobs.train(toy.model, toy.data, str(out), **UNTRAINED)
    again = UNTRAINED | {"seed": 3, "epochs": 0}
    with pytest.raises(ValueError, match=r"model=.*dense lies in .*, which --fresh replaces: choose another folder"):
        jobs.train(str(out / "dense"), toy.data, str(out), fresh=True, **again)
    assert (out / "dense" / "config.json").exists()


@pytest.mark.parametrize("when", ["finished", "begun"])
@pytest.mark.parametrize("what", ["data", "model"])
def test_changed_files_are_not_gone_on_with(toy, tmp_path, monkeypatch, what, when):
    """Rows of the new test part may be among the old ones that were trained on."""
    places = {"data": tmp_path / "data", "model": tmp_path / "model"}
    for name, place in places.items():
        shutil.copytree(getattr(toy, name), place)
    call = (str(places["model"]), str(places["data"]), str(tmp_path / "out"))
    if when == "begun":
        with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
            during.setattr(jobs, "measure", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
            jobs.train(*call, **UNTRAINED)
    else:
        jobs.train(*call, **UNTRAINED)
    file = places["model"] / "config.json" if what == "model" else next(places["data"].iterdir())
    file.write_text(file.read_text() + "\n")
    with pytest.raises(ValueError, match=rf"{what} \(.*\) changed since .* was made: choose another folder, or start"):
        jobs.train(*call, **UNTRAINED)
    jobs.train(*call, fresh=True, **UNTRAINED)


def test_a_run_that_was_stopped_before_its_delivery_goes_on(toy, tmp_path, monkeypatch):
    given = (toy.model, toy.data, str(tmp_path / "out"))
    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(Workspace, "deliver", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        jobs.train(*given, **UNTRAINED)
    rows = jobs.train(*given, **UNTRAINED)
    assert len(rows) == 2 and not (tmp_path / "out" / "stage.json").exists()


def test_a_model_that_is_taken_as_it_is_keeps_the_order_of_its_classes(toy, tmp_path):
    """The data alone would sort them."""
    model = tmp_path / "model"
    net, tokenizer = load(toy.model)
    net.config.id2label, net.config.label2id = {0: "wheat", 1: "chaff"}, {"wheat": 0, "chaff": 1}
    net.config.architectures = [type(net).__name__]
    for part in (net, tokenizer):
        part.save_pretrained(model)
    dense, _ = jobs.train(str(model), toy.data, str(tmp_path / "out"), **UNTRAINED | {"epochs": 0})
    names = json.loads((tmp_path / "out" / "dense" / "config.json").read_text())["id2label"]
    assert names == {"0": "wheat", "1": "chaff"}
    expected = evaluate(str(model), toy.data)
    assert dense["quality"] == pytest.approx(expected[0]["quality"])


@pytest.mark.parametrize("fresh", [False, True])
def test_what_is_not_ours_is_left_alone(toy, tmp_path, fresh):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"is not empty and holds no thresher\.json"):
        jobs.train(toy.model, toy.data, str(tmp_path), fresh=fresh, **UNTRAINED)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


# --- mistakes --------------------------------------------------------------------------------------------------------
def spoiled(toy, folder: Path) -> Path:
    """The model, with half of its weights."""
    shutil.copytree(toy.model, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return folder


MISTAKES = {
    "method": (lambda toy, t: ({"method": "nope"}), r"unknown pruning method 'nope'; known: .*ltp"),
    "target": (lambda toy, t: ({"target_flops": 1.5}), r"target_flops=1\.5: expected a fraction"),
    "option": (
        lambda toy, t: ({"method": "threshold"}),
        r"threshold has no target_flops; it has at, min_tokens",
    ),
    "layer": (lambda toy, t: ({"at": (0, 7)}), r"at=\[0, 7\]: layer 7 is not possible"),
    "no data": (lambda toy, t: ({"data": str(t / "none.csv")}), r"none\.csv' is no file or folder"),
    "no train": (lambda toy, t: ({"data": str(write(t / "d" / "test.csv", 20, 0).parent)}), "no training part"),
    "class": (lambda toy, t: ({"data": str(write(t / "one.csv", 40, 0, ["chaff"]))}), "only the class chaff"),
    "no model": (lambda toy, t: ({"model": str(t / "none")}), "cannot be loaded, expected a model folder or a hub id"),
    "weights": (lambda toy, t: ({"model": str(spoiled(toy, t / "m"))}), "corrupted checkpoint: the weights in"),
    "pruned": (lambda toy, t: ({"model": str(toy.pruned)}), "is pruned already: train from its dense model"),
    "dense model": (lambda toy, t: ({"dense_model": str(t)}), "cannot be loaded, expected a model folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_and_leave_nothing_behind(toy, trained, tmp_path, mistake):
    toy.pruned = trained.out
    change, message = MISTAKES[mistake]
    options = {"model": toy.model, "data": toy.data, **UNTRAINED, **change(toy, tmp_path)}
    (tmp_path / "notes.txt").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message) as error:
        jobs.train(out=str(tmp_path / "out"), **options)
    assert "\n" not in str(error.value)
    assert [f for f in sorted(tmp_path.iterdir()) if f.name != ".out.training"] == before
    if mistake != "layer":  # what a model cannot do is known when it is there
        assert sorted(tmp_path.iterdir()) == before


def test_long_texts_are_cut_and_counted(toy, tmp_path):
    model = BertForSequenceClassification(BertConfig(**TEXT | {"num_hidden_layers": 2, "max_position_embeddings": 10}))
    model.save_pretrained(tmp_path / "short")
    tiny_tokenizer().save_pretrained(tmp_path / "short")
    out = tmp_path / "out"
    with pytest.warns(UserWarning) as caught:
        rows = jobs.train(
            str(tmp_path / "short"), toy.data, str(out), **UNTRAINED | {"target_flops": None, "method": "dense"}
        )
    said = [str(warning.message) for warning in caught]
    assert said[0] == "max_length=32 is more than the 10 positions of the model; 10 is used"
    lengths = [len(ids) for ids in tiny_tokenizer()([line["text"] for line in csv_rows(toy, "test")])["input_ids"]]
    cut = json.loads((out / jobs.SUMMARY).read_text())["texts_cut"]
    assert cut["test"] == sum(n > 10 for n in lengths) and 0 < cut["test"] < 48
    assert f"{cut['test']} of 48 texts are longer than 10 tokens and were cut" in said
    assert rows[0]["max_length"] == 10 and rows[0]["tokens_mean"] == sum(min(n, 10) for n in lengths) / 48


def command_line(toy, out: Path) -> tuple:
    options = "--epochs 0 --prune-epochs 1 --batch-size 16 --max-length 32 --no-bf16 --no-freeze-embeddings --quiet"
    return ("train", toy.model, "--data", toy.data, "--out", out, "--target-flops", "0.6", *options.split())


def test_an_output_that_cannot_be_written_is_told(toy, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "cannot write" in fails(*command_line(toy, tmp_path / "file"))
    assert "cannot write" in fails(*command_line(toy, tmp_path / "file" / "out"))
    assert (tmp_path / "file").read_text() == "in the way"
    if os.geteuid():  # who may write everywhere is not kept out
        tmp_path.chmod(0o500)
        assert "Permission denied" in fails(*command_line(toy, tmp_path / "out"))


@pytest.mark.parametrize("room", [100, 40_000, 200_000], ids=["recipe", "dense", "checkpoint"])
def test_a_full_disk_is_told_and_nothing_is_half_written(toy, tmp_path, room):
    """No file may be over ``room`` bytes: writing really fails, of the recipe, the weights or the optimiser's state."""
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (Path(toy.model) / "model.safetensors").stat().st_size
    assert 40_000 < size < 200_000 < 2 * size, "the optimiser's state is twice the weights"
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        line = fails(*command_line(toy, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"cannot write in {tmp_path / '.out.training'}, is the disk full? (" in line
    assert not out.exists()
    result = CliRunner().invoke(cli.app, [*map(str, command_line(toy, out))])
    assert result.exit_code == 0, result.output
    assert [file.name for file in tmp_path.iterdir()] == ["out"] and (out / jobs.SUMMARY).exists()


# --- interruptions ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", [5, 30, 40], ids=["dense", "soft", "hard"])
def test_interrupted_training_goes_on(toy, trained, tmp_path, monkeypatch, capsys, step):
    """Step 5 is one of the dense model's 27; 30 and 40 are the 3rd and the 13th of the 18 with the method."""
    made, once = [], stages.Trainer.training_step

    def training_step(self, *arguments, **options):
        made.append(self)
        if len(made) == step:
            signal.raise_signal(signal.SIGINT)
        return once(self, *arguments, **options)

    monkeypatch.setattr(stages.Trainer, "training_step", training_step)
    before, out = signal.getsignal(signal.SIGINT), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        jobs.train(toy.model, toy.data, str(out), **OPTIONS)
    assert signal.getsignal(signal.SIGINT) is before and not out.exists()
    stage, steps = ("dense", step) if step <= 27 else ("pruned", step - 27)
    checkpoint = tmp_path / ".out.training" / f"{stage}-checkpoints" / f"checkpoint-{steps}"
    assert (checkpoint / "trainer_state.json").exists() and len(made) == step
    with pytest.raises(ValueError, match=r"another recipe \(seed: 0 there, 1 asked\)"):
        jobs.train(toy.model, toy.data, str(out), **OPTIONS | {"seed": 1})
    # what a second Ctrl-C leaves: a checkpoint that is not whole
    shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-99"))
    (checkpoint.with_name("checkpoint-99") / "trainer_state.json").write_text('{"epoch": 1')
    capsys.readouterr()
    jobs.train(toy.model, toy.data, str(out), **OPTIONS | {"progress": True})
    assert f"resumed: {stage} training goes on after step {steps}\n" in capsys.readouterr().out
    assert len(made) == 27 + 18 and [file.name for file in tmp_path.iterdir()] == ["out"]
    assert_same(out, trained.out)


def test_interrupted_after_training_nothing_is_trained_again(toy, trained, tmp_path, monkeypatch):
    out, row = tmp_path / "out", jobs.measured_row
    monkeypatch.setattr(jobs, "measured_row", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        jobs.train(toy.model, toy.data, str(out), **OPTIONS)
    assert not out.exists()
    monkeypatch.setattr(jobs, "measured_row", row)
    monkeypatch.setattr(stages.Trainer, "training_step", lambda *a, **k: pytest.fail("trained again"))
    jobs.train(toy.model, toy.data, str(out), **OPTIONS)
    assert_same(out, trained.out)


@pytest.mark.slow
def test_ctrl_c_at_the_command_line(toy, trained, tmp_path):
    """A process of its own, a real signal, and the same command again."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-c",
        "from thresher.cli.app import main; main()",
        "train",
        toy.model,
        "--data",
        toy.data,
    ]
    command += "--batch-size 16 --max-length 32 --epochs 30 --prune-epochs 2 --lr 4e-3 --no-bf16".split()  # noqa: SIM905
    command += ["--method", "ltp", "--target-flops", "0.5", "--threads", "1", "--out", str(out)]
    first, text = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ), b""
    while b"'loss'" not in text:  # the first is logged at step 20 of 270
        text += os.read(first.stderr.fileno(), 4096)
        assert first.poll() is None, text.decode()
    first.send_signal(signal.SIGINT)
    said = first.communicate(timeout=120)[1].decode()
    assert first.returncode == 130 and "interrupted; run the same command again to resume" in said
    assert "Traceback" not in said and not out.exists()
    (checkpoint,) = (tmp_path / ".out.training" / "dense-checkpoints").glob("checkpoint-*")
    assert 20 <= step_of(checkpoint) < 270
    second = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=280)
    assert second.returncode == 0, second.stderr
    assert f"resumed: dense training goes on after step {step_of(checkpoint)}" in second.stderr
    options = OPTIONS | {"epochs": 30, "progress": False}
    jobs.train(toy.model, toy.data, str(tmp_path / "whole"), **options)
    assert_same(out, tmp_path / "whole")
