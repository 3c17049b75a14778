"""The strongest budget within a bound on the drop: what is tried, what is taken, and what the user is told."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from support.toy import OPTIONS, make_toy
from thresher.cli.train import budget_lines
from thresher.data.models import load
from thresher.evaluation.predict import Predictions
from thresher.experiments import stages, strongest
from thresher.experiments import train as jobs

BOUND = {name: value for name, value in OPTIONS.items() if name not in ("target_flops", "progress", "method")}

EMPTY = dict.fromkeys(("kept", "tokens", "rows_used", "rows_dense"), torch.zeros(0))


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> SimpleNamespace:
    return make_toy(tmp_path_factory.mktemp("toy"))


def trained(toy, out, monkeypatch, lost: dict[float, float] | None = None, **options):
    """A run without a training, in which the drops are those of ``lost`` where it says so."""
    if "epochs" not in options:  # the dense model is not trained either
        monkeypatch.setattr(strongest, "CHANCE", -100.0)
    if lost is not None:

        def judge(run, before, folder, target, max_drop):
            keeps = lost[target] <= max_drop
            return strongest.Rung(target, target, lost[target], lost[target] - 1, lost[target] + 1, 16, keeps)

        monkeypatch.setattr(strongest, "judge", judge)
    given = BOUND | {"epochs": 0, "prune_epochs": 0, "progress": False} | options
    rows = jobs.train(toy.model, toy.data, out, **given)
    return rows, json.loads((out / jobs.SUMMARY).read_text())


@pytest.mark.parametrize(
    ("bears", "tried", "chosen"),
    [
        (0.42, [0.42], 0.42),  # stronger ones are out of reach of two layers
        (0.55, [0.42, 0.7, 0.55], 0.55),
        (0.85, [0.42, 0.7, 0.85], 0.85),
        (1.0, [0.42, 0.7, 0.85], None),
    ],
)
def test_budgets_are_searched_by_halves(toy, tmp_path, monkeypatch, bears, tried, chosen):
    lost = {target: 0.0 if target >= bears else 5.0 for target in strongest.LADDER}
    (dense, pruned), summary = trained(toy, tmp_path / "out", monkeypatch, lost)
    assert [rung["target_flops"] for rung in summary["budget"]["tried"]] == tried
    assert summary["budget"]["target_flops"] == pruned["target_flops"] == chosen
    net, lines = load(str(tmp_path / "out"))[0], budget_lines(summary, [dense, pruned])
    assert hasattr(net, "token_pruner") == (chosen is not None) and len(lines) == len(tried) + 1
    if chosen is None:
        assert pruned["method"] == "dense" and pruned["quality"] == dense["quality"]
        assert "no token can leave within a drop of 1 point" in lines[-1]
    else:
        assert 1 / pruned["flops_ratio"] == pytest.approx(chosen, rel=0.1)
        assert lines[-1].endswith("of the MACs are left, the least of those tried within a drop of 1 point")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_what_is_far_above_chance_has_learned():
    """Of what is above 95 % by one answer there are less than five points left."""
    labels = np.array([1] * 95 + [0] * 5)
    right = Predictions(**EMPTY, logits=torch.nn.functional.one_hot(torch.tensor(labels)).float())
    rows = Dataset.from_dict({"labels": labels.tolist()})
    least = strongest.by_chance(right, rows, "f1")
    assert least == pytest.approx(97.4, abs=0.1) and 100 - least < strongest.CHANCE
    assert 100 - least >= min(strongest.CHANCE, strongest.ROOM * (100 - least))


def test_a_random_order_is_worth_more_than_nothing():
    rows = Dataset.from_dict({"row": [i // 2 for i in range(200)], "labels": [i % 2 for i in range(200)]})
    said = Predictions(**EMPTY, logits=torch.zeros(200, 1))
    assert strongest.by_chance(said, rows, "map") == pytest.approx(75, abs=3), "of two candidates"


def test_the_end_is_in_sight(toy, tmp_path, monkeypatch, capsys):
    lost = dict.fromkeys(strongest.LADDER, 5.0)
    trained(toy, tmp_path / "out", monkeypatch, lost, progress=True)
    said = [line for line in capsys.readouterr().out.splitlines() if "more" in line]
    announced = [line for line in said if line.startswith("budget ")]
    assert [line.split("at most ")[1].split()[0] for line in announced] == ["2", "1", "0"], said
    judged = [line for line in said if "loses too much; at most " in line]
    assert [line.split("at most ")[1].split()[0] for line in judged] == ["2", "1"], said


def test_what_has_learned_nothing_is_not_pruned(toy, tmp_path, monkeypatch):
    """Whose every answer is the same loses none by losing tokens."""
    (dense, pruned), summary = trained(toy, tmp_path / "out", monkeypatch, epochs=0)
    assert summary["budget"]["tried"] == [] and pruned["quality"] == dense["quality"]
    assert not hasattr(load(str(tmp_path / "out"))[0], "token_pruner")
    (line,) = budget_lines(summary, [dense, pruned])
    assert "points above one answer for every text" in line and "The result is the dense model" in line


def test_a_bound_is_kept_on_rows_that_chose_nothing_else(toy, tmp_path, monkeypatch):
    """The whole way, with trainings: the toy can be learned, and half of its tokens say nothing."""
    options = {"epochs": 3, "prune_epochs": 2, "max_drop": 5.0}
    (dense, _), summary = trained(toy, tmp_path / "out", monkeypatch, **options)
    tried = summary["budget"]["tried"]
    assert 1 <= len(tried) <= 3 and all(rung["examples"] == 16 for rung in tried)
    for rung in tried:
        error = max((rung["high"] - rung["low"]) / (2 * strongest.Z95), 100 / 16)  # of one row at least
        margin = strongest.MARGIN * error
        assert rung["keeps"] == (rung["drop"] + margin <= 5) and rung["low"] <= rung["drop"] <= rung["high"]
        assert rung["flops_fraction"] == pytest.approx(rung["target_flops"], rel=0.1)
    assert dense["quality"] > 90, "it was learned"


def test_what_was_tried_is_not_tried_again(toy, tmp_path, monkeypatch):
    calls, once = [], strongest.prune_and_train

    def interrupted(run, dense, folder, options, start):
        calls.append(folder.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return once(run, dense, folder, options, start)

    monkeypatch.setattr(strongest, "prune_and_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(toy, tmp_path / "out", monkeypatch)
    monkeypatch.setattr(stages, "run_trainer", lambda *a: pytest.fail("trained again"))
    trained(toy, tmp_path / "out", monkeypatch)
    assert calls[0] == calls[2] == "pruned-0.42"


@pytest.mark.parametrize("method", ["topk", "ltp", "evit", "tome"])
def test_a_budget_that_hurts_is_told_with_a_milder_one(toy, tmp_path, monkeypatch, method):
    monkeypatch.setattr(strongest, "NOTICED", -100.0)  # the toy bears whatever can be asked for
    target = 0.7 if method == "tome" else 0.5
    asked = {"target_flops": target, "epochs": 3, "prune_epochs": 1, "method": method}
    rows, summary = trained(toy, tmp_path / "out", monkeypatch, **asked)
    milder = summary["milder"]
    if method in ("tome", "evit") and milder is None:  # neither need come near enough to any budget
        return
    assert milder["target_flops"] in strongest.LADDER and milder["target_flops"] > target and milder["drop"] <= 1
    (line,) = budget_lines(summary, rows)
    assert line.startswith(f"drop {rows[0]['quality'] - rows[1]['quality']:+.2f} points: on 16 rows of the validation ")
    assert line.endswith(f"at --target-flops {milder['target_flops']:g}")


def test_a_harmless_budget_is_not_mentioned():
    rows = [{"quality": 90.0, "mode": "dense-unpadded"}, {"quality": 88.5, "mode": "pruned"}]
    assert budget_lines({}, rows) == []


def test_budgets_out_of_reach_are_no_verdict_on_the_drop():
    rows = [{"quality": 90.0, "mode": "dense-unpadded"}, {"quality": 90.0, "mode": "dense-unpadded"}]
    (line,) = budget_lines({"budget": {"max_drop": 1.0, "tried": [], "target_flops": None}}, rows)
    assert line.startswith("none of the budgets is in reach of these texts")


@pytest.mark.parametrize("method", ["evit", "ats"])
def test_a_method_that_keeps_other_counts_meets_its_budget_itself(toy, tmp_path, monkeypatch, method):
    for name, value in (("LEAST", 30), ("EPOCHS", 1), ("RATES", (4e-3,)), ("RATE_STEPS", (5,))):
        monkeypatch.setattr(stages, name, value)
    options = BOUND | {"epochs": 1, "prune_epochs": None, "lr": None, "method": method, "target_flops": 0.7}
    jobs.train(toy.model, toy.data, tmp_path / "out", progress=False, **options)
    summary = json.loads((tmp_path / "out" / jobs.SUMMARY).read_text())
    assert summary["reached"]["flops_fraction"] == pytest.approx(0.7, rel=0.05) and summary["schedule"] is None
