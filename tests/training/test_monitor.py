"""What is logged of a training with pruning, epoch by epoch."""

from __future__ import annotations

import json

import pytest
import torch

from support.toy import OPTIONS, make_toy
from thresher import ToP, prune
from thresher.data.load import load_task
from thresher.data.models import load
from thresher.data.tokenize import tokenize
from thresher.evaluation.predict import predict, quality
from thresher.experiments import train as jobs


def test_every_epoch_is_watched_on_the_validation_part(tmp_path):
    toy = make_toy(tmp_path)
    out = tmp_path / "out"
    jobs.train(toy.model, toy.data, str(out), **OPTIONS | {"method": "top", "method_options": {"holes": True}})
    summary = json.loads((out / jobs.SUMMARY).read_text())
    epochs = [line for line in summary["history"] if "eval_quality" in line]
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert epochs[-1]["eval_flops_fraction"] == pytest.approx(0.5, rel=0.1)
    assert all(0 < line["eval_kept_0"] <= 1 for line in epochs) and 0 <= epochs[-1]["eval_quality"] <= 100
    assert (out / jobs.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert "prefix_drop" in summary["reached"]


def test_the_drop_of_a_prefix_is_measured_and_nothing_changes(tmp_path):
    toy = make_toy(tmp_path)
    model, tokenizer = load(toy.model)
    prune(model, ToP(bins=4, holes=True))
    task = load_task(toy.data)
    rows, _ = tokenize(task.test, task, tokenizer, 32)

    def judge() -> tuple[float, float]:
        said = predict(model, rows)
        return quality(said, rows, "accuracy"), said.macs_used / said.macs_dense

    nothing = {"prefix_drop": 0, "prefix_flops_fraction": 1}  # nothing leaves, so nothing is scored
    assert model.token_pruner.ablations(judge) == nothing
    model.token_pruner.mask[:, :2] = False
    before, own = model.token_pruner.mask.clone(), quality(predict(model, rows), rows, "accuracy")
    found = model.token_pruner.ablations(judge)
    assert model.token_pruner.mask.equal(before)
    model.token_pruner.prefix()
    after = predict(model, rows)
    assert found["prefix_drop"] == own - quality(after, rows, "accuracy")
    assert found["prefix_flops_fraction"] == after.macs_used / after.macs_dense < 1
    model.token_pruner.mask.copy_(before)
    assert not torch.equal(after.logits, predict(model, rows).logits)
    assert ToP(bins=4).ablations(judge) == {}, "masks without holes have nothing to compare"
