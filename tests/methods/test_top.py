"""ToP: bins, masks and gates, the counted budget, the Lagrangian and the ranking that is distilled."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.families import FAMILIES
from support.methods import Holes
from support.toy import OPTIONS, make_toy
from thresher import ToP, prune
from thresher.experiments import train as jobs
from thresher.methods.parts.gates import chance, odds, sample
from thresher.methods.parts.rank_bins import bin_of, kept_of_bins, nearest_mask, within
from thresher.methods.top import BOUND, rows_of

BERT = FAMILIES["bert"]
LENGTHS = (24, 18, 10, 21)


def pruned(method, family: str = "bert", **config):
    return prune(FAMILIES[family].build(**config), method)


def forward_of(model, family: str = "bert"):
    def forward(batch):
        with torch.no_grad():
            FAMILIES[family].run(model, batch)
        return model.token_pruner.record

    return forward


@given(st.integers(1, 300), st.integers(1, 128))
def test_bins_are_those_of_the_shifted_rank_in_whole_numbers(count, bins):
    method = ToP(bins=bins, floor=3)
    found, best = method.bin(torch.arange(count, 0, -1.0)[None], torch.ones(1, count, dtype=torch.bool))
    shift = Fraction(count * count * 40503 % 65536, 65536)
    assert found[0].tolist() == [int((rank + shift) / count * bins) for rank in range(count)]
    assert best[0].tolist() == [rank < 3 for rank in range(count)]


@given(st.integers(1, 300), st.integers(1, 128), st.data())
def test_the_first_bins_hold_as_many_ranks_as_are_counted(count, bins, data):
    on = data.draw(st.integers(0, bins))
    found = bin_of(torch.arange(count), torch.tensor(count), bins)
    assert within(on, torch.tensor(count), bins) == bins * (found < on).sum()


def test_a_site_whose_mask_lets_everything_stay_is_not_scored():
    method = ToP(bins=8)
    model = pruned(method)
    method.mask[1, 4:] = False
    method.mask[2, 2:] = False
    record = forward_of(model)(BERT.batch(LENGTHS))
    assert [count.scored for count in record.counts[:3]] == [False, True, True]
    assert [view.score is None for view in record.sites] == [True, False, False]
    assert torch.equal(record.sites[0].keep, record.sites[0].alive) and not record.sites[1].passed
    found = method.cost_of(method.mask, *rows_of(record))
    assert found == pytest.approx(float(record.used.float() / record.dense), rel=1e-6) and found < 0.95


def test_in_the_soft_stage_what_is_evaluated_is_what_is_counted():
    method = ToP(bins=8)
    model = pruned(method).eval()
    method.progress = 0.1
    with torch.no_grad():
        method.rank[0] = BOUND
        method.rank[1:, 4:] = -BOUND
    record = forward_of(model)(BERT.batch(LENGTHS))
    assert not record.counts[0].scored and record.counts[1].scored
    found = method.cost_of(method.hard_mask(), *rows_of(record))
    assert found == pytest.approx(float(record.used.float() / record.dense), rel=1e-6) and found < 0.95


def test_without_holes_the_number_of_bins_counts():
    method = ToP(bins=8)
    model = pruned(method)
    method.mask[:, 0] = False
    record = forward_of(model)(BERT.batch(LENGTHS))
    found = method.cost_of(method.mask, *rows_of(record))
    assert found == pytest.approx(float(record.used.float() / record.dense), rel=1e-6)


def test_a_target_of_everything_lets_everything_stay():
    method = ToP(target_flops=1.0, bins=32)
    model = pruned(method)
    assert method.calibrate(forward_of(model), [BERT.batch((60, 41, 33, 52))]) == {"flops_fraction": 1.0}
    assert method.mask.all()


def test_holes_leave_by_relative_rank_and_nothing_comes_back():
    method = Holes(bins=8)
    model = pruned(method)
    forward_of(model)(BERT.batch(LENGTHS))
    for view in method.record.sites:
        free = view.alive & ~view.protected
        for row in range(len(LENGTHS)):
            score = view.alive.float() if view.score is None else view.score
            order = sorted(free[row].nonzero()[:, 0].tolist(), key=lambda i: (-score[row, i].item(), i))
            bins = bin_of(torch.arange(len(order)), torch.tensor(len(order)), 8)
            stay = {i for r, i in enumerate(order) if r < 2 or method.mask[view.number][bins[r]]}
            kept = (view.keep[row] & free[row]).nonzero()[:, 0].tolist()
            assert set(kept) == stay
    alive = [set(i[a].tolist()) for v in method.record.sites for i, a in [(v.after.index[0], v.after.alive[0])]]
    assert all(later <= earlier for earlier, later in pairwise(alive))
    assert len(alive[0]) < 24


def test_hard_concrete_variables_have_the_stated_chance():
    torch.manual_seed(0)
    for p in (0.05, 0.5, 0.9):
        parameter = torch.full((20_000,), odds(p))
        assert chance(parameter)[0].item() == pytest.approx(p, abs=1e-6)
        assert (sample(parameter) > 0).float().mean().item() == pytest.approx(p, abs=0.01)
    assert sample(parameter).min() >= 0 and sample(parameter).max() <= 1


@pytest.mark.parametrize("gates", [True, False])
def test_training_starts_from_nearly_all_tokens_with_odds_that_fall_with_rank_and_depth(gates):
    method = ToP(bins=8, site_gates=gates)
    pruned(method)
    assert method.mask.all() and method.hard_mask()[0].all()
    assert (chance(method.rank[0]) >= 0.9 - 1e-6).all() and (chance(method.rank).mean() > 0.8)
    assert (method.rank.diff(dim=1) < 0).all() and (method.rank.diff(dim=0) < 0).all()
    if gates:
        torch.testing.assert_close(chance(method.gate), torch.full((3,), 0.98))
    else:
        assert method.gate is None


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("protect", [None, (), (0, -1), tuple(range(8))], ids=["default", "none", "two", "eight"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_counted_macs_are_those_of_a_forward(family, protect, fuse):
    method = Holes(bins=8, protect=protect, fuse=fuse)
    model = pruned(method, family)
    record = forward_of(model, family)(FAMILIES[family].batch(LENGTHS))
    found = method.cost_of(method.mask, *rows_of(record))
    assert found == pytest.approx(float(record.used.float() / record.dense), rel=1e-6) and found < 0.95


@pytest.mark.parametrize("target", [0.6, 0.75, 0.9])
@pytest.mark.parametrize("holes", [True, False])
@pytest.mark.parametrize("fuse", [False, True])
def test_calibration_meets_the_target_and_drops_the_least_odds(target, holes, fuse):
    method = ToP(target_flops=target, bins=32, holes=holes, site_gates=True, fuse=fuse)
    model = pruned(method)
    with torch.no_grad():
        method.rank.copy_(torch.randn(3, 32, generator=torch.Generator().manual_seed(1)))
        method.gate.copy_(torch.tensor([2.0, -4.0, 2.0]))
    batches = [BERT.batch((60, 41, 33, 52), seed=seed) for seed in range(3)]
    forward = forward_of(model)
    reached = method.calibrate(forward, batches)["flops_fraction"]
    records = [forward(batch) for batch in batches]
    measured = float(sum(r.used for r in records) / sum(r.dense for r in records))
    assert measured == pytest.approx(reached, rel=1e-6)
    assert measured == pytest.approx(target, rel=0.02)
    assert method.mask[1].all(), "a site whose gate is off prunes only where the others cannot"
    odds = method.ordered()[::2]
    on, off = odds[method.mask[::2]], odds[~method.mask[::2]].sort().values
    assert on.min() > off[-2], "all but the last one off, which is the one that comes closest"
    assert holes or all(mask[:n].all() for mask, n in zip(method.mask, method.mask.sum(1).tolist(), strict=True))


def test_without_training_sites_lose_their_worst_ranks_the_deeper_the_more():
    method = ToP(target_flops=0.7, bins=32)
    model = pruned(method)
    method.calibrate(forward_of(model), [BERT.batch((60, 41, 33, 52))])
    left = method.mask.sum(1)
    assert (left.diff() <= 0).all() and left[-1] < left[0]
    assert all(mask[: int(n)].all() for mask, n in zip(method.mask, left, strict=True))


def test_a_target_out_of_reach_is_an_error_and_changes_nothing():
    method = ToP(target_flops=0.1)
    model = pruned(method)
    with pytest.raises(ValueError, match=r"target_flops=0.1 cannot be reached at=\[0, 1, 2\].*of the MACs are left"):
        method.calibrate(forward_of(model), [BERT.batch(LENGTHS)])
    assert method.mask.all()


def test_masks_of_zeros_and_ones_answer_the_same_in_training_and_without():
    method = ToP(bins=8, holes=True, site_gates=True)
    model = pruned(method, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    method._bound = lambda: None  # certain masks, beyond what training allows
    with torch.no_grad():
        method.rank.fill_(100.0)
        method.rank[:, 2::3] = -100.0
        method.gate.copy_(torch.tensor([100.0, 100.0, -100.0]))
        method.mask.copy_(method.hard_mask())
        hard = BERT.run(model.eval(), BERT.batch(LENGTHS))
        used = method.record.used.float()
        method.progress = 0.0
        soft = BERT.run(model.train(), BERT.batch(LENGTHS))
    assert not method.mask[:2, 2].any() and method.mask[2].all()
    torch.testing.assert_close(soft, hard, atol=1e-5, rtol=0)
    last = method.sites[2]  # where nothing leaves, and which is scored in training alone
    scoring = method.architecture.costs[last].width * (method.record.counts[last].n_attention ** 2).sum()
    torch.testing.assert_close(method.record.used - scoring, used, rtol=1e-5, atol=0)


def test_evaluation_in_the_soft_stage_uses_the_masks_of_the_moment():
    method = ToP(bins=8)
    model = pruned(method).eval()
    with torch.no_grad():
        method.rank[:, 4:] = -BOUND
    method.progress = 0.1
    forward_of(model)(BERT.batch(LENGTHS))
    assert method.record.counts[-1].n_attention.sum() < sum(LENGTHS)
    method.progress = 1.0
    forward_of(model)(BERT.batch(LENGTHS))
    assert method.record.counts[-1].n_attention.sum() == sum(LENGTHS)


def soft_step(method, steps: int, **config) -> list[float]:
    """Train the parameters of the method alone on its own loss; the expected cost after each step."""
    model, found = pruned(method, **config).train(), []
    optimizer = torch.optim.Adam(method.parameters(), lr=0.05)
    batch = BERT.batch(LENGTHS)
    for step in range(steps):
        method.progress = step / steps * method.soft_until
        BERT.run(model, batch)
        optimizer.zero_grad()
        method.loss(None, batch, method.record).backward()
        optimizer.step()
        found.append(method.expected(torch.tensor(LENGTHS).float(), torch.ones(4)).item())
    return found


def test_the_lagrangian_brings_the_expected_cost_to_the_target():
    method = ToP(target_flops=0.7, bins=8, rank_loss="none", ramp=0.2, soft_until=1.0)
    found = soft_step(method, 400)
    assert found[0] > 0.85 and found[-1] == pytest.approx(0.7, abs=0.02)
    assert method.multiplier[1] > 100, "the quadratic multiplier only ascends"


def test_masks_are_drawn_for_each_text_and_rounded():
    torch.manual_seed(0)
    method = ToP(bins=8, site_gates=False, at=(0, 1))
    model = pruned(method).train()
    with torch.no_grad():
        method.rank.zero_()
    method.progress = 0.1
    BERT.run(model, BERT.batch((24,) * 6))
    gates = method.record.sites[1].tokens.log_gate.detach().exp()
    assert ((gates < 1e-7) | (gates > 1 - 1e-6)).all()
    assert len({tuple(row.tolist()) for row in gates > 0.5}) > 3


def test_a_prefix_keeps_the_best_ranks_and_the_cost():
    method = ToP(target_flops=0.7, bins=32)
    model = pruned(method)
    method.mask.copy_(torch.rand(3, 32, generator=torch.Generator().manual_seed(2)) < 0.6)
    lengths, protected = torch.tensor([33, 65, 97]), torch.ones(3, dtype=torch.long)
    kept, cost = method.mask.sum(1), method.cost_of(method.mask, lengths, protected)
    method.prefix()
    assert torch.equal(method.mask.sum(1), kept)
    assert all(mask[:n].all() for mask, n in zip(method.mask, kept.tolist(), strict=True))
    assert method.cost_of(method.mask, lengths, protected) == pytest.approx(cost, rel=0.1)
    assert forward_of(model)(BERT.batch(LENGTHS)).flops_fraction() < 1


def test_what_is_watched():
    method = ToP(target_flops=0.6, bins=8, ramp=0.5, topk=4, site_gates=True)
    model = pruned(method).train()
    assert method.metrics() == {}, "before the first step"
    method.progress = 0.25
    BERT.run(model, BERT.batch(LENGTHS))
    ranking = method.record.sites[0].score.detach()
    method.loss(None, {}, method.record, {"ranking": ranking}).backward()
    found = method.metrics()
    assert found["cost_target"] == pytest.approx((found["cost_expected"] + 0.6) / 2), "half of the way"
    assert found["cost_hard"] == pytest.approx(1, abs=0.15)
    assert found["cost_expected"] == pytest.approx(method.expected(torch.tensor(LENGTHS).float(), torch.ones(4)).item())
    assert found["gates_on"] == 3 and (found["multiplier_1"], found["multiplier_2"]) == (0, 100)
    assert found["rank_overlap_0"] == 1
    for topk in (4, 20):  # of short rows the better half
        method.topk = topk
        method.loss(None, {}, method.record, {"ranking": -ranking})
        assert method.metrics()["rank_overlap_0"] < 0.1
    method.progress = 1.0
    assert {*method.metrics()} == {"rank_overlap_0"}, "masks and gates do not learn any more, the ranking does"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"target_flops": float("nan")}, "target_flops=nan: expected a fraction"),
        ({"target_latency_ms": float("inf")}, "target_latency_ms=inf: expected a positive number"),
        ({"soft_until": 1.5}, r"soft_until=1.5: expected a share of the training in \[0, 1\]"),
        ({"ramp": -0.1}, "ramp=-0.1: expected a share"),
        ({"rank_weight": -1}, "rank_weight=-1: expected a number from 0 up"),
        ({"rank_decay": 2}, r"rank_decay=2: expected a share of rank_weight in \[0, 1\]"),
    ],
)
def test_numbers_it_cannot_take_are_named(options, problem):
    with pytest.raises(ValueError, match=problem):
        ToP(**options)


def test_a_cost_above_the_target_raises_the_multipliers():
    method = ToP(target_flops=0.5, bins=8, rank_loss="none", ramp=1e-9)
    model = pruned(method).train()
    method.progress = 0.1
    BERT.run(model, BERT.batch(LENGTHS))
    method.loss(None, {}, method.record).backward()
    assert (method.multiplier.grad < 0).all()  # a step against the gradient raises them


def test_the_hard_stage_has_no_loss_but_a_gradient_of_zero():
    method = ToP(rank_loss="none", soft_until=0.5)
    model = pruned(method).train()
    method.progress = 0.5
    BERT.run(model, BERT.batch(LENGTHS))
    loss = method.loss(None, {}, method.record)
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in method.parameters())


def test_gradients_of_the_ranking_reach_the_early_layers_only():
    method = ToP(target_flops=1.0, rank_weight=1.0)
    model = pruned(method).train()
    method.progress = 0.0
    batch = BERT.batch(LENGTHS)
    BERT.run(model, batch)
    ranking = torch.rand(len(LENGTHS), 24)
    method.loss(None, batch, method.record, {"ranking": ranking}).backward()
    layers = model.bert.encoder.layer
    assert layers[0].attention.self.query.weight.grad.abs().sum() > 0
    assert layers[1].attention.self.query.weight.grad is None


@pytest.mark.parametrize("teacher", [None, {"logits": torch.zeros(4, 3)}])
def test_a_teacher_without_a_ranking_is_an_error(teacher):
    method = ToP()
    model = pruned(method).train()
    method.progress = 0.1
    BERT.run(model, BERT.batch(LENGTHS))
    with pytest.raises(ValueError, match="train with a teacher, or with rank_loss='none'"):
        method.loss(None, {}, method.record, teacher)


@pytest.mark.parametrize(
    "wrong", [{"target_flops": 0.0}, {"bins": 0}, {"bins": 8.5}, {"topk": 0}, {"ramp": -1}, {"rank_loss": "mse"}]
)
def test_top_refuses_what_cannot_be(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        ToP(**wrong)


def test_top_distils_the_ranking_and_meets_its_budget(tmp_path):
    toy, options = make_toy(tmp_path), OPTIONS | {"method": "top", "method_options": {"bins": 16}, "target_flops": 0.7}
    _, pruned = jobs.train(toy.model, toy.data, str(tmp_path / "top"), **options)
    summary = json.loads((tmp_path / "top" / jobs.SUMMARY).read_text())
    assert (pruned["method"], pruned["target_flops"]) == ("top", 0.7)
    assert summary["reached"]["flops_fraction"] == pytest.approx(0.7, rel=0.02)
    assert 1 / pruned["flops_ratio"] == pytest.approx(0.7, rel=0.1) and pruned["quality"] > 90


def test_expected_counts_are_those_of_the_bins_that_short_texts_fall_into():
    method = ToP(bins=32, site_gates=False)
    pruned(method)
    with torch.no_grad():
        method.rank[:, :24], method.rank[:, 24:] = 50.0, -50.0  # three quarters stay, for certain
    tokens, protected = torch.tensor([3.0, 5.0, 9.0, 26.0]), torch.ones(4)
    hard = method.cost_of(method.rank > 0, tokens.long(), protected)
    assert method.expected(tokens, protected).item() == pytest.approx(hard, rel=1e-5)
    share = torch.linspace(1, 0, 32).expand(3, 32)
    stay, bins = kept_of_bins(share, 26, method.floor), bin_of(torch.arange(4), torch.tensor(4), 32)
    of_four = 2 + share[0][bins[2:]].sum().item()  # the floor stays for certain
    assert stay(0, torch.tensor([1.0, 2.0, 0.0, 4.0])).tolist() == pytest.approx([1, 2, 0, of_four], abs=1e-5)
    assert stay(0, torch.tensor([0.5])).item() == pytest.approx(0.5)


def test_short_texts_meet_in_no_bin():
    """The texts of 1 to 12 tokens use every bin, none much more than others."""
    bins = torch.cat([bin_of(torch.arange(m), torch.tensor(m), 16) for m in range(1, 13)])
    counts = torch.bincount(bins, minlength=16)
    assert counts.min() >= 3 and counts.max() <= 8


def test_the_expected_cost_is_that_of_the_inputs_that_were_looked_at():
    method = ToP(target_flops=0.5, bins=8, rank_loss="none")
    model = pruned(method).train()
    long = [BERT.batch((60, 41, 33, 52))]
    method.prepare(forward_of(model.eval()), long)
    model.train()
    method.progress = 0.1
    BERT.run(model, BERT.batch((3, 3)))  # of which nothing can leave
    found = method.metrics()["cost_expected"]
    assert found == pytest.approx(method.expected(torch.tensor([60.0, 41, 33, 52]), torch.ones(4)).item())
    assert method.expected(torch.tensor([3.0, 3]), torch.ones(2)).item() > 1 > found
    loss = method.loss(None, {}, method.record)
    loss.backward()
    assert method.rank.grad.abs().sum() > 0, "the budget moves the masks all the same"


# --- the released code's settings ------------------------------------------------------------------------------------
def test_as_published_has_the_settings_of_the_released_code():
    published = ToP.as_published(target_flops=0.6)
    settings = {
        "at": tuple(range(1, 11)),
        "bins": 50,
        "topk": 20,
        "rank_loss": "arp2-topk",
        "rank_weight": 0.01,
        "rank_decay": 0.01,
        "site_gates": True,
        "holes": True,
        "floor": 0,
        "ramp": 0.25,
        "soft_until": 1.0,
        "target_flops": 0.6,
    }
    assert {name: getattr(published, name) for name in settings} == settings
    assert [published.phase(progress) for progress in (0.0, 0.999, 1.0)] == ["soft", "soft", "hard"]
    assert ToP.as_published(depth=6).at == (1, 2, 3, 4)
    assert ToP.as_published(bins=512, topk=60).bins == 512


def test_as_published_trains_softly_to_the_end_and_then_prunes_on_budget():
    method = ToP.as_published(depth=6, target_flops=0.8, bins=8)
    model, batch = pruned(method, num_hidden_layers=6).train(), BERT.batch(LENGTHS)
    assert method.early == [0], "of six layers the second one alone learns the ranking"
    weights, ranking = [], torch.rand(len(LENGTHS), 24, generator=torch.Generator().manual_seed(0))
    for method.progress in (0.05, 0.125, 0.25, 0.999):
        BERT.run(model, batch)
        losses = []
        for method.rank_weight in (0.0, 0.01):
            losses.append(method.loss(None, batch, method.record, {"ranking": ranking}))
        weights.append(((losses[1] - losses[0]) / method.ranking_loss_of(method.record, {"ranking": ranking})).item())
        losses[1].backward()
        assert method.soft and method.gate.grad.abs().sum() > 0 and method.rank.grad.abs().sum() > 0
    assert weights == pytest.approx([0.008, 0.005, 0.0001, 0.0001], rel=0.02, abs=2e-6)
    method.progress = 1.0
    reached = method.calibrate(forward_of(model.eval()), [batch])["flops_fraction"]
    record = forward_of(model)(batch)
    assert reached == pytest.approx(0.8, rel=0.05)
    assert float(record.used.float() / record.dense) == pytest.approx(reached, rel=1e-6)


# --- values ----------------------------------------------------------------------------------------------------------
def test_of_two_masks_the_one_within_the_budget_is_taken_though_the_other_is_nearer():
    costs = {4: 1.0, 3: 0.8, 2: 0.55, 1: 0.2, 0: 0.1}
    odds, gates_on = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.zeros(1, 1, dtype=torch.bool)
    found, mask = nearest_mask(odds, gates_on, lambda mask: costs[int(mask.sum())], 0.5, 0.51)
    assert found == 0.2 and mask.tolist() == [[True, False, False, False]]
    found, mask = nearest_mask(odds, gates_on, lambda mask: costs[int(mask.sum())], 0.5, 0.56)
    assert found == 0.55 and mask.tolist() == [[True, True, False, False]]


def test_calibration_stays_within_the_budget_where_the_nearest_mask_does_not():
    method = ToP(bins=2, floor=0, at=(0,))
    model, batch = pruned(method), BERT.batch((60, 41, 33, 52))
    lengths = rows_of(forward_of(model)(batch))
    half, none = (method.cost_of(torch.tensor([mask]), *lengths) for mask in ([True, False], [False, False]))
    method.target_flops = half / 1.05
    assert half > 0.4 > none
    assert method.calibrate(forward_of(model), [batch]) == {"flops_fraction": none}
    assert not method.mask.any()


def test_a_row_that_could_lose_all_is_counted_with_the_token_that_it_keeps():
    method = ToP(bins=4, floor=0, protect=())
    model = pruned(method)
    method.mask.zero_()
    record = forward_of(model)(BERT.batch(LENGTHS))
    assert record.counts[-1].n_attention.tolist() == [1] * 4
    found = method.cost_of(method.mask, *rows_of(record))
    assert found == pytest.approx(float(record.used.float() / record.dense), rel=1e-6)


def test_saturated_odds_come_back_to_where_they_have_a_gradient():
    method = ToP(bins=4, site_gates=True, rank_loss="none")
    model = pruned(method).train()
    with torch.no_grad():
        method.rank.copy_(torch.tensor([50.0, 50.0, -50.0, -50.0]).expand(3, 4))
        method.gate.fill_(-50.0)
    method.progress = 0.1
    BERT.run(model, BERT.batch(LENGTHS))
    assert method.rank[0].tolist() == pytest.approx([BOUND, BOUND, -BOUND, -BOUND])
    assert method.gate.tolist() == pytest.approx([-BOUND] * 3)
    method.loss(None, {}, method.record).backward()
    assert (method.gate.grad != 0).all()


def test_autocast_rounds_no_counts():
    share = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    many = torch.arange(200).float()
    plain = kept_of_bins(share, 200, 1)(1, many)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kept_of_bins(share, 200, 1)(1, many), plain)
