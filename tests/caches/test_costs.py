"""A budget of milliseconds: what is made of a table of costs, and that such a table is measured."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from support.decoders import SMALL, build, prompts
from thresher import KeyDiff, SnapKV, dense, prune
from thresher.caches import hooks as module
from thresher.caches.costs import StepCosts, measured
from thresher.caches.hooks import ours

COSTS = StepCosts((10, 110), (2.0, 4.0))  # 1.8 ms, and 0.02 ms of each entry


def timed(target: float, costs=COSTS, rows: int = 1, **options):
    model = prune(build("llama"), KeyDiff(target_ms_per_token=target, every=4, **SMALL | options))
    model.token_pruner.costs[rows] = costs
    return model


@torch.no_grad()
def held(model, steps: int = 9) -> list[int]:
    cache, counts = DynamicCache(), []
    model(**prompts((60,)), past_key_values=cache)
    for _ in range(steps):
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        counts.append(cache.layers[0].held)
    return counts


def test_a_step_takes_no_longer_than_the_target():
    counts = held(timed(2.3))
    assert max(counts) == 25 and min(counts) == 22 and COSTS.at(25) == pytest.approx(2.3)
    assert max(held(timed(2.7))) == 45


def test_a_target_that_everything_meets_lets_nothing_leave():
    assert held(timed(60.0))[-1] == 69
    assert held(timed(3.0, StepCosts((10, 110), (2.0, 2.0))))[-1] == 69  # entries cost nothing
    assert held(timed(3.0, StepCosts((10, 110), (2.0, 1.9))))[-1] == 69  # that they save time is noise


def test_what_cannot_be_reached_is_refused_with_what_can():
    model, cache = timed(1.9), DynamicCache()
    says = r"target_ms_per_token=1\.9 cannot be reached: with the 9 entries .* a step of 1 at once takes 1\.98 ms"
    with pytest.raises(ValueError, match=says):
        model(**prompts((60,)), past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert max(held(timed(1.98))) == 9
    with dense(model):
        model(**prompts((60,)))


def test_each_number_of_rows_has_its_table(monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(module, "measured", lambda hooks, rows: asked.append(rows) or COSTS)
    model = prune(build("llama"), SnapKV(target_ms_per_token=2.3, every=4, **SMALL))
    for lengths in ((40,), (40,), (40, 27), (40, 27)):
        model.generate(**prompts(lengths), max_new_tokens=3, do_sample=False)
    assert asked == [1, 2]
    assert copy.deepcopy(model).token_pruner.costs == {1: COSTS, 2: COSTS}


@pytest.mark.parametrize("heads", ["own", "adaptive"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_steps_are_measured_over_caches_of_the_given_size(family, heads, monkeypatch):
    model = prune(build(family), KeyDiff(target_ms_per_token=1e9, every=4, heads=heads, **SMALL))
    seen: list[list[int]] = []
    own = model.forward

    def watch(*args, **kwargs):
        answer = own(*args, **kwargs)
        cache = kwargs["past_key_values"]
        seen.append([layer.held for layer in ours(cache).values()])
        assert all(layer.evictions == 0 for layer in ours(cache).values())
        return answer

    monkeypatch.setattr(model, "forward", watch)
    costs = measured(model.token_pruner.hooks, rows=2)
    assert costs.entries == ((61, 123, 247) if family == "gpt2" else (64, 512, 2048))
    assert all(ms > 0 for ms in costs.ms)
    assert {max(counts) for counts in seen} >= {entries + 1 for entries in costs.entries}
    monkeypatch.undo()
    assert model(**prompts()).past_key_values.get_seq_length() == 40 and 2 in model.token_pruner.costs


def test_a_model_without_a_head_is_measured():
    model = prune(build("llama").model, KeyDiff(target_ms_per_token=1e9, every=4, **SMALL))
    assert model(**prompts()).past_key_values.get_seq_length() == 40 and list(model.token_pruner.costs) == [2]


def test_a_table_needs_two_points():
    with pytest.raises(ValueError, match="expected two or more points"):
        StepCosts((64,), (1.0,))
    with pytest.raises(ValueError, match="target_ms_per_token=0: expected milliseconds, as 20"):
        KeyDiff(target_ms_per_token=0)
