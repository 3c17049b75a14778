"""The same gradients whatever the layout, with checkpointing, and with two forwards before one backward."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import transformers

from support.families import FAMILIES
from thresher import LTP, TopK, prune
from thresher.core.tokens import LAYOUTS

TRAINED = ("bert", "distilbert", "deberta-v2", "modernbert", "vit")
RUN = [(f, e) for f in FAMILIES for e in ("padded", "packed") if FAMILIES[f].packed or e != "packed"]
HARD, SOFT = (lambda: TopK(keep=0.6)), (lambda: LTP(target_flops=0.5, init=1.6, soft_until=0.5))


def trained(family: str, method, layout: str = "auto", progress: float = 0.0, checkpointing: bool = False):
    model = prune(FAMILIES[family].build(), method, layout=layout).train()
    model.token_pruner.progress = progress
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def loss_of(family: str, model, seed: int = 1):
    """A loss of which every output takes part; of the soft stage's expected MACs as well."""
    output = FAMILIES[family].answers(model, FAMILIES[family].batch(seed=seed))["output"]
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return (output * weights).sum() + model.token_pruner.record.flops_fraction() * model.token_pruner.soft


def gradients(model, loss) -> dict:
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        within = 1e-4 * gradient.abs().max() + 1e-6 * largest  # a key's bias has no gradient but rounding
        assert (found[name] - gradient).abs().max() <= within, name
    total = sum(g.double().sum() for g in expected.values())
    size = sum(g.double().abs().sum() for g in expected.values())
    assert abs(sum(g.double().sum() for g in found.values()) - total) <= 1e-5 * size


@pytest.mark.parametrize("family, layout", RUN)
def test_executors_give_the_same_gradients(family, layout):
    expected, found = (trained(family, HARD(), e) for e in ("mask", layout))
    expected, found = (gradients(model, loss_of(family, model)) for model in (expected, found))
    assert_equal(found, expected)


@pytest.mark.parametrize("method, layout", [(HARD, "mask"), (HARD, "padded"), (HARD, "packed"), (SOFT, "auto")])
@pytest.mark.parametrize("family", TRAINED)
def test_checkpointing_changes_nothing(family, method, layout):
    layout = layout if FAMILIES[family].packed or layout != "packed" else "padded"
    models = [trained(family, method(), layout, checkpointing=c) for c in (False, True)]
    expected, found = (gradients(model, loss_of(family, model)) for model in models)
    assert any(m.gradient_checkpointing for m in models[1].modules() if hasattr(m, "gradient_checkpointing"))
    assert_equal(found, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method, layout", [(HARD, "padded"), (HARD, "packed"), (SOFT, "auto")])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_two_forwards_before_one_backward(family, method, layout, checkpointing):
    model = trained(family, method(), layout, checkpointing=checkpointing)
    separate = copy.deepcopy(model)
    for seed in (1, 50):
        loss_of(family, separate, seed).backward()
    expected = {name: p.grad for name, p in separate.named_parameters() if p.grad is not None}
    assert_equal(gradients(model, loss_of(family, model, 1) + loss_of(family, model, 50)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_task_loss_reaches_the_thresholds(family):
    """Without the budget's loss: the gates take part in the attention of the layers that follow."""
    method = SOFT()
    model = trained(family, method)
    FAMILIES[family].answers(model, FAMILIES[family].batch())["output"].pow(2).sum().backward()
    followed = [
        layer < model.token_pruner.architecture.depth - 1 for layer in method.sites
    ]  # no attention follows the last layer
    assert [bool(g) for g in method.threshold.grad.abs() > 0] == followed


def test_the_budget_reaches_the_thresholds():
    method = SOFT()
    model = trained("bert", method, progress=0.4)
    FAMILIES["bert"].run(model, FAMILIES["bert"].batch())
    loss = method.loss(None, {}, method.record)
    loss.backward()
    assert (method.threshold.grad < 0).all(), "a model over its budget must raise its thresholds"


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_of_zero_and_one_are_hard_pruning(family):
    """For every token that stays; one that left shows its last complete state, to heads that read it."""
    source, batch = FAMILIES[family], FAMILIES[family].batch()
    model = trained(family, LTP(init=1.6, temperature=1e-7), "mask")
    record = []
    with torch.no_grad():
        soft = source.answers(model, batch)
        record.append([row["tokens_kept"] for row in model.token_pruner.report])
        hard = source.answers(model.eval(), batch)
        record.append([row["tokens_kept"] for row in model.token_pruner.report])
    assert record[0] == pytest.approx(record[1])
    assert record[1][-1] < 0.95 * record[1][0]
    seen = model.token_pruner.record.sites[-1].after.alive
    if not model.token_pruner.architecture.reads_first_only:
        seen = torch.ones_like(seen)
    seen = seen[batch["attention_mask"].bool()] if "attention_mask" in batch else seen
    torch.testing.assert_close(soft["states"][seen], hard["states"][seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "deberta-v2"])
def test_heads_of_every_token_see_in_the_soft_stage_what_is_left(family):
    """Before and after the FFN; a gate that closes costs them, and says so in its gradient."""
    source, batch = FAMILIES[family], FAMILIES[family].batch()
    head = source.model.replace("SequenceClassification", "TokenClassification")
    source = dataclasses.replace(source, model=head)
    method = LTP(init=1.6, temperature=1e-7, at=(2,))
    model = prune(source.build().train(), method, layout="mask")
    method.progress = 0.0
    real = batch["attention_mask"].bool()
    soft = model(**batch).logits
    hard = model.eval()(**batch).logits
    assert (soft - hard)[real].abs().max() <= 1e-5
    method.temperature = 1.0
    model.train()
    model(**batch).logits[real].sum().backward()
    assert method.threshold.grad.abs().item() > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hard_stage_leaves_the_thresholds_alone(layout):
    method = LTP(target_flops=0.5, init=1.6)
    model = trained("bert", method, layout, progress=0.9)
    (loss_of("bert", model) + method.loss(None, {}, method.record)).backward()
    assert method.threshold.grad.abs().max() == 0, "DDP needs a gradient, and none may move them"


def test_heads_that_read_the_first_token_alone_leave_faded_states_as_they_are():
    """A token keeps its old state as far as its gate is closed, where a head reads it; other gradients stay."""
    states = {}
    for head in ("ForSequenceClassification", "ForTokenClassification"):
        model = getattr(transformers, f"Bert{head}")(FAMILIES["bert"].build().config)
        model.bert.load_state_dict(FAMILIES["bert"].build().bert.state_dict(), strict=False)
        method = LTP(init=1.6, temperature=0.3, straight_through=False, at=(0, 1, 2))
        prune(model, method).train()
        method.progress = 0.0
        with torch.no_grad():
            states[head] = model(**FAMILIES["bert"].batch((12,)), output_hidden_states=True).hidden_states
    gates = method.record.sites[0].view.tokens.log_gate
    assert gates is None, "the first site is entered by whole tokens"
    read, faded = states["ForSequenceClassification"][1], states["ForTokenClassification"][1]
    torch.testing.assert_close(read[:, 0], faded[:, 0], atol=1e-5, rtol=0)
    assert (read[:, 1:] - faded[:, 1:]).abs().max() > 1e-3
