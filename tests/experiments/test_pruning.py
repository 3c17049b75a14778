"""A learned schedule against the one that it started from: which one goes on, and what is told."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from support.toy import OPTIONS, make_toy
from thresher.cli.train import contest_line
from thresher.data.models import load
from thresher.evaluation.predict import predict
from thresher.experiments import pruning, stages
from thresher.experiments import train as jobs
from thresher.experiments.spec import SUMMARY

OPEN = {name: value for name, value in OPTIONS.items() if name not in ("progress", "method", "epochs", "prune_epochs")}
OPEN |= {"epochs": 0, "prune_lr": 1e-3, "target_flops": 0.75, "batch_size": 32}
GIVEN = {"at": (0, 1), "schedule": (0.6, 0.7)}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> SimpleNamespace:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    for name, value in {"LEAST": 10, "EPOCHS": 1, "SOFT_STEPS": 10, "SCHEDULE_STEPS": (1, 1), "LOOK": 5}.items():
        monkeypatch.setattr(stages, name, value)
    monkeypatch.setattr(pruning, "CONTEST_STEPS", 5)


def trained(toy, out, **options):
    jobs.train(toy.model, toy.data, out, progress=False, **OPEN | options)
    return load(str(out))[0], json.loads((out / SUMMARY).read_text())


def test_the_better_schedule_goes_on(toy, tmp_path):
    _, summary = trained(toy, tmp_path / "out", method="top")
    contest, losses = summary["contest"], summary["contest"]["losses"]
    assert {*losses} == {"learned", "start"} and losses[contest["kept"]] == min(losses.values())
    assert contest["steps"] == 10 + 5 < summary["steps"]["prune"] <= 10 + 5 + 10
    assert summary["rows"][1]["flops_ratio"] == pytest.approx(1 / 0.75, rel=0.1)
    steps = [line["step"] for line in summary["history"]]
    assert steps == sorted(steps) and steps[0] <= 5 and steps[-1] > 10
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize(("method", "better"), [("top", "learned"), ("top", "start"), ("ltp", "start")])
def test_a_schedule_that_lost_is_gone(toy, tmp_path, monkeypatch, method, better):
    """Parameters stay as they are in the hard stage, but for one shift, so that they tell which schedule it has."""
    run, before = pruning.short, {}

    def judged(of, trainer, what):
        if "schedule" in what:
            pruner = trainer.pruner
            before[what] = (pruner.rank if method == "top" else pruner.threshold.diff()).detach().clone()
        run(of, trainer, what)
        return 0.5 if better in what else 1.0

    monkeypatch.setattr(pruning, "short", judged)
    net, summary = trained(toy, tmp_path / "out", method=method, method_options=GIVEN)
    assert summary["contest"]["kept"] == better
    learned, start = before["the learned schedule"], before["the start schedule"]
    pruner = net.token_pruner
    now = pruner.rank if method == "top" else pruner.threshold.diff()
    torch.testing.assert_close(now, learned if better == "learned" else start, rtol=0, atol=1e-5)
    assert not torch.allclose(learned, start, atol=1e-3)
    if method == "top":
        assert torch.equal(start, pruner.start[0])
    said = predict(net, stages.load_data(run_spec(toy, tmp_path)).validation)
    assert said.macs_used / said.macs_dense == pytest.approx(0.75, rel=0.05)


def run_spec(toy, tmp_path):
    return stages.TrainSpec(model=toy.model, data=toy.data, out=tmp_path / "x", **OPEN).completed()


def test_what_was_decided_is_not_decided_again(toy, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pruning, "going_on", stop)
        with pytest.raises(KeyboardInterrupt):
            trained(toy, tmp_path / "out", method="top")
    for name in ("begin", "short"):
        monkeypatch.setattr(pruning, name, lambda *_, **__: pytest.fail("decided again"))
    _, summary = trained(toy, tmp_path / "out", method="top")
    assert summary["contest"]["kept"] in ("learned", "start")


def test_who_won_is_told():
    losses = {"learned": 0.25, "start": 0.5}
    assert "0.2500 on the validation part against 0.5000" in contest_line({"kept": "learned", "losses": losses})
    assert contest_line({"kept": "start", "losses": losses}).startswith("the schedule at the start was kept")
