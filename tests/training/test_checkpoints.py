"""Checkpoints of a training with a method that has a budget: they meet it, they are models, and runs resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, TrainerCallback

from support.training import build, inputs, losses, rows, trainer
from thresher import LAT, LTP, EViT, PoWERBERT, ToMe, ToP, TopK, prune
from thresher.evaluation.predict import predict
from thresher.training.trainer import PruningTrainer, distillation

BUDGETS = {"ltp": 0.5, "top": 0.75}


def resumable(folder: Path, kind: str, seed: int = 0) -> PruningTrainer:
    budget = {"target_flops": BUDGETS[kind], "soft_until": 0.375}
    method = LTP(**budget) if kind == "ltp" else ToP(**budget, ramp=0.3, rank_weight=1.0)
    teacher = build(7) if kind == "top" else None
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "pruner_lr": 0.05}
    return trainer(folder, method, build(seed), teacher=teacher, **options)


@pytest.fixture(scope="module", params=BUDGETS)
def run(request, tmp_path_factory) -> SimpleNamespace:
    """Two epochs of training with a checkpoint at every step; soft to step 3, hard to step 8."""
    folder = tmp_path_factory.mktemp("run")
    made = resumable(folder, request.param)
    made.train()
    budget = BUDGETS[request.param]
    return SimpleNamespace(folder=folder, trainer=made, model=made.model.eval(), kind=request.param, budget=budget)


@pytest.mark.parametrize("step", [2, 3, 4, 6, 8], ids=["soft", "border", "epoch", "hard", "end"])
def test_resuming_changes_nothing(run, tmp_path, step):
    made = resumable(tmp_path, run.kind, seed=5)
    made.train(resume_from_checkpoint=str(run.folder / f"checkpoint-{step}"))
    assert made.state.global_step == 8
    expected = dict(run.model.named_parameters())
    for name, parameter in made.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-6, msg=name)
    assert losses(made) == pytest.approx(losses(run.trainer), abs=1e-5)
    assert made.reached["flops_fraction"] == pytest.approx(run.trainer.reached["flops_fraction"], abs=1e-6)


def test_the_teacher_is_left_as_it_came(run):
    assert run.trainer.teacher is None or not hasattr(run.trainer.teacher, "token_pruner")
    assert (run.trainer.teacher is None) == (run.kind == "ltp")


def test_the_budget_is_met(run):
    result = predict(run.model, rows())
    assert result.macs_used / result.macs_dense == pytest.approx(run.budget, rel=0.02)
    assert run.trainer.reached["flops_fraction"] == pytest.approx(result.macs_used / result.macs_dense, rel=1e-4)


@pytest.mark.parametrize("step", [3, 4, 8], ids=["border", "epoch", "end"])
def test_hard_checkpoints_meet_the_budget(run, step):
    """The first as well, which was saved when its last soft step was done."""
    model = prune(AutoModelForSequenceClassification.from_pretrained(run.folder / f"checkpoint-{step}"))
    result = predict(model, rows())
    assert result.macs_used / result.macs_dense == pytest.approx(run.budget, rel=0.02)


def test_a_part_of_the_calibration_data_speaks_for_all(tmp_path):
    """The data are sorted: their first rows are short ones."""
    data = rows(64)
    data = data.select(sorted(range(64), key=lambda i: len(data[i]["input_ids"])))
    made = trainer(tmp_path, LTP(target_flops=0.5), data=data)
    seen = []
    made.pruner.calibrate = lambda forward, batches: seen.extend(batches)
    made.calibrate(16)
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in seen])
    assert sorted(lengths.tolist()) == [8] * 4 + [12] * 4 + [16] * 4 + [20] * 4
    assert {"labels", "teacher_logits"}.isdisjoint(seen[0]) and made.model.training is False


def test_a_budget_out_of_reach_is_told(tmp_path):
    made = trainer(tmp_path, LTP(target_flops=0.3, at=(2,)), data=rows(8))
    before = made.pruner.threshold.detach().clone()
    with pytest.raises(ValueError, match=r"target_flops=0.3 cannot be reached at=\[2\]"):
        made.calibrate()
    assert torch.equal(made.pruner.threshold, before)


def test_the_share_of_the_macs_is_logged(run):
    logged = [entry for entry in run.trainer.state.log_history if "loss" in entry]
    assert len(logged) == 8 and all(0 < entry["flops_fraction"] < 1.2 for entry in logged)
    assert logged[-1]["flops_fraction"] < 0.8


def test_a_checkpoint_is_a_model(run):
    folder = run.folder / "checkpoint-8"
    saved = load_file(folder / "model.safetensors")
    for name, value in run.model.token_pruner.state_dict().items():
        assert torch.equal(saved[f"token_pruner.{name}"], value)
    restored = prune(AutoModelForSequenceClassification.from_pretrained(folder))
    expected, found = predict(run.model, rows()), predict(restored, rows())
    assert torch.equal(found.kept, expected.kept) and found.kept.sum() < 0.9 * found.tokens.sum() * 3
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-6, rtol=1e-6)


def test_evaluation_is_of_the_hard_model(run):
    data = rows(16, seed=3, teacher_logits=lambda i: [0.0, 1.0, 2.0])
    with torch.no_grad():
        logits = run.model(**{k: v for k, v in inputs(data).items() if k in ("input_ids", "attention_mask")}).logits
    alone = run.trainer.evaluate(data.remove_columns("teacher_logits"))["eval_loss"]
    assert alone == pytest.approx(F.cross_entropy(logits, inputs(data)["labels"]).item(), rel=1e-4)
    taught = distillation({"logits": logits}, {"logits": torch.tensor([[0.0, 1.0, 2.0]] * 16)}, 2.0).item()
    found = run.trainer.evaluate(data)["eval_loss"]
    assert found == pytest.approx(0.5 * alone + 0.5 * taught, rel=1e-4), "as in the training, without the method's loss"
    unlabelled = run.trainer.predict(data.remove_columns("labels"))
    torch.testing.assert_close(torch.from_numpy(unlabelled.predictions), logits, atol=1e-5, rtol=1e-5)


FIELDS = {  # methods whose answer is a field and no parameter
    "topk": lambda: TopK(keep=0.9, target_flops=0.7),
    "evit": lambda: EViT(keep=0.9, target_flops=0.75),
    "tome": lambda: ToMe(r=0.05, target_flops=0.75),
    "powerbert": lambda: PoWERBERT(target_flops=0.7, soft_until=0.375, weight=50.0),
    "lat": lambda: LAT(target_flops=0.8, generations=1),
}


@pytest.fixture(scope="module", params=FIELDS)
def fields(request, tmp_path_factory) -> SimpleNamespace:
    folder, method = tmp_path_factory.mktemp("fields"), FIELDS[request.param]
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "pruner_lr": 0.1}
    made = trainer(folder, method(), build(0), **options)
    made.train()
    return SimpleNamespace(folder=folder, method=method, options=options, trainer=made)


@pytest.mark.parametrize("step", [2, 5, 8], ids=["before an epoch ends", "after", "end"])
def test_resuming_a_method_with_fields_changes_nothing(fields, tmp_path, step):
    made = trainer(tmp_path, fields.method(), build(5), **fields.options)
    start, entered = made.pruner.to_dict(), []
    made.add_callback(OnBegin(lambda: entered.append(made.pruner.to_dict())))
    made.train(resume_from_checkpoint=str(fields.folder / f"checkpoint-{step}"))
    for name, parameter in fields.trainer.model.named_parameters():
        torch.testing.assert_close(made.model.get_parameter(name), parameter, atol=1e-6, rtol=1e-6, msg=name)
    assert made.pruner.to_dict() == fields.trainer.pruner.to_dict() != start
    if made.pruner.phase(step / 8) == "hard" and made.pruner.name != "lat":  # which searches in the end
        assert entered[0] != start
    assert losses(made) == pytest.approx(losses(fields.trainer), abs=1e-5)


class OnBegin(TrainerCallback):
    """Calls a function when a training begins or goes on."""

    def __init__(self, act):
        self.act = act

    def on_train_begin(self, *args, **kwargs):
        self.act()


@pytest.mark.parametrize("best", [2, 4, None])
def test_the_best_model_comes_back_with_its_own_fields(tmp_path, best):
    """And is calibrated once more, since it was chosen on its own budget."""
    options = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"load_best_model_at_end": best is not None, "eval_dataset": rows(8)}
    made, entered = trainer(tmp_path, TopK(keep=0.9), **options), []

    def calibrate(rows=None):
        entered.append((made.state.global_step, made.pruner.keep))
        made.pruner.keep = round(0.9 - 0.1 * made.state.global_step, 2)
        return {}

    made.calibrate, made.may_be_best = calibrate, lambda: made.state.global_step == best
    made.train()
    assert [step for step, _ in entered] == [0, 2, 4, 6] + ([6] if best else [])
    if best:
        assert entered[-1][1] == round(0.9 - 0.1 * best, 2)
        assert made.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
