"""Training with the Trainer: thresholds move when they should and rest when they should; budgets hold; runs resume."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    TrainerCallback,
    TrainingArguments,
)

from support.families import FAMILIES, NO_DROPOUT, TEXT
from support.training import BATCH, EPOCH, SOFT, Watch, build, inputs, losses, rows, trainer
from thresher import LTP, ToP, TopK, prune
from thresher.training.trainer import Distill, PruningTrainer, distillation, freeze_without_gradient, param_groups


# --- the thresholds move, and rest -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "how",
    [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}],
    ids=["fp32", "bf16", "accumulation", "checkpointing"],
)
def test_thresholds_move_in_the_soft_stage(tmp_path, how):
    watch = Watch()
    made = trainer(tmp_path, LTP(target_flops=0.5, **SOFT), callbacks=[watch], max_steps=3, pruner_lr=0.05, **how)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    first, *_, last = watch.thresholds
    assert first.dtype == torch.float32 and torch.equal(first, before["token_pruner.threshold"])
    assert ((last - first).abs() > 0.01).all(), "each of them, by about two steps of Adam"
    assert not torch.equal(made.model.classifier.weight, before["classifier.weight"])
    assert all(0 < p.abs().max() < 100 for p in watch.gradients)


def test_accumulating_halves_is_one_batch(tmp_path):
    """Of different rows: the L1 penalty and the teacher's loss are means over rows, like the task's."""
    found = []
    for size, steps in ((BATCH, 1), (BATCH // 2, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2}
        options |= {"optim": "sgd", "pruner_lr": 1.0, "max_grad_norm": 0.0, "teacher": build(1)}
        made = trainer(tmp_path, LTP(weight=1.0, **SOFT), data=rows(), **options)
        start = made.pruner.threshold.detach().clone()
        made.train()
        found.append({name: p.detach() for name, p in made.model.named_parameters()} | {"loss": losses(made)})
        assert ((made.pruner.threshold - start).abs() > 1e-3).all()
    assert found[0].pop("loss") == pytest.approx(found[1].pop("loss"), abs=1e-5)
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, atol=1e-5, rtol=1e-5, msg=name)


def test_accumulation_does_not_weigh_the_budget_anew(tmp_path):
    """The penalty of a budget is not linear, so only halves that are alike have the gradient of the whole."""
    gradients = []
    for size, steps in ((BATCH, 1), (BATCH // 2, 2)):
        watch, options = Watch(), {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        data = rows(1).select([0] * BATCH)
        method = LTP(target_flops=0.4, soft_until=1e-9)
        made = trainer(tmp_path, method, data=data, callbacks=[watch], max_steps=1, max_grad_norm=0.0, **options)
        method.phase = lambda progress: "soft"  # at once with the whole budget
        made.train()
        gradients.append(watch.gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-5)
    assert (gradients[0] < -1e-3).all()


def test_checkpointing_has_the_same_losses(tmp_path):
    runs = []
    for how in ({}, {"gradient_checkpointing": True}):
        made = trainer(tmp_path, LTP(target_flops=0.5, soft_until=0.5), **how)
        made.train()
        runs.append(losses(made))
    assert len(runs[0]) == 4 and runs[1] == pytest.approx(runs[0], abs=1e-4)


@pytest.mark.parametrize("target", [None, 0.5])
def test_the_hard_stage_begins_on_time_and_lets_the_thresholds_rest(tmp_path, target):
    """Adam's momentum must not carry them on; a budget shifts all of them by one number."""
    watch = Watch()
    made = trainer(tmp_path, LTP(target_flops=target, soft_until=0.5), callbacks=[watch], max_steps=6, pruner_lr=0.1)
    calls, calibrate = [], made.calibrate
    made.calibrate = lambda rows=None: calls.append((made.state.global_step, rows)) or calibrate(rows)
    made.train()
    assert calls == [(3, 256), (EPOCH, 256), (6, None)], "it begins, an epoch ends, and the training"
    assert watch.phases == [(round(i / 6, 4), "soft" if i < 3 else "hard") for i in range(6)]
    assert all(gradient.any() == (i < 3) for i, gradient in enumerate(watch.gradients))
    hard = [*watch.thresholds[3:], made.pruner.threshold.detach()]
    if target is None:
        assert all(torch.equal(one, hard[0]) for one in hard)
    else:
        assert torch.equal(hard[1], hard[2]), "in the middle of an epoch"
        assert all((one - hard[0]).std() < 1e-6 for one in hard)
    assert (hard[0] - watch.thresholds[0]).std() > 1e-3
    assert made.pruner.progress == 1.0


