"""A method prunes one model, models do not touch each other, and what is refused leaves everything as it was."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers import AttentionInterface, BertConfig, BertForSequenceClassification

from support.families import FAMILIES, difference
from thresher import LTP, ToMe, TopK, dense, prune, unprune
from thresher.core.hooks import Hooks
from thresher.core.pruner import pruner_of

BERT = FAMILIES["bert"]


def answers(model):
    with torch.no_grad():
        return BERT.answers(model, BERT.batch())


def hooks_of(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("method", [lambda: LTP(init=1.6), lambda: TopK(keep=0.5)], ids=["ltp", "topk"])
def test_a_method_in_use_is_refused(method):
    one, other = prune(BERT.build(), method()), BERT.build(seed=3)
    expected, dense_answers = answers(one), answers(other)
    with pytest.raises(ValueError, match=r"prunes another model, a BertForSequence.*: prune with copy\.deepcopy of it"):
        prune(other, one.token_pruner)
    assert difference(answers(one), expected) == 0 and difference(answers(other), dense_answers) == 0
    assert pruner_of(other) is None and hooks_of(other) == 0


def test_a_copy_of_a_method_prunes_another_model_with_what_was_learned():
    one, other = prune(BERT.build(), LTP()), BERT.build()
    with torch.no_grad():
        one.token_pruner.threshold.fill_(1.2)
    method = copy.deepcopy(one.token_pruner)
    prune(other, method)
    assert method is other.token_pruner and method.threshold.tolist() == pytest.approx([1.2] * 4)
    assert difference(answers(other), answers(one)) == 0
    unprune(one)
    assert hooks_of(one) == 0 and hooks_of(other) > 0 and other.token_pruner.report[-1]["tokens_kept"] < 52


def test_what_was_learned_for_another_model_is_refused():
    method = copy.deepcopy(prune(BERT.build(), LTP()).token_pruner)
    with pytest.raises(ValueError, match=r"has learned for another model, a Bert.* with 4 layers: make a new"):
        prune(BERT.build(num_hidden_layers=3), method)
    fits = copy.deepcopy(prune(BERT.build(), TopK(keep=0.5)).token_pruner)  # which has learned nothing
    assert prune(BERT.build(num_hidden_layers=8), fits).token_pruner.sites == (1, 3, 5)


def test_pruning_again_with_the_same_method_changes_the_layout_alone():
    model = prune(BERT.build(), LTP(), layout="mask")
    with torch.no_grad():
        model.token_pruner.threshold.fill_(1.2)
    expected, hooks = answers(model), hooks_of(model)
    prune(model, model.token_pruner, layout="padded")
    assert model.token_pruner.threshold.tolist() == pytest.approx([1.2] * 4) and hooks_of(model) == hooks
    assert model.token_pruner.hooks.layout == "padded"
    assert difference(answers(model), expected) <= 1e-5
    unprune(model)
    assert hooks_of(model) == 0 and "token_pruning" not in model.config.to_dict()


def test_a_method_that_was_taken_off_is_free():
    model, method = BERT.build(), LTP()
    prune(model, method)
    with torch.no_grad():
        method.threshold.fill_(1.2)
    expected = answers(model)
    unprune(model)
    assert difference(answers(prune(BERT.build(), method)), expected) == 0


def test_models_of_one_configuration_do_not_touch_each_other(tmp_path):
    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
    one, other = (BertForSequenceClassification(config).eval() for _ in range(2))
    assert one.config is other.config
    expected = answers(other)
    prune(one, TopK(keep=0.5))
    assert "token_pruning" not in other.config.to_dict() and "token_pruning" not in config.to_dict()
    assert config._attn_implementation == other.config._attn_implementation == "sdpa"
    prune(other, ToMe())
    assert one.config.token_pruning["method"] == "topk" and other.config.token_pruning["method"] == "tome"
    pruned = answers(other)
    unprune(one)
    assert difference(answers(other), pruned) == 0 and difference(pruned, expected) > 0
    unprune(other)
    assert difference(answers(other), expected) == 0
    assert all(m.config is other.config for m in other.modules() if isinstance(getattr(m, "config", None), BertConfig))


@pytest.fixture
def without_mask():
    """An attention function of the user's own, for which no mask function is known."""
    AttentionInterface.register("own", lambda *args, **kwargs: (args[1].transpose(1, 2), None))
    yield "own"
    del AttentionInterface._global_mapping["own"]


@pytest.mark.parametrize("pruned", [False, True])
def test_what_is_refused_late_leaves_the_model_as_it_was(pruned, monkeypatch):
    model = BERT.build()
    if pruned:
        prune(model, TopK(keep=0.5))
    expected, hooks, before = answers(model), hooks_of(model), pruner_of(model)
    attach = Hooks.attach

    def refused(self):
        attach(self)
        if self.method.name == "ltp":
            raise ValueError("refused in the end")

    monkeypatch.setattr(Hooks, "attach", refused)
    with pytest.raises(ValueError, match="refused in the end"), pytest.warns() if pruned else nullcontext():
        prune(model, LTP())
    assert difference(answers(model), expected) == 0 and hooks_of(model) == hooks and pruner_of(model) is before
    assert ("token_pruning" in model.config.to_dict()) == pruned
    assert model.config._attn_implementation == ("pruned|sdpa" if pruned else "sdpa")
    if pruned:
        with dense(model):
            assert difference(answers(model), answers(BERT.build())) == 0


def test_an_attention_function_without_a_mask_is_refused_before_anything_changes(without_mask):
    model = BERT.build()
    model.set_attn_implementation(without_mask)
    with pytest.raises(ValueError, match="own"):
        prune(model, LTP())
    assert pruner_of(model) is None and hooks_of(model) == 0 and "token_pruning" not in model.config.to_dict()
    assert model.config._attn_implementation == without_mask
