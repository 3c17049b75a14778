"""Budgets: methods with one knob meet a share of the MACs, trained or not; trained ones learn, save and come back."""

from __future__ import annotations

import pytest
import torch

from support.training import BATCH, build, collate, rows, trainer
from thresher import ATS, LAT, LTMP, DynamicViT, EViT, PoWERBERT, SpAtten, ToMe, TopK, Transkimmer, prune
from thresher.core.pruner import TokenPruner

DIALS = [TopK, SpAtten, ATS, EViT, ToMe]
TRAINED = {
    "powerbert": (lambda: PoWERBERT(target_flops=0.6, soft_until=0.5), ("retention",)),
    "dynamicvit": (lambda: DynamicViT(target_flops=0.6, soft_until=0.5), ("embed", "decide")),
    "ltmp": (lambda: LTMP(target_flops=0.6, soft_until=0.5, min_keep=1, init=0.9), ("threshold", "merge_threshold")),
    "transkimmer": (lambda: Transkimmer(target_flops=0.6, soft_until=0.5, min_keep=1), ("predictors",)),
}


def left(model, data) -> float:
    """The share of the MACs that a model leaves of its texts."""
    pruner, used, dense = model.eval().token_pruner, 0.0, 0.0
    with torch.no_grad():
        for start in range(0, len(data), BATCH):
            model(**collate([data[i] for i in range(start, min(len(data), start + BATCH))]))
            used, dense = used + float(pruner.record.used), dense + float(pruner.record.dense)
    return used / dense


@pytest.mark.parametrize("kind", DIALS)
def test_one_number_meets_the_budget(kind, tmp_path):
    data = rows(32)
    own = trainer(tmp_path, kind(target_flops=0.7), build(), data)
    model, reached = own.model, own.calibrate()
    assert abs(left(model, data) - reached["flops_fraction"]) <= 1e-6
    assert abs(reached["flops_fraction"] - 0.7) <= 0.7 * (0.06 if kind is ATS else 0.03)  # texts of 8 to 20 tokens


@pytest.mark.parametrize("target", [0.2, 0.0, 1.5])
def test_budgets_out_of_reach_are_refused(target, tmp_path):
    with pytest.raises(ValueError, match="target_flops"):
        trainer(tmp_path, TopK(target_flops=target, at=(1,)), build()).calibrate()
    with pytest.raises(ValueError, match="is a count"):
        prune(build(), TopK(keep=5, target_flops=0.5))


@pytest.mark.parametrize("name", TRAINED)
def test_trained_methods_learn_meet_their_budget_and_come_back(name, tmp_path):
    make, learned = TRAINED[name]
    data = rows(32)
    own = trainer(tmp_path, make(), build(), data, max_steps=8)
    model = own.model
    before = {key: value.clone() for key, value in model.token_pruner.state_dict().items()}
    own.train()
    moved = [key for key, value in model.token_pruner.state_dict().items() if not torch.equal(value, before[key])]
    assert all(any(key.startswith(part) for key in moved) for part in learned)
    assert abs(left(model, data) - 0.6) <= 0.6 * 0.05
    assert abs(own.reached["flops_fraction"] - left(model, data)) <= 1e-6
    model.save_pretrained(tmp_path / "saved")
    again = prune(type(model).from_pretrained(tmp_path / "saved")).eval()
    batch = collate([data[i] for i in range(4)])
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory):
    """A model trained by LAT, and its data."""
    data = rows(32)
    own = trainer(tmp_path_factory.mktemp("lat"), LAT(target_flops=0.7, generations=2), build(), data, max_steps=8)
    own.train()
    return own.model.eval(), data, own


@pytest.mark.parametrize("budget", [0.95, 0.8, 0.65])
def test_lat_serves_any_budget_at_run_time(adaptive, budget):
    model, data, _ = adaptive
    model.token_pruner.budget = budget
    assert abs(left(model, data) - budget) <= 0.05


def test_lat_meets_its_own_budget_and_comes_back(adaptive, tmp_path):
    model, data, own = adaptive
    assert abs(own.reached["flops_fraction"] - 0.7) <= 0.7 * 0.05
    model.token_pruner.budget = 0.8
    model.save_pretrained(tmp_path)
    again = prune(type(model).from_pretrained(tmp_path)).eval()
    assert again.token_pruner.frontier == model.token_pruner.frontier
    assert again.token_pruner.shares == model.token_pruner.shares
    again.token_pruner.budget = 0.7
    assert abs(left(again, data) - 0.7) <= 0.05


def test_lat_trains_smaller_models_by_the_answers_of_the_whole(monkeypatch):
    model = prune(build(), LAT(drawn=1))
    model.train()
    pruner, ran = model.token_pruner, []
    batch = {k: v for k, v in collate([rows(4)[i] for i in range(4)]).items() if k != "labels"}

    def forward():
        output = model(**batch)
        ran.append((pruner.running, float(pruner.record.flops_fraction()), output.logits.requires_grad))
        return output

    loss = pruner.loss(forward, batch, TokenPruner)
    loss.backward()
    (whole, *_), (smallest, *_), (drawn, *_) = ran
    assert whole is None
    assert len(ran) == 3
    assert set(smallest) == {round(1 - pruner.most, 3)}
    assert all(1 - pruner.most <= share <= 1 for share in drawn)
    assert ran[0][1] > ran[2][1] > ran[1][1]
    assert [grad for *_, grad in ran] == [False, True, True]
    assert pruner.running is None


def test_lat_without_a_budget_keeps_all_and_saves_what_it_found(tmp_path):
    own = trainer(tmp_path, LAT(generations=1), build(), rows(8))
    own.pruner.progress = 1.0
    own.calibrate()
    assert own.pruner.shares == (1.0,) * len(own.pruner.sites)
    assert own.pruner.frontier == own.model.config.token_pruning["frontier"] != ()


def test_lat_says_what_it_can_do(adaptive):
    model, *_ = adaptive
    with pytest.raises(ValueError, match=r"budget=0\.01: the schedules that were found leave"):
        model.token_pruner.budget = 0.01
    with pytest.raises(ValueError, match="no schedules are known yet"):
        prune(build(), LAT()).token_pruner.budget = 0.5
    with pytest.raises(ValueError, match=r"drop=1\.5"):
        LAT(drop=1.5)


def test_a_budget_that_is_leapt_over_is_refused(tmp_path):
    short = rows(8).map(lambda row: {name: row[name][:2] for name in ("input_ids", "attention_mask")})
    own = trainer(tmp_path, TopK(target_flops=0.8, at=(0,)), build(), short)  # one of two tokens leaves, or none
    with pytest.raises(ValueError, match=r"target_flops=0\.8 cannot be reached at=\[0\]: the nearest that topk came"):
        own.calibrate()
    assert own.model.token_pruner.shares == (0.5,)
