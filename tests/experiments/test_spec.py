"""Specifications: what is left open is settled by recipe, folder and custom; a job takes one, or its fields."""

from __future__ import annotations

import dataclasses
import json
import logging
from types import SimpleNamespace

import pytest
import torch

from support.toy import OPTIONS, make_toy, write
from thresher.data.models import load
from thresher.experiments.evaluate import evaluate
from thresher.experiments.spec import (
    SUMMARY,
    AuditSpec,
    BenchSpec,
    EvalSpec,
    ExportSpec,
    ShowSpec,
    TrainSpec,
    TuneSpec,
    job,
)
from thresher.experiments.train import train

FAST = OPTIONS | {"epochs": 0, "prune_epochs": 0, "max_length": 16}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> SimpleNamespace:
    """A model, data, and a folder that was trained on a column of another name."""
    folder = tmp_path_factory.mktemp("toy")
    toy = make_toy(folder)
    for part in ("train", "test"):
        file = folder / "farm" / f"{part}.csv"
        file.write_text(file.read_text().replace("text,label", "words,kind", 1))
    toy.out = folder / "out"
    train(toy.model, toy.data, toy.out, text="words", label="kind", **FAST)
    toy.plain = str(write(folder / "plain" / "test.csv", 20, 3).parent)
    return toy


# --- methods and their amounts ---------------------------------------------------------------------------------------
def options(**given) -> dict:
    return TrainSpec(model="m", data="d", out="o", **given).completed().method_options


def drop(**given) -> float | None:
    return TrainSpec(model="m", data="d", out="o", **given).completed().max_drop


def test_where_nothing_says_how_much_is_left_quality_is_the_budget():
    assert (options(), drop()) == ({}, 1.0)
    assert (options(at=(1, 2)), drop(at=(1, 2))) == ({"at": (1, 2)}, 1.0), "where tokens leave is not how many"
    assert (options(method="top", method_options={"topk": 9}), drop(method="top")) == ({"topk": 9}, 1.0)
    assert (drop(recipe="ltp-mrpc"), drop(max_drop=0.5)) == (1.0, 0.5)
    assert drop(keep=0.5) is drop(target_flops=0.4) is drop(method="dense") is drop(replay="another") is None


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"target_flops": 0.4}, "target_flops is another budget"),
        ({"keep": 0.5}, "keep is another budget"),
        ({"method": "threshold"}, "max_drop=1.0 is no budget for method='threshold'"),
        ({"max_drop": 0.0}, "max_drop is a number of points above 0"),
    ],
)
def test_a_bound_on_the_drop_is_a_budget_of_its_own(given, why):
    with pytest.raises(ValueError, match=why):
        options(**{"max_drop": 1.0} | given)


def test_an_open_length_is_until_it_is_trained():
    spec = TrainSpec(model="m", data="d", out="o").completed()
    assert spec.epochs is spec.prune_epochs is spec.lr is None and spec.batch_size == 32
    fixed = TrainSpec(model="m", data="d", out="o", epochs=1, prune_epochs=2).completed()
    assert (fixed.epochs, fixed.prune_epochs, fixed.lr) == (1, 2, 5e-5)
    assert TrainSpec(model="m", data="d", out="o", replay="x").completed().prune_epochs == 3


@pytest.mark.parametrize(
    ("method", "amount"),
    [("topk", {"keep": 0.5}), ("top", {"target_latency": 0.5}), ("top", {"target_latency_ms": 3.0})],
)
def test_another_amount_takes_the_place_of_the_budget(method, amount):
    assert options(method=method, **amount) == amount


def test_methods_without_a_budget_get_none():
    assert options(method="threshold", method_options={"thresholds": 0.1}) == {"thresholds": 0.1}
    assert options(method="dense") == options(method="topk", replay="another") == {}
    assert options(method_options={"target_flops": None}) == {"target_flops": None}, "asked for by name"


def test_the_saved_recipe_holds_what_decides_the_result_and_nothing_else():
    spec = TrainSpec(model="m", data="d", out="o", threads=3, fresh=True, keep=0.5, method="topk", recipe="ltp-mrpc")
    saved = spec.completed().saved()
    assert not {"out", "threads", "fresh", "recipe", "keep", "at", "target_flops"} & {*saved}
    assert (saved["method"], saved["method_options"], saved["max_length"]) == ("topk", {"keep": 0.5}, 128)
    assert json.loads(json.dumps(saved)) == saved


