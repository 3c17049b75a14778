"""Tokens that never leave: the query of a pair, short rows; and which tokens were left, for those who pool them."""

from __future__ import annotations

import pytest
import torch

from support.families import FAMILIES, difference
from support.methods import METHODS, REFUSES, refusal
from thresher import LTP, Cut, Threshold, ToMe, TopK, calling, dense, prune
from thresher.core.tokens import LAYOUTS

SEPARATOR = 3  # no token of the random batches
LENGTHS = (24, 18, 10)


def pairs(family: str = "bert") -> dict:
    """The rows of a family with a separator at the sixth token, at the third and at the last but one."""
    batch = FAMILIES[family].batch(LENGTHS)
    for row, place in enumerate((5, 2, 8)):
        batch["input_ids"][row, place] = SEPARATOR
        batch["input_ids"][row, LENGTHS[row] - 1] = SEPARATOR
    return batch


def kept(model) -> torch.Tensor:
    """(B, N0) the tokens that were left at the end of the last forward."""
    return model.token_pruner.record.sites[-1].after.spread_votes().bool()


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_query_never_leaves(layout):
    batch, model = pairs(), FAMILIES["bert"].build()
    prune(model, Cut(at=(1,), protect={"until": [SEPARATOR]}), layout=layout)
    model(**batch)
    until = torch.arange(24) <= torch.tensor([5, 2, 8])[:, None]
    assert torch.equal(kept(model), until)


@torch.no_grad()
def test_a_row_whose_batch_protects_none_of_it_keeps_its_best_token():
    batch, answers = pairs(), []
    protect = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    protect[1, 2] = True
    for layout in LAYOUTS:
        model = prune(FAMILIES["bert"].build(), Threshold(50.0, at=(1,)), layout=layout)
        with calling(model, protect=protect):
            answers.append(model(**batch).logits)
        site = model.token_pruner.record.sites[0]
        assert site.keep.sum(1).tolist() == [1, 1, 1]
        best = site.score.masked_fill(~site.alive, -1.0).argmax(1)
        assert site.keep[0, best[0]] and site.keep[1, 2] and site.keep[2, best[2]]
        assert (answers[-1] - answers[0]).abs().max() <= 1e-5


@torch.no_grad()
def test_the_first_token_is_no_end_of_a_query():
    batch, model = pairs(), prune(FAMILIES["bert"].build(), Cut(at=(1,), protect={"until": [SEPARATOR]}))
    batch["input_ids"][:, 0] = SEPARATOR
    model(**batch)
    assert kept(model).sum(1).tolist() == [6, 3, 9]


@torch.no_grad()
def test_a_configuration_names_its_separator():
    model = FAMILIES["modernbert"].build()
    prune(model, TopK(keep=0.3, protect="query"))
    assert model.token_pruner.protect == {"until": [model.config.sep_token_id]}
    with pytest.raises(ValueError, match="does not say: give protect="):
        prune(FAMILIES["bert"].build(), TopK(protect="query"))


@torch.no_grad()
def test_single_texts_are_no_pairs():
    model, batch = FAMILIES["bert"].build(), FAMILIES["bert"].batch(LENGTHS)
    prune(model, TopK(keep=0.5, protect={"until": [SEPARATOR]}))
    with pytest.warns(UserWarning, match="nothing is pruned"):
        model(**batch)  # no separator at all
    batch["input_ids"][torch.arange(3), torch.tensor(LENGTHS) - 1] = SEPARATOR
    with pytest.warns(UserWarning, match="nothing is pruned"):
        single = model(**batch).logits  # one, at the end
    batch["input_ids"][0, 4] = SEPARATOR  # a pair beside them changes nothing
    assert difference({"": model(**batch).logits[1:]}, {"": single[1:]}) <= 1e-5
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=torch.randn(2, 6, 32))


@pytest.mark.parametrize("protect", ["first", {"until": [1], "ids": [2]}, {"from": [1]}, (0.5,), 3])
def test_strange_protection_is_refused(protect):
    with pytest.raises(ValueError, match="expected positions as in"):
        TopK(protect=protect)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", [name for name in METHODS if "bert" not in REFUSES.get(name, {})])