def test_momentum_would_carry_the_thresholds_on():
    """Which is why there is ``freeze_without_gradient``."""
    moved = []
    for hook in (None, freeze_without_gradient):
        model = prune(build(), LTP())
        optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, pruner_lr=0.1))
        if hook:
            optimizer.register_step_pre_hook(hook)
        for gradient in (1.0, 0.0):
            before = model.token_pruner.threshold.detach().clone()
            model.token_pruner.threshold.grad = torch.full_like(before, gradient)
            optimizer.step()
        moved.append((model.token_pruner.threshold - before).abs().max().item())
    assert moved[0] > 0.01 and moved[1] == 0


# --- the loss --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("source", ["module", "column"])
def test_the_teacher_is_distilled(tmp_path, source):
    teacher, batch = build(1), inputs()
    with torch.no_grad():
        logits = teacher(batch["input_ids"], batch["attention_mask"]).logits
    if source == "column":
        batch["teacher_logits"] = logits
    method = LTP(weight=0.0, **SOFT)
    weights = Distill(0.25, temperature=3.0)
    made = trainer(tmp_path, method, distill=weights, teacher=teacher if source == "module" else None)
    method.progress = 0.0
    loss, outputs = made.compute_loss(made.model.train(), batch, return_outputs=True)
    p, q = (logits / 3).softmax(-1), (outputs.logits / 3).softmax(-1)
    taught = 9 * (p * (p / q).log()).sum(-1).mean()
    expected = 0.75 * F.cross_entropy(outputs.logits, batch["labels"]) + 0.25 * taught
    torch.testing.assert_close(loss, expected)
    assert taught > 0.01
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters()) or source == "column"
    del batch["labels"]
    torch.testing.assert_close(made.compute_loss(made.model, batch), taught)


def test_the_trainers_own_losses_hold(tmp_path):
    made = trainer(tmp_path, LTP(weight=0.0, **SOFT), label_smoothing_factor=0.2)
    made.pruner.progress, batch = 0.0, inputs()
    loss, outputs = made.compute_loss(made.model.train(), batch, return_outputs=True)
    torch.testing.assert_close(loss, F.cross_entropy(outputs.logits, batch["labels"], label_smoothing=0.2))
    made.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum() * 0 + 7
    assert made.compute_loss(made.model, batch).item() == pytest.approx(7)


def test_all_answers_are_distilled():
    generator = torch.Generator().manual_seed(0)
    start, end, other = (torch.randn(2, 5, generator=generator) for _ in range(3))
    pair = distillation({"start_logits": start, "end_logits": end}, {"start_logits": other, "end_logits": other})
    heads = [distillation({"logits": one}, {"logits": other}) for one in (start, end)]
    torch.testing.assert_close(pair, sum(heads) / 2)
    values = {"logits": start[:, :1]}, {"logits": other[:, :1]}
    torch.testing.assert_close(distillation(*values), (start - other)[:, 0].pow(2).mean())
    assert distillation(values[0], values[0]) == 0
    with pytest.raises(ValueError, match="nothing to distil"):
        distillation({"last_hidden_state": start}, {"last_hidden_state": start})


@pytest.mark.parametrize("task", ["regression", "qa"])
def test_other_heads_train_too(tmp_path, task):
    def model(seed):
        if task == "regression":
            return build(seed, num_labels=1, problem_type="regression")
        torch.manual_seed(seed)
        return BertForQuestionAnswering(BertConfig(**TEXT | NO_DROPOUT | {"num_hidden_layers": 3}))

    columns = (
        {"labels": lambda i: i / 7}
        if task == "regression"
        else dict.fromkeys(("start_positions", "end_positions"), lambda i: i % 8)
    )
    data = rows(16, **columns)
    data = data if task == "regression" else data.remove_columns("labels")
    watch, method = Watch(), LTP(target_flops=0.6, **SOFT)
    made = trainer(tmp_path, method, model(0), data, [watch], model(1), max_steps=2, optim="sgd", learning_rate=0.01)
    made.train()
    assert made.reached["flops_fraction"] == pytest.approx(0.6, rel=0.02)
    assert (watch.thresholds[1] != watch.thresholds[0]).all()
    batch = inputs(data)
    with torch.no_grad():
        expected = made.model(**batch).loss.item()
    assert made.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_the_pruner_has_its_own_rate_and_no_decay(tmp_path):
    for method in (LTP(), TopK()):
        made = trainer(tmp_path, method, pruner_lr=0.07, weight_decay=0.3)
        made.model.bert.embeddings.requires_grad_(False)
        for groups in (made.create_optimizer().param_groups, param_groups(made.model, 1e-3, 0.07, 0.3)):
            owned = [id(p) for group in groups for p in group["params"]]
            assert sorted(owned) == sorted(id(p) for p in made.model.parameters() if p.requires_grad)
            for group in groups:
                own = any(p is getattr(method, "threshold", None) for p in group["params"])
                assert group["lr"] == (0.07 if own or not group["params"] else 1e-3)
                assert not own or (len(group["params"]) == 1 and group["weight_decay"] == 0)
            assert max(group["weight_decay"] for group in groups) == 0.3


