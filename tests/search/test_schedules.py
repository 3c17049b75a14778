"""Schedules: what they cost is what they take, and the search finds the best of them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset

from support.families import FAMILIES
from thresher import ATS, FirstK, ToFu, ToMe, TopK, prune
from thresher.core.cost import LatencyTable
from thresher.evaluation.predict import predict
from thresher.search.schedules import LEVELS, WIDTHS, Space, curves, neighbours, protected_by

LINE = ((10.0, 40.0), (1.0, 4.0))
PARTS = {"attention": LINE, "scored": LINE, "ffn": LINE, "rest": ((10.0, 40.0), (0.5, 0.5))}
TABLE = LatencyTable(**PARTS, dense=LINE, batch_size=1, threads=1)
LENGTHS = (24, 17, 30, 9, 12)
SCHEDULES = [(0, 5, 5, 12), (0, 0, 0, 20), (3, 4, 9, 15), (0, 0, 0, 0), (19, 20, 20, 20)]


def rows() -> Dataset:
    ids = [torch.randint(5, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]
    return Dataset.from_dict({"input_ids": ids})


def space(family: str = "bert", kind=TopK, table=None, **options) -> tuple[Space, torch.nn.Module]:
    model = FAMILIES[family].build(**options)
    info = prune(model, TopK(keep=1.0, at=())).token_pruner.architecture
    if table is not None:  # the dense model takes as long as the layers one by one
        table = replace(table, dense=((10.0, 40.0), (0.5 + 2 * info.depth, 0.5 + 8 * info.depth)))
    return Space(info, torch.tensor(LENGTHS), kind.needs_attention and kind.scores_all, table), model


@pytest.mark.parametrize("left", SCHEDULES)
@pytest.mark.parametrize("family, kind", [("bert", TopK), ("bert", FirstK), ("distilbert", TopK)])
@pytest.mark.filterwarnings("ignore:the model was pruned with")
def test_a_schedule_costs_what_it_takes(family, kind, left):
    searched, model = space(family, kind)
    left = left[: len(searched.layers)]
    found = predict(prune(model, kind(**searched.fields(left))), rows())
    assert searched.cost(left) == pytest.approx(found.macs_used / len(LENGTHS))
    assert searched.dense == pytest.approx(found.macs_dense / len(LENGTHS))


@pytest.mark.filterwarnings("ignore:the model was pruned with")
def test_a_method_that_keeps_at_most_costs_at_most_that():
    searched, model = space(kind=ATS)
    found = predict(prune(model, ATS(**searched.fields((0, 5, 5, 12)))), rows())
    assert found.macs_used / len(LENGTHS) <= searched.cost((0, 5, 5, 12))


def test_the_fields_of_a_schedule():
    searched, _ = space()
    assert searched.fields((0, 5, 5, 10)) == {"at": (1, 3), "keep": (0.75, 0.667)}
    assert searched.fields((0, 0, 4, 20)) == {"at": (2, 3), "keep": (0.8, 1)}, "a whole 1 is the protected token alone"


def test_a_cost_of_time_is_that_of_the_table():
    searched, _ = space(table=TABLE)
    mean = sum(LENGTHS) / len(LENGTHS)
    assert searched.dense == pytest.approx(0.5 + 4 * 2 * 0.1 * mean, rel=1e-5)
    # the last layer's FFN sees one token, which the line makes 0.1 ms
    assert searched.cost((0, 0, 0, 20)) == pytest.approx(0.5 + 7 * 0.1 * mean + 0.1, rel=1e-5)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("table", [None, TABLE], ids=["macs", "time"])
def test_the_frontier_is_as_good_as_trying_everything(family, table):
    searched, _ = space(family, table=table, **({"num_hidden_layers": 2} if family == "bert" else {"n_layers": 3}))
    assert len(searched.layers) == 2
    damage = np.random.default_rng(0).random((2, len(LEVELS))).cumsum(1)
    damage[:, 0] = 0

    def harm(left):
        return sum(row[b] - row[a] for row, a, b in zip(damage, (0, *left), left, strict=False))

    pairs = [pair for pair in itertools.product(range(len(LEVELS)), repeat=2) if pair[0] <= pair[1]]
    frontier = searched.frontier(damage)
    costs = [searched.cost(left) for left in frontier]
    assert searched.cost(searched.strongest) == pytest.approx(min(map(searched.cost, pairs)), rel=1e-3)
    for share in (0.95, 0.8, 0.7, 0.6, 0.5):
        budget = share * searched.dense
        found = searched.within(frontier, budget)
        # nothing that is cheaper by what rounding may take is better
        best = min(harm(pair) for pair in pairs if searched.cost(pair) <= budget - 0.02 * searched.dense)
        assert searched.cost(found) <= budget and harm(found) <= best + 1e-9
    assert costs == sorted(costs) or max(np.diff(costs) * -1) < 0.02 * searched.dense
    assert searched.within(frontier, 0.5 * min(costs)) is None


@pytest.mark.parametrize("left", SCHEDULES)
def test_neighbours_are_schedules_near_by(left):
    found = neighbours(left)
    assert left not in found and len(found) == len({*found}) > 5
    for one in found:
        assert list(one) == sorted(one) and len(one) == len(left)
        assert set(one) <= set(range(len(LEVELS)))


def test_curves_pass_through_what_was_measured_and_never_fall():
    found = curves([{0.75: 0.1, 0.5: 0.3, 0.0: 0.2}, {0.75: -1e-9, 0.5: 0.0, 0.0: 4.0}])
    assert found.shape == (2, len(LEVELS)) and (np.diff(found, axis=1) >= 0).all() and (found[:, 0] == 0).all()
    at = {share: LEVELS.index(share) for share in (0.75, 0.5, 0.0)}
    assert found[0, [at[0.75], at[0.5], at[0.0]]] == pytest.approx([0.1, 0.3, 0.3])
    assert found[1, [at[0.75], at[0.5], at[0.0]]] == pytest.approx([0.0, 0.0, 4.0])


@pytest.mark.parametrize("kind", ["macs", "time"])
def test_dense_is_the_model_without_hooks(kind):
    """The table's dense curve may be below the layers one by one, which run with hooks."""
    searched, _ = space(table=TABLE if kind == "time" else None)
    if kind == "macs":
        assert searched.dense == searched.cost((0, 0, 0, 0))
        return
    whole = replace(searched.table, dense=((10.0, 40.0), (4.0, 16.0)))
    quick = replace(searched, table=whole)
    assert quick.dense == pytest.approx(0.4 * sum(LENGTHS) / len(LENGTHS))
    assert quick.dense < quick.cost((0, 0, 0, 0)) == searched.cost((0, 0, 0, 0))
    assert quick.strongest == searched.strongest, "what the search finds does not hang on it"


