"""A schedule that a learned method starts from: as many tokens stay as it says, and the budget is met from there."""

from __future__ import annotations

import pytest
import torch

from support.training import rows, trainer
from thresher import LTP, ToP
from thresher.evaluation.predict import predict

AT, SHARES = (0, 1), (0.7, 0.5)


def kept(made) -> list[float]:
    """The share of a site's survivors that stays, over the rows."""
    found = predict(made.model, rows())
    before = torch.cat([found.tokens[:, None], found.kept[:, :-1]], 1).sum(0)
    return (found.kept.sum(0) / before).tolist()


def test_thresholds_start_where_the_shares_stay(tmp_path):
    made = trainer(tmp_path, LTP(at=AT, schedule=SHARES, target_flops=0.6, min_keep=1), max_steps=1, learning_rate=0)
    made.pruner.progress = 0.0
    made._on_calibration_data(made.pruner.prepare, None)
    assert kept(made) == pytest.approx(SHARES, abs=0.05), "each row keeps its own number"


def test_the_budget_is_there_from_the_first_step():
    made = LTP(at=AT, schedule=SHARES, target_flops=0.6)
    made.progress = 0.0
    assert made.target_now == 0.6 and LTP(target_flops=0.6).schedule is None


def test_a_resumed_training_keeps_its_thresholds(tmp_path):
    made = trainer(tmp_path, LTP(at=AT, schedule=SHARES, target_flops=0.6), max_steps=1)
    with torch.no_grad():
        made.pruner.threshold.fill_(0.3)
    made.pruner.progress = 0.5
    made._on_calibration_data(made.pruner.prepare, None)
    assert made.pruner.threshold.tolist() == pytest.approx([0.3, 0.3])


def test_odds_start_where_the_shares_are_expected(tmp_path):
    made = trainer(tmp_path, ToP(at=AT, schedule=SHARES, target_flops=0.6, floor=0), max_steps=1)
    made.pruner.progress = 0.0
    assert kept(made) == pytest.approx(SHARES, abs=0.08), "the protected token is in no bin"
    assert torch.isfinite(made.pruner.rank).all()


@pytest.mark.parametrize("kind", [LTP, ToP])
def test_a_trained_method_meets_its_budget_from_a_schedule(kind, tmp_path):
    options = {"rank_loss": "none"} if kind is ToP else {}
    made = trainer(tmp_path, kind(at=AT, schedule=SHARES, target_flops=0.6, **options), max_steps=12)
    made.train()
    found = predict(made.model, rows())
    assert found.macs_used / found.macs_dense == pytest.approx(0.6, rel=0.1)


def test_a_ranking_is_learned_by_the_first_site_however_late(tmp_path):
    made = trainer(tmp_path, ToP(at=(1,), schedule=(0.5,), target_flops=0.7), max_steps=1)
    assert made.pruner.early == [0]


@pytest.mark.parametrize("kind", [LTP, ToP])
@pytest.mark.parametrize(
    ("schedule", "why"),
    [((0.5,), "schedule has 1 entries for the 2 sites"), ((0.5, 1.5), "schedule=1.5: expected a share in")],
)
def test_a_schedule_that_does_not_fit_is_named(kind, schedule, why, tmp_path):
    with pytest.raises(ValueError, match=why):
        trainer(tmp_path, kind(at=AT, schedule=schedule, target_flops=0.6))


@pytest.mark.parametrize("kind", [LTP, ToP])
def test_no_floor_lies_above_a_schedule(kind, tmp_path):
    """What a floor keeps in late layers is paid for by tokens of early ones."""
    options = {"rank_loss": "none"} if kind is ToP else {}
    made = trainer(tmp_path, kind(at=AT, schedule=(0.9, 1), target_flops=0.6, **options), max_steps=1)
    made.pruner.progress = 0.0
    made.prepare()
    left = predict(made.model, rows()).kept[:, -1]
    assert left.min() == 1 and left.max() <= (1 if kind is LTP else 2), "of many tokens ToP keeps its first bin"


def test_floors_are_those_that_were_asked_for():
    assert (ToP().floor, ToP(schedule=(0.5,)).floor, ToP(schedule=(0.5,), floor=3).floor) == (2, 0, 3)
    assert (LTP().min_keep, LTP(schedule=(0.5,)).min_keep, LTP(schedule=(0.5,), min_keep=2).min_keep) == (3, 1, 2)
