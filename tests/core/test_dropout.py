"""Dropout that draws four numbers at a time: its chances, its scale, and attention that differs by nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from support.families import FAMILIES
from thresher import LTP, PruningTrainer, TopK, prune
from thresher.core.attention import PrunedAttention, with_dropout
from thresher.core.dropout import Dropout, dropped, quick_dropout
from thresher.core.scoring import attend_and_score, attend_with_dropout

NEXT_TO_NONE = 1e-9  # a chance at which nothing is dropped
OPTIONS = {
    "bert": "attention_probs_dropout_prob",
    "modernbert": "attention_dropout",
    "llama": "attention_dropout",
    "layoutlm": "attention_probs_dropout_prob",  # whose file does not say whether it is causal
}
METHODS = {
    "soft": lambda: LTP(target_flops=0.5, init=1.6, soft_until=0.5),
    "hard": lambda: TopK(keep=0.6),
    "protected": lambda: TopK(keep=0.6, votes="protected"),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("p", (0.1, 0.5, 0.93))
def test_chance_and_scale(dtype, p):
    torch.manual_seed(0)
    x = torch.ones(301, 333, dtype=dtype)
    found = dropped(x, p)
    assert found.shape == x.shape and found.dtype == dtype
    assert {*found.unique().tolist()} == {0.0, torch.tensor(1 / (1 - round(p * 65536) / 65536), dtype=dtype).item()}
    share = (found == 0).float().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 1 / 65536
    ways = (found == 0).flatten()[: x.numel() // 4 * 4].view(-1, 4).float()  # four of one draw know nothing of another
    assert torch.corrcoef(ways.T).fill_diagonal_(0).abs().max() < 5 / len(ways) ** 0.5
    assert (ways.mean(0) - p).abs().max() < 5 * (p * (1 - p) / len(ways)) ** 0.5 + 1 / 65536


def test_seed_and_gradient():
    x = torch.randn(7, 13, requires_grad=True)
    torch.manual_seed(3)
    first = dropped(x, 0.3)
    torch.manual_seed(3)
    assert torch.equal(first, dropped(x, 0.3))
    assert not torch.equal(first, dropped(x, 0.3))
    first.sum().backward()
    assert torch.equal(x.grad, torch.where(first == 0, 0.0, x.grad.max()))


def test_modules_within_alone():
    class Own(nn.Dropout):
        pass

    model = nn.Sequential(nn.Dropout(0.5), Own(0.5))
    x = torch.ones(1000)
    with quick_dropout(model):
        assert type(model[0]) is Dropout and type(model[1]) is Own
        assert (model[0](x) == 0).any()
        assert torch.equal(model.eval()[0](x), x)
        assert (model.train()[0](x) == 0).any()
    assert type(model[0]) is nn.Dropout


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ("mask", "padded", "packed"))
@pytest.mark.parametrize("family", OPTIONS)
def test_attention_is_the_same(family, layout, method):
    """As good as no dropout: the same states, scores and gradients as without."""
    if method == "soft" and layout == "packed":
        pytest.skip("packed rows have no soft stage")
    found = []
    for p in (0.0, NEXT_TO_NONE):
        model = prune(FAMILIES[family].build(**{OPTIONS[family]: p}), METHODS[method](), layout=layout).train()
        output = FAMILIES[family].answers(model, FAMILIES[family].batch(seed=1))["output"]
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        kept = [site.keep for site in model.token_pruner.record.sites]
        found.append((output, kept, {name: x.grad for name, x in model.named_parameters() if x.grad is not None}))
    (one, kept, expected), (other, also, gradients) = found
    assert all(torch.equal(a, b) for a, b in zip(kept, also, strict=True))
    assert (one - other).abs().max() <= 1e-5
    largest = max(g.abs().max() for g in expected.values())
    assert expected.keys() == gradients.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6 * largest, name


@pytest.mark.parametrize("attend", (attend_with_dropout, attend_and_score))
def test_attention_drops_its_weights(attend):
    """With the identity for values the output is what is left of the weights."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 3, 40, 8)
    value, weights = torch.eye(40).expand(2, 3, 40, 40), (query @ key.transpose(-1, -2)).softmax(-1).transpose(1, 2)
    found, whole = (attend(query, key, value, None, 1.0, dropout=p) for p in (0.5, 0.0))
    if attend is attend_and_score:
        (found, scores), (whole, expected) = found, whole
        torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(whole, weights)
    torch.testing.assert_close(found, torch.where(found == 0, 0.0, 2 * weights))
    assert abs((found == 0).float().mean() - 0.5) < 5 * 0.5 / found.numel() ** 0.5


def test_compiled_code_draws_by_torch():
    net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    with quick_dropout(net):
        found = torch.compile(net, fullgraph=True, backend="aot_eager")(torch.ones(200, 8))
    assert 0.3 < (found == 0).float().mean() < 0.7


def test_a_query_that_sees_nobody_gets_zeros():
    query, key, value = torch.randn(3, 2, 3, 5, 8)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[0, 0, 2] = False
    for given in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        found, _ = with_dropout(nn.Module(), query, key, value, given, scaling=None, dropout=NEXT_TO_NONE)
        expected = nn.functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2).nan_to_num()
        torch.testing.assert_close(found, expected)
        assert (found[0, 2] == 0).all()


def test_training_gives_its_modules_back(tmp_path):
    net = prune(FAMILIES["bert"].build(hidden_dropout_prob=0.1), TopK(keep=0.5))
    seen = []

    class Stop(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            seen.extend(type(module) for module in net.modules() if isinstance(module, nn.Dropout))
            raise RuntimeError("stop here")

    data = [{"input_ids": [2, 5, 6, 3], "labels": 0}] * 4
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    with pytest.raises(RuntimeError, match="stop here"):
        PruningTrainer(net, arguments, train_dataset=data, callbacks=[Stop()]).train()
    assert {*seen} == {Dropout}
    assert {type(module) for module in net.modules() if isinstance(module, nn.Dropout)} == {nn.Dropout}


@pytest.mark.parametrize("layout", ("mask", "padded", "packed"))
def test_what_does_not_train_loses_nothing(layout, monkeypatch):
    """Also where an attention module says its chance in evaluation, when eager attention does not drop."""
    model = FAMILIES["bert"].build()
    model.set_attn_implementation("eager")
    model, call = prune(model, TopK(keep=0.6), layout=layout).eval(), PrunedAttention.__call__
    batch, found = FAMILIES["bert"].batch(seed=1), []
    for p in (0.0, 0.5):
        monkeypatch.setattr(PrunedAttention, "__call__", lambda *a, p=p, **more: call(*a, **(more | {"dropout": p})))
        found.append(FAMILIES["bert"].answers(model, batch)["output"])
    assert torch.equal(*found)