# --- the family ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("family, kind", [("bert", TopK), ("bert", FirstK), ("distilbert", TopK)])
@pytest.mark.parametrize("budget", [0.55, 0.7, 0.85])
@pytest.mark.filterwarnings("ignore:the model was pruned with")
def test_a_member_of_the_family_meets_its_budget(family, kind, width, budget):
    searched, model = space(family, kind)
    searched = replace(searched, lengths=torch.tensor(LENGTHS * 5))
    schedule = searched.falling(width, budget)
    if schedule is None:
        assert width > 0, "the rectangle reaches every budget that can be reached"
        return
    found = predict(prune(model, kind(**schedule)), rows())
    assert found.macs_used / found.macs_dense == pytest.approx(budget, rel=0.021)


def test_the_family_goes_from_rectangular_to_geometric():
    info = replace(space()[0].info, depth=12, last_site=11, costs=space()[0].info.costs[:1] * 12)
    searched = Space(info, torch.full((4,), 400))
    steps = [searched.falling(width, 0.5) for width in WIDTHS]
    assert len(steps[0]["at"]) == 2 and steps[0]["keep"][-1] == 1, "all leave within two layers"
    spans = [schedule["at"][-1] - schedule["at"][0] for schedule in steps]
    assert spans == sorted(spans)
    wide = searched.falling(1.0, 0.8)["keep"]
    assert max(wide) - min(wide) < 0.03, "equal shares"
    assert all(0 < share <= 1 for schedule in steps for share in schedule["keep"])