@torch.no_grad()
def test_short_rows_are_left_alone(method, layout):
    """A row under ``min_tokens`` has the dense answer, and the others the one that they have without it."""
    make, family = METHODS[method][1], FAMILIES["bert"]
    batch, plain = family.batch(LENGTHS), family.build()
    before = family.run(plain, batch)
    pruned = family.run(prune(family.build(), make(), layout=layout), batch)
    method = make()
    method.min_tokens = 18
    model = prune(family.build(), method, layout=layout)
    answers = family.run(model, batch)
    assert difference({"": answers[2:]}, {"": before[2:]}) <= 1e-5
    assert difference({"": answers[:2]}, {"": pruned[:2]}) <= 1e-5
    assert kept(model).sum(1).tolist()[2] == LENGTHS[2]
    assert kept(model).sum(1).tolist()[0] < LENGTHS[0]


@torch.no_grad()
def test_short_rows_are_left_alone_whatever_a_call_protects():
    model, batch = FAMILIES["bert"].build(), FAMILIES["bert"].batch(LENGTHS)
    prune(model, TopK(keep=0.4, min_tokens=18))
    with calling(model, protect=torch.arange(24).expand(3, -1) == 0):
        model(**batch)
    assert kept(model).sum(1)[2] == LENGTHS[2] and kept(model).sum(1)[0] < LENGTHS[0]


@pytest.mark.parametrize("count", [-1, 1.5, True, "8"])
def test_min_tokens_is_a_number(count):
    with pytest.raises(ValueError, match="expected a number of tokens"):
        TopK(min_tokens=count)


@pytest.mark.parametrize("family", ["bert", "modernbert", "distilbert", "deberta-v2"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_survivors_are_the_same_in_all_layouts(method, family):
    """The mask names as many tokens as the report counts, the same ones in all layouts, and their states agree."""
    make, batch = METHODS[method][1], FAMILIES[family].batch(LENGTHS)
    layouts, found = [layout for layout in LAYOUTS if not refusal(method, family, layout)], {}
    if not layouts:
        pytest.skip(refusal(method, family, "mask"))
    for layout in layouts:
        own = make()
        own.pooling = "survivors"
        model = prune(FAMILIES[family].build().base_model, own, layout=layout)
        output = model(**batch)
        mask, states = output.token_mask, output.last_hidden_state
        assert mask.shape == batch["attention_mask"].shape and mask.dtype == torch.long
        assert mask.sum() == model.token_pruner.report[-1]["tokens_kept"] < batch["attention_mask"].sum()
        assert not (mask.bool() & ~batch["attention_mask"].bool()).any()
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        reference = found.setdefault("mask", mask), found.setdefault("mean", mean)
        assert torch.equal(reference[0], mask)
        assert difference({"": mean}, {"": reference[1]}) <= 1e-5
        with dense(model):
            assert getattr(model(**batch), "token_mask", None) is None


def test_a_soft_stage_weighs_by_its_gates():
    method = LTP(target_flops=0.5, pooling="survivors")
    model = prune(FAMILIES["bert"].build().bert, method).train()
    method.progress = 0.1
    with torch.no_grad():
        method.threshold.fill_(1.0)
    mask = model(**FAMILIES["bert"].batch(LENGTHS)).token_mask
    real = FAMILIES["bert"].batch(LENGTHS)["attention_mask"].bool()
    assert mask[~real].eq(0).all() and mask[real].max() <= 1 and 0 < mask[real].min() < 0.9
    mask.sum().backward()
    assert method.threshold.grad is not None and method.threshold.grad.abs().sum() > 0


def test_survivors_are_for_what_is_pooled():
    with pytest.raises(ValueError, match="has a head that reads all states"):
        prune(FAMILIES["bert"].build(), TopK(pooling="survivors"))
    with pytest.raises(ValueError, match="expected put-back or survivors"):
        TopK(pooling="mean")
    model = prune(FAMILIES["bert"].build().bert, TopK(pooling="survivors"))
    with pytest.raises(ValueError, match="return_dict=False"):
        model(**FAMILIES["bert"].batch(LENGTHS), return_dict=False)


@torch.no_grad()
def test_merged_means_weigh_by_size():
    """The mean of all tokens put back is the mean of the survivors by their size, where tokens merge."""
    batch = FAMILIES["bert"].batch((24,))
    method = ToMe(r=0.3, at=(1, 2), pooling="survivors")
    model = prune(FAMILIES["bert"].build().bert, method)
    output = model(**batch)
    sizes = method.record.sites[-1].after.sizes
    alive = method.record.sites[-1].after.alive
    states = output.last_hidden_state[0][output.token_mask[0].bool()]
    weighed = (states * sizes[alive][:, None]).sum(0) / sizes[alive].sum()
    assert difference({"": output.last_hidden_state[0].mean(0)}, {"": weighed}) <= 1e-5
