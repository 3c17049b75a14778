"""How many tokens a method keeps, which, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification

from support.families import FAMILIES, TEXT
from thresher import LAT, LTP, DynamicViT, EViT, FirstK, PoWERBERT, Random, Threshold, ToP, TopK, dense, prune
from thresher.api import calling
from thresher.core.pruner import METHODS, TokenPruner
from thresher.core.tokens import LAYOUTS
from thresher.methods.parts.budget import bisect_to_budget
from thresher.methods.parts.selection import kept_count, top_k

BERT = FAMILIES["bert"]


def pruned(method, layout: str = "auto", family: str = "bert"):
    return prune(FAMILIES[family].build(), method, layout=layout)


def kept(model, batch: dict | None = None) -> list[list[list[int]]]:
    """Positions of the tokens that stay, per site and row."""
    with torch.no_grad():
        BERT.run(model, BERT.batch() if batch is None else batch)
    views = model.token_pruner.record.sites
    return [[i[a].tolist() for i, a in zip(v.after.index, v.after.alive, strict=True)] for v in views]


def counts(model, batch: dict | None = None) -> list[list[int]]:
    return [[len(row) for row in site] for site in kept(model, batch)]


@given(st.integers(1, 1000), st.integers(1, 2000), st.integers(0, 3))
def test_a_fraction_is_rounded_up_in_whole_numbers(thousandths, live, protected):
    found = kept_count(thousandths / 1000, torch.tensor([live]), protected).item()
    assert found == max(protected, 1, math.ceil(thousandths * live / 1000 - 1e-9))


@given(st.integers(1, 50), st.integers(1, 50))
def test_a_count_is_clipped_to_the_row(keep, live):
    assert kept_count(keep, torch.tensor([live])).item() == min(keep, live)


def test_ties_keep_the_lower_position():
    score, alive = torch.tensor([[2.0, 5.0, 2.0, 2.0, 9.0]]), torch.tensor([[True, True, True, True, False]])
    assert top_k(score, torch.tensor([2]), alive).tolist() == [[True, True, False, False, False]]
    assert top_k(score, torch.tensor([3]), alive).tolist() == [[True, True, True, False, False]]
    assert top_k(torch.ones(1, 300), torch.tensor([7]), torch.ones(1, 300).bool())[0, :7].all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fractions_compound_and_are_of_the_survivors(layout):
    for method in (TopK(keep=0.5), Random(keep=0.5), FirstK(keep=0.5)):
        assert counts(pruned(method, layout)) == [[12, 9, 5], [6, 5, 3], [3, 3, 2]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_number_per_site(layout):
    assert counts(pruned(TopK(keep=(0.9, 12, 1)), layout)) == [[22, 17, 9], [12, 12, 9], [1, 1, 1]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_best_scored_stay(layout):
    model = pruned(TopK(keep=5, at=(1,)), layout)
    (rows,) = kept(model)
    (view,) = model.token_pruner.record.sites
    for row, score, alive, index in zip(rows, view.score, view.alive, view.tokens.index, strict=True):
        score = dict(zip(index[alive].tolist(), score[alive].tolist(), strict=True))
        best = sorted(set(score) - {0}, key=lambda i: -score[i])[:4]
        assert row == sorted([0, *best])


def test_the_first_stay():
    assert kept(pruned(FirstK(keep=(9, 6, 3))))[2] == [[0, 1, 2]] * 3


def test_chance_is_fair_and_has_a_seed():
    batch = BERT.batch((24,))
    model, chosen = pruned(Random(keep=0.5, at=(0,))), []
    for model.token_pruner.seed in range(40):
        chosen.append(kept(model, batch)[0][0])
    assert len({tuple(c) for c in chosen}) > 35
    often = torch.bincount(torch.tensor(chosen).flatten(), minlength=24)[1:]
    assert often.min() >= 8 and often.max() <= 30, often  # 19 expected of each
    assert kept(pruned(Random(keep=0.5, at=(0,), seed=3)), batch)[0][0] == chosen[3]


def test_chance_depends_neither_on_the_batch_nor_on_the_executor():
    together = kept(pruned(Random(keep=0.5)))
    for layout in LAYOUTS:
        model = pruned(Random(keep=0.5), layout)
        assert kept(model) == together
        alone = [kept(model, {k: v[i : i + 1] for k, v in BERT.batch(width=30).items()}) for i in range(3)]
        assert [[site[0] for site in row] for row in alone] == [list(site) for site in zip(*together, strict=True)]


def test_chance_is_new_in_every_step_of_training():
    model = pruned(Random(keep=0.5)).train()
    assert kept(model) != kept(model)
    assert kept(model.eval()) == kept(model)


@pytest.mark.parametrize("baseline", [TopK, Random, FirstK])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_baselines_replay_the_counts_of_another_method(baseline, layout):
    wanted = counts(pruned(Threshold((0.4, 0.6, 0.8))))
    model = pruned(baseline(keep="replay"), layout)
    with pytest.raises(RuntimeError, match=r"keep='replay' needs the counts .* with calling\(model, counts="):
        counts(model)
    with calling(model, counts=torch.tensor(wanted).T):
        assert counts(model) == wanted


@pytest.mark.parametrize("keep", [0, 0.0, 1.5, -0.2, -3, True, "half", None, (0.5, 0.5, 0), (0.5, 2.0, 3)], ids=str)
def test_a_keep_outside_its_range_is_refused_by_name(keep):
    with pytest.raises(ValueError, match=r"keep=.*expected a share in \(0, 1\] or a whole number of tokens from 1 up"):
        pruned(TopK(keep=keep))


@pytest.mark.parametrize("keep", [4, 1, (0.5, 4, 0.5), "replay"], ids=str)
@pytest.mark.parametrize("method", [DynamicViT, PoWERBERT, LAT])
def test_a_count_where_a_share_is_meant_is_refused(method, keep):
    """What these methods train on are shares; 4 would be a share of 400 %."""
    with pytest.raises(ValueError, match=r"keep=.*expected a share in \(0, 1\], as in 0.5; a number of tokens is not"):
        pruned(method(keep=keep))


def test_one_keep_too_few_is_refused():
    with pytest.raises(ValueError, match="keep has 2 entries for the 3 sites"):
        pruned(TopK(keep=(0.5, 0.5)))
    with pytest.raises(ValueError, match="threshold has 2 entries for the 3 sites"):
        pruned(Threshold((0.5, 0.5)))


def test_a_count_above_the_models_positions_is_refused():
    with pytest.raises(ValueError, match="keep=65: the model takes 64 tokens at most"):
        pruned(TopK(keep=65), family="roberta")


def test_each_site_has_its_threshold():
    wanted = (0.4, 0.6, 0.8)
    model = pruned(Threshold(wanted))
    kept(model)
    for view, threshold in zip(model.token_pruner.record.sites, wanted, strict=True):
        expected = (view.score >= threshold) & view.alive | view.protected
        assert torch.equal(view.keep, expected) and not view.keep[view.alive].all()
    with pytest.raises(ValueError, match="expected numbers from 0 up"):
        pruned(Threshold(-1.0))


BATCH = BERT.batch((10, 6))
PROTECT = [
    ((0, 3), [{0, 3}, {0, 3}]),
    ((-1,), [{9}, {5}]),
    ((0, -2), [{0, 8}, {0, 4}]),
    ({"ids": [int(BATCH["input_ids"][0, 4]), int(BATCH["input_ids"][1, 2])]}, [{4}, {2}]),
    ((), [set(), set()]),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("protect, wanted", PROTECT, ids=str)
def test_protected_tokens_stay(protect, wanted, layout):
    for method in (TopK(keep=1, protect=protect), Random(keep=1, protect=protect), Threshold(99.0, protect=protect)):
        for row, needed in zip(kept(pruned(method, layout), BATCH)[-1], wanted, strict=True):
            if isinstance(protect, dict):
                assert needed <= set(row)
            else:
                assert set(row) == needed or (not needed and len(row) == 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_protects_token_by_token(layout):
    model, protect = pruned(TopK(keep=1), layout), torch.zeros(2, 10).bool()
    protect[0, 7] = protect[1, 2] = protect[1, 8] = True
    with calling(model, protect=protect):
        assert kept(model, BATCH)[-1] == [[7], [2]], "padding is never protected"
        with pytest.raises(ValueError, match=r"protect has shape \(2, 10\), the batch has \(3, 24\)"):
            kept(model)
    assert kept(model, BATCH)[-1] == [[0], [0]], "the next call knows nothing of it"
    with pytest.raises(ValueError, match=r"tokens of one batch: with calling\(model, protect=mask\)"):
        pruned(TopK(keep=1, protect=protect), layout)


def test_ids_cannot_be_protected_without_ids():
    model = pruned(TopK(protect={"ids": [5]}))
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=torch.randn(1, 4, 32))


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if issubclass(method, TokenPruner)))
def test_configurations_come_back(name):
    method = METHODS[name](at=(0, 2), protect=(0, -1))
    assert TokenPruner.from_dict(method.to_dict()).to_dict() == method.to_dict()
    assert name == method.name and repr(method).startswith(type(method).__name__)


def test_sites_by_default():
    assert pruned(TopK()).token_pruner.sites == (0, 1, 2)
    twelve = prune(BERT.build(num_hidden_layers=12), TopK())
    assert twelve.token_pruner.sites == (2, 5, 8)
    assert pruned(LTP()).token_pruner.sites == (0, 1, 2, 3)
    assert pruned(LTP(), family="vit").token_pruner.sites == (0, 1, 2)
    assert prune(BERT.build(num_hidden_layers=1), TopK()).token_pruner.sites == (0,)


def calibrated(target: float, family: str = "bert", init: float = 1.0):
    source, method = FAMILIES[family], LTP(target_flops=target, init=init)
    model = pruned(method, family=family)

    def forward(batch):
        with torch.no_grad():
            source.run(model, batch)
        return method.record

    batches = [source.batch((24, 18, 10, 21), seed=seed) for seed in range(0, 40, 10)]
    return method, method.calibrate(forward, batches), [forward(batch) for batch in batches]


@pytest.mark.parametrize("init", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("target", [0.4, 0.6, 0.9])
def test_calibration_reaches_the_target(target, init):
    method, reached, records = calibrated(target, init=init)
    measured = sum(r.used for r in records) / sum(r.dense for r in records)
    assert float(measured) == pytest.approx(target, rel=0.02)
    assert float(reached["flops_fraction"]) == pytest.approx(float(measured), abs=1e-6)
    rising = torch.tensor([init * layer / 4 for layer in method.sites])
    torch.testing.assert_close(method.threshold.detach(), rising + reached["shift"], atol=1e-5, rtol=0)


def test_a_step_over_the_target_ends_at_the_closer_side():
    called = []
    found = bisect_to_budget(lambda x: called.append(x) or (1.0 if x < 0.3 else 0.39), 0.4)
    assert found == 0.39 and called[-1] >= 0.3


@pytest.mark.parametrize(("begin", "value"), [(0.2, 0.39), (0.2, 0.41), (-0.6, 0.41)])
def test_of_a_plateau_it_takes_the_mildest_that_it_tried(begin, value):
    """A knob turned further than it moves anything would leave the method an extreme parameter."""
    called = []

    def steps(x):
        called.append(x)
        return 0.9 if x < begin else value if x < begin + 2 else 0.1

    assert bisect_to_budget(steps, 0.4) == value
    assert abs(called[-1]) == min(abs(x) for x in set(called) if steps(x) == value)


@pytest.mark.parametrize(("shift", "most"), [(-0.3, 5), (-0.01, 3), (0.004, 3), (0.07, 4), (0.9, 8)])
def test_a_smooth_search_takes_few_calls(shift, most):
    """Each is a pass over the calibration data."""
    called = []
    found = bisect_to_budget(lambda x: called.append(x) or 0.4 / (1 + 2.718 ** (3 * (x - shift))), 0.2)
    assert found == pytest.approx(0.2, rel=0.002) and len(called) <= most


@pytest.mark.parametrize(
    ("begin", "width", "top", "bottom"), [(0.3, 0.001, 0.405, 0.05), (1.2, 0.01, 1.0, 0.39), (0.01, 1e-4, 1.0, 0.3)]
)
def test_a_steep_search_ends_on_the_target(begin, width, top, bottom):
    called = []

    def cliff(x):
        called.append(x)
        return top - (top - bottom) * min(max((x - begin) / width, 0.0), 1.0)

    assert bisect_to_budget(cliff, 0.4) == pytest.approx(0.4, rel=0.002) and len(called) <= 40


def test_a_target_out_of_reach_is_an_error_and_changes_nothing():
    with pytest.raises(
        ValueError, match=r"target_flops=0.05 cannot be reached at=\[0, 1, 2, 3\].*of the MACs are left"
    ):
        calibrated(0.05)


def test_no_target_means_no_calibration():
    assert LTP().calibrate(None, []) == {} and TopK().calibrate(None, []) == {}


def test_the_budget_falls_over_the_first_half_of_the_soft_stage():
    method = LTP(target_flops=0.4, soft_until=0.5)
    model = pruned(method).train()
    expected = {0.0: 1.0, 0.125: 0.7, 0.25: 0.4, 0.4: 0.4}
    for progress, target in expected.items():
        method.progress = progress
        BERT.run(model, BERT.batch())
        loss = 10 * (method.record.flops_fraction() - target) ** 2
        torch.testing.assert_close(method.loss(None, {}, method.record), loss)
    assert method.soft
    method.progress = 0.5
    assert not method.soft and method.loss(None, {}, method.record) == 0


def test_without_a_target_the_mean_gate_is_the_loss():
    method = LTP(weight=3.0, init=1.6)
    model = pruned(method).train()
    method.progress = 0.0
    BERT.run(model, BERT.batch())
    lengths = torch.tensor([24.0, 18.0, 10.0])
    gates = torch.stack([count.n_ffn / lengths for count in method.record.counts]).mean()
    torch.testing.assert_close(method.loss(None, {}, method.record), 3 * gates)


def test_phases():
    method = LTP(soft_until=0.3)
    assert [method.phase(p) for p in (0.0, 0.29, 0.3, 1.0)] == ["soft", "soft", "hard", "hard"]
    method.progress = 0.1
    assert method.soft and not method.eval().soft
    assert TopK().phase(0.0) == "hard" and TopK().progress == 1.0


def test_fading_is_graded_and_spares_special_tokens():
    method = LTP(init=1.6, temperature=0.3, straight_through=False, min_keep=1)
    model = pruned(method).train()
    method.progress = 0.0
    BERT.run(model, BERT.batch())
    view = method.record.sites[2]
    gate = method.soften(view).exp()
    expected = torch.sigmoid((view.score - method.threshold[2]) / 0.3)
    plain = view.alive & ~view.protected
    torch.testing.assert_close(gate[plain], expected[plain])
    assert (gate[:, 0] == 1).all() and (gate[~view.alive] == 1).all()
    assert method.record.counts[3].n_attention.sum() < 52


def test_straight_through_gates_are_whole_and_learn_by_the_sigmoid():
    method = LTP(init=1.6, temperature=0.3, min_keep=1)
    model = pruned(method).train()
    method.progress = 0.0
    BERT.run(model, BERT.batch())
    view = method.record.sites[2]
    free, threshold = view.view.free, method.threshold[2]
    gate = method.soften(view).exp()
    stays = view.score >= threshold
    torch.testing.assert_close(gate[free], stays[free].float(), atol=1e-7, rtol=0)
    assert stays[free].any() and not stays[free].all()
    slope, *_ = torch.autograd.grad(gate[free].sum(), method.threshold)
    soft = torch.sigmoid((view.score - threshold) / 0.3)[free]
    torch.testing.assert_close(slope[2], -(soft * (1 - soft)).sum() / 0.3, rtol=1e-4, atol=1e-4)


def test_a_whole_soft_stage_answers_as_removal_does():
    model = pruned(LTP(init=1.6))
    batch = BERT.batch()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        hard = BERT.run(model.eval(), batch)
        left = model.token_pruner.report[-1]["tokens_kept"]
        model.train()
        model.token_pruner.progress = 0.0
        soft = BERT.run(model, batch)
    assert left < 52
    torch.testing.assert_close(soft, hard, atol=1e-5, rtol=0)
    assert model.token_pruner.report[-1]["tokens_kept"] == pytest.approx(left, abs=1e-4)


@pytest.mark.parametrize("stage", ["soft", "hard"])
def test_a_row_keeps_its_best_tokens(stage):
    method = LTP(init=99.0, min_keep=4)
    model = pruned(method)
    model.train(stage == "soft")
    method.progress = 0.0 if stage == "soft" else 1.0
    BERT.run(model, BERT.batch((24, 18, 3)))
    torch.testing.assert_close(method.record.counts[-1].n_attention.float(), torch.tensor([4.0, 4.0, 3.0]))


def test_as_published_has_the_settings_of_the_released_code():
    published = LTP.as_published()
    settings = {"at": tuple(range(1, 12)), "temperature": 0.128, "init": 1.28, "soft_until": 0.5, "min_keep": 1}
    settings |= {"straight_through": False, "weight": pytest.approx(1.1), "target_flops": None, "schedule": None}
    assert {name: getattr(published, name) for name in settings} == settings
    assert LTP.as_published(target_flops=0.5).weight is None, "of a budget the penalty is ours"
    model = pruned(LTP.as_published(depth=4)).train()
    method = model.token_pruner
    torch.testing.assert_close(method.threshold.detach(), 1.28 * torch.tensor([1, 2, 3]) / 4)
    for method.progress in (0.0, 0.49):
        BERT.run(model, BERT.batch())
        assert method.soft and method.loss(None, {}, method.record).item() > 0.1
    method.progress = 0.5
    assert not method.soft and method.calibrate(None, []) == {}


@pytest.mark.parametrize("name", ["ltp", "top"])
def test_where_tokens_are_asked_one_by_one_nothing_is_fused(name):
    method = {"ltp": LTP, "top": ToP}[name]
    for kind in (BertForQuestionAnswering, BertForTokenClassification):
        model = kind(BertConfig(**TEXT))
        with pytest.raises(ValueError, match=f"fuse=True is not possible with {kind.__name__}, whose head asks each"):
            prune(model, method(fuse=True))
        assert not hasattr(model, "token_pruner")


@pytest.mark.parametrize("layout", ["mask", "padded", "packed"])
@torch.no_grad()
def test_what_would_be_fused_alone_stays_as_it_is(layout):
    """Of three tokens one leaves: nothing, beside no other text and beside one that loses many."""
    model = prune(FAMILIES["bert"].build(), EViT(keep=0.6), layout=layout)
    ids = torch.randint(5, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    beside = model(input_ids=ids, attention_mask=mask).logits[0]
    alone = model(input_ids=ids[:1, :3]).logits[0]
    with dense(model):
        whole = model(input_ids=ids[:1, :3]).logits[0]
    torch.testing.assert_close(beside, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "wrong",
    [{"min_keep": 0}, {"target_flops": 0.0}, {"target_flops": 1.2}, {"temperature": 0.0}, {"temperature": -1.0}],
)
def test_ltp_refuses_what_cannot_be(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        LTP(**wrong)


@pytest.mark.parametrize("name", ["ltp", "transkimmer", "adapler", "trbert", "ltmp", "dynamicvit", "powerbert", "top"])
@pytest.mark.parametrize("soft_until", [1.5, -0.1])
def test_a_soft_stage_that_is_no_share_is_refused(name, soft_until):
    with pytest.raises(ValueError, match=rf"soft_until={soft_until}: expected a share of the training in \[0, 1\]"):
        METHODS[name](soft_until=soft_until)


def test_a_method_that_says_nothing_is_an_error():
    model = prune(BERT.build(), TokenPruner(at=(1,)))
    with pytest.raises(NotImplementedError, match="does not say which tokens to keep"):
        BERT.run(model, BERT.batch())