def test_a_budget_out_of_reach_has_no_member():
    assert space()[0].falling(0.0, 0.01) is None
    assert space()[0].falling(0.32, 0.3) is None, "a wide one cannot be steep"


def test_queries_are_counted_as_they_stay():
    """Where a method keeps the query of a pair, the cost of a schedule is what the model then takes."""
    model, method = FAMILIES["bert"].build(), TopK(keep=0.2, at=(1, 2), protect={"until": [3]})
    batch = FAMILIES["bert"].batch((24, 18, 10))
    for row, place in enumerate((5, 12, 8)):
        batch["input_ids"][row, place] = 3
    texts = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    prune(model, method)
    with torch.no_grad():
        model(**batch)
    protected = protected_by(method, texts)
    assert protected.tolist() == [6, 13, 9]
    lengths = torch.tensor([len(text) for text in texts])
    space = Space(method.architecture, lengths, protected=protected)
    assert space._cost({"at": (1, 2), "keep": (0.2, 0.2)}) == pytest.approx(method.record.used.item() / 3)


# --- merging ---------------------------------------------------------------------------------------------------------
MERGING = [(2, 5, 5, 12), (0, 0, 0, 10), (10, 15, 17, 18), (0, 0, 0, 0), (1, 2, 3, 4)]


def merging(**options) -> tuple[Space, torch.nn.Module]:
    dropping, model = space(**options)
    return replace(dropping, merges=ToMe(r=0.1), charged=False), model


@pytest.mark.parametrize("left", MERGING)
@pytest.mark.parametrize("kind", [ToMe, ToFu])
@pytest.mark.filterwarnings("ignore:the model was pruned with")
def test_merging_costs_what_it_takes(kind, left):
    searched, model = merging()
    found = predict(prune(model, kind(**searched.options(left))), rows())
    assert searched.reachable(left) == left
    assert searched.cost(left) == pytest.approx(found.macs_used / len(LENGTHS), rel=1e-6)


def test_no_layer_merges_more_than_half():
    searched, _ = merging()
    assert searched.reachable((0, 20, 20, 20)) == (0, 10, 15, 17) and searched.cost((0, 20, 20, 20)) == float("inf")
    assert searched.options((0, 10, 15, 15)) == {"at": (1, 2), "r": (0.5, 0.5)}
    assert space()[0].reachable((0, 20, 20, 20)) == (0, 20, 20, 20)
    assert searched.strongest == searched.reachable((20, 20, 20, 20))


def test_even_merging():
    searched, _ = merging()
    found = {budget: searched.even(budget * searched.dense) for budget in (0.9, 0.7, 0.5, 0.01)}
    assert found.pop(0.01) is None
    costs = {budget: searched.cost(left) / searched.dense for budget, left in found.items()}
    assert all(budget - 0.12 < cost <= budget for budget, cost in costs.items()), costs
    shares = searched.options(found[0.7])["r"]
    assert len(shares) == 4 and max(shares) - min(shares) < 0.1


def test_the_frontier_of_merging_is_as_good_as_trying_everything():
    searched, _ = merging(num_hidden_layers=2)
    damage = np.random.default_rng(1).random((2, len(LEVELS))).cumsum(1)
    damage[:, 0] = 0
    pairs = [pair for pair in itertools.product(range(len(LEVELS)), repeat=2) if searched.reachable(pair) == pair]
    frontier = searched.frontier(damage)
    assert all(searched.reachable(left) == left for left in frontier) and len(pairs) < 200
    for share in (0.95, 0.8, 0.7):
        budget = share * searched.dense
        found = searched.within(frontier, budget)

        def harm(left):
            return damage[0, left[0]] + damage[1, left[1]] - damage[1, left[0]]

        best = min(harm(pair) for pair in pairs if searched.cost(pair) <= budget - 0.02 * searched.dense)
        assert harm(found) <= best + 1e-9