# --- what a folder remembers -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["out", "out/dense"])
@pytest.mark.parametrize("kind", [EvalSpec, BenchSpec, AuditSpec])
def test_a_folder_remembers_its_task(toy, caplog, where, kind):
    caplog.set_level(logging.INFO, "thresher")
    spec = kind(model=toy.out.parent / where).completed()
    known = (spec.data, spec.text, spec.label, spec.metric, spec.max_length)
    assert known == (toy.data, ("words",), "kind", "accuracy", 16)
    (line,) = caplog.messages
    assert line.startswith("as trained: ") and all(word in line for word in (toy.data, "words", "kind", "16"))
    caplog.clear()
    assert spec.completed() == spec and not caplog.messages, "nothing is open any more"


def test_columns_belong_to_their_data(toy, monkeypatch):
    monkeypatch.chdir(toy.out.parent)
    same = EvalSpec(model=toy.out, data="farm").completed()
    other = EvalSpec(model=toy.out, data=toy.plain).completed()
    assert (same.text, same.label, same.max_length) == (("words",), "kind", 16)
    assert (other.text, other.label, other.max_length) == (None, None, 16)
    assert [row["max_length"] for row in evaluate(toy.out, toy.plain)] == [16, 16]


def test_another_length_than_the_trained_one_is_told(toy):
    with pytest.warns(UserWarning, match="max_length=32: the model was trained at 16"):
        assert EvalSpec(model=toy.out, max_length=32).completed().max_length == 32
    assert EvalSpec(model=toy.model, data=toy.data).completed().max_length == 256


def test_data_are_taken_only_where_they_are_read(toy):
    assert ExportSpec(model=toy.out, out="o").completed().data is None
    calibrated = ExportSpec(model=toy.out, out="o", format="openvino", precision="int8").completed()
    assert (calibrated.data, calibrated.text, calibrated.max_length) == (toy.data, ("words",), 16)
    assert ShowSpec(model=toy.out, texts=["wheat"]).completed().data is None
    assert ShowSpec(model=toy.out).completed().data == toy.data
    assert TuneSpec(model=toy.out / "dense", out="o", target_flops=0.5).completed().metric is None


@pytest.mark.parametrize("content", [None, "{", "[]", '{"task": 3}', '{"rows": []}'])
def test_a_folder_that_remembers_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / SUMMARY).write_text(content)
    with pytest.raises(ValueError, match="name the data"):
        EvalSpec(model=tmp_path).completed()
    with pytest.raises(ValueError, match="needs texts to calibrate on"):
        ExportSpec(model=tmp_path, out="o", format="openvino", precision="int8").completed()


# --- jobs ------------------------------------------------------------------------------------------------------------
def test_a_job_takes_a_specification_or_its_fields(toy):
    @job(EvalSpec)
    def seen(spec, *, progress=None):
        return spec, progress, torch.get_num_threads()

    before = torch.get_num_threads()
    spec = EvalSpec(model=toy.model, data=toy.data, threads=before + 1)
    assert seen(spec, progress=3) == seen(toy.model, toy.data, threads=before + 1, progress=3)
    assert seen(spec)[0].max_length == 256 and seen(spec)[2] == before + 1 and torch.get_num_threads() == before
    with pytest.raises(TypeError, match="lengthy"):
        seen(toy.model, toy.data, lengthy=3)
    assert dataclasses.is_dataclass(EvalSpec) and spec.max_length is None, "a specification stays as it was given"


def test_a_row_says_the_precision_that_the_model_runs_in(toy, tmp_path):
    net, tokenizer = load(str(toy.out / "dense"))
    for part in (net.bfloat16(), tokenizer):
        part.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="is saved in bfloat16 and runs in it"):
        rows = evaluate(str(tmp_path), toy.data, text="words", label="kind")
    assert [row["precision"] for row in rows] == ["bf16"]
    assert [row["precision"] for row in evaluate(str(toy.out / "dense"))] == ["fp32"]