@pytest.mark.parametrize("method", [LTP, ToP])
def test_a_budget_counts_the_fused_tokens(tmp_path, method):
    own = {"rank_loss": "none", "bins": 8} if method is ToP else {}
    made = trainer(tmp_path, method(target_flops=0.75, soft_until=0.5, fuse=True, **own), max_steps=6)
    made.train()
    with torch.no_grad():
        made.model.eval()(**inputs(rows()))
    record = made.pruner.record
    assert record.flops_fraction().item() == pytest.approx(0.75, rel=0.03)
    gone = [site for site in record.sites if not torch.equal(site.keep, site.alive)]
    assert gone and all((site.choice.into is not None) for site in gone)
    assert all(losses(made)) and made.model.classifier.weight.isfinite().all()


# --- mistakes --------------------------------------------------------------------------------------------------------
def test_a_model_that_is_not_pruned_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"call prune\(model, method\) first"):
        PruningTrainer(build(), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))


@pytest.mark.parametrize("weight", [-0.1, 1.5])
def test_a_weight_outside_0_and_1_is_refused(tmp_path, weight):
    with pytest.raises(ValueError, match=rf"distill={weight}"):
        trainer(tmp_path, distill=weight)


def test_nothing_to_learn_from_is_told(tmp_path):
    with pytest.raises(ValueError, match="no labels and no teacher"):
        trainer(tmp_path, data=rows().remove_columns("labels")).train()


# --- without a Trainer -----------------------------------------------------------------------------------------------
def test_the_raw_loop_runs(tmp_path):
    script = Path(__file__).parents[2] / "examples" / "raw_loop.py"
    command = [sys.executable, "-W", "error::UserWarning:thresher", str(script), "12"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, cwd=tmp_path, timeout=280)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert "0.40 of the dense MACs" in last, done.stdout


def test_nothing_of_the_soft_stage_is_the_best(tmp_path):
    best = {"metric_for_best_model": "loss", "greater_is_better": False}
    made = trainer(tmp_path, LTP(target_flops=0.6, soft_until=0.5), **best)
    made.pruner.progress = 0.4
    assert not made._determine_best_metric({"eval_loss": 0.1}, None) and made.state.best_metric is None
    made.pruner.progress = 0.6
    assert made._determine_best_metric({"eval_loss": 0.5}, None) and made.state.best_metric == 0.5


class Stop(TrainerCallback):
    """Ctrl-C after the first step."""

    def on_step_end(self, *args, **kwargs):
        raise KeyboardInterrupt


def test_an_interrupted_training_leaves_the_teacher_unpruned(tmp_path):
    teacher = build(1)
    made = trainer(tmp_path, ToP(), teacher=teacher, callbacks=[Stop()])
    for _ in range(2):  # and it can be used again
        with pytest.raises(KeyboardInterrupt):
            made.train()
        assert not hasattr(teacher, "token_pruner")


def test_accumulating_halves_is_one_batch_where_the_model_counts_items(tmp_path):
    """Decoders' losses are sums over the items of all accumulated batches, once they are told how many there are."""
    moved = []
    for size, steps in ((BATCH, 1), (BATCH // 2, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        options |= {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        data = rows(1).remove_columns("labels").map(lambda row: {"labels": row["input_ids"]}).select([0] * BATCH)
        model = FAMILIES["llama"].build()
        start = model.model.norm.weight.detach().clone()
        made = trainer(tmp_path, TopK(keep=0.6, protect=(0, -1)), model, data, **options)
        made.data_collator = lambda batch: {k: torch.tensor([row[k] for row in batch]) for k in batch[0]}
        made.train()
        moved.append(model.model.norm.weight.detach() - start)
    assert moved[0].abs().max() > 1e-3
    torch.testing.assert_close(moved[1], moved[0], atol=1e-6, rtol=1e-4)


def test_half_precision_weights_are_not_trained(tmp_path):
    with pytest.raises(ValueError, match="float16, in which AdamW's epsilon is 0: load the model with dtype"):
        trainer(tmp_path, model=build().half())
    frozen = build().half()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    trainer(tmp_path, model=frozen)  # the thresholds alone
