"""Heads that share the budget of a layer: what they keep, in which bytes, and that what left is as if hidden."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache

from support.decoders import (
    BUDGETS,
    DECODERS,
    EAGER_ONLY,
    LENGTHS,
    WAYS,
    alone,
    build,
    difference,
    feed,
    make,
    prompts,
    run,
)
from thresher import TOVA, KeyDiff, KVzip, StreamingLLM, dense, prune, unprune
from thresher.caches.adaptive import shares
from thresher.caches.hooks import ours
from thresher.caches.ragged import RaggedLayer

METHODS = ["snapkv", "h2o", "keydiff", "random-cache", "expectedattention", "kvzip", "triattention", "ltp-cache"]
ENTRY = 2 * 8 * 4  # bytes of one entry of one head
STEP = {"input_ids": torch.tensor([[7], [8]])}


def adaptive(method: str, budget: str = "count", **options):
    return make(method, budget, heads="adaptive", **options)


@torch.no_grad()
def filled(model, batch: dict, steps: int = 0):
    cache, places = DynamicCache(config=model.config), (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model(**batch, position_ids=places, past_key_values=cache)
    for _ in range(steps):
        model(input_ids=torch.full((len(batch["input_ids"]), 1), 7), past_key_values=cache)
    return cache


def hides_as_it_evicts(family, implementation, method, budget, batch, way) -> None:
    evicted, hidden = (
        run(prune(build(family, implementation), adaptive(method, budget), layout=layout), batch, way)
        for layout in ("evict", "mask")
    )
    assert difference(evicted, hidden) <= 1e-5


def ways_of(batch: dict, method: str) -> list[str]:
    return [way for way in WAYS if way != "lookup" or (len(batch["input_ids"]) == 1 and method != "kvzip")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_is_evicted_is_as_if_hidden(way, implementation):
    for batch in (prompts(LENGTHS[:1]), prompts()):
        if way in ways_of(batch, "snapkv"):
            hides_as_it_evicts("llama", implementation, "snapkv", "hold", batch, way)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2", "gemma3"])
def test_in_other_families(family):
    hides_as_it_evicts(family, "sdpa", "h2o", "hold", prompts(), "turn")


@pytest.mark.parametrize("method", METHODS)
def test_of_other_methods(method):
    hides_as_it_evicts("llama", "sdpa", method, "share", prompts(), "turn")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", ["snapkv", "h2o", "kvzip"])
@pytest.mark.parametrize("family", [family for family in DECODERS if family != "deepseek-v3"])
def test_in_every_family_and_way(family, method):
    for implementation in ["eager"] if family in EAGER_ONLY else ["sdpa", "eager"]:
        for batch in (prompts(LENGTHS[:1]), prompts()):
            for way in ways_of(batch, method):
                hides_as_it_evicts(family, implementation, method, "hold", batch, way)


@pytest.mark.parametrize("value", ["vatp", "critical"])
def test_with_a_say_of_values_and_a_pyramid(value):
    options = {"value": value, "layers": "pyramid"}
    batch, answers = prompts(), []
    for layout in ("evict", "mask"):
        answers.append(run(prune(build("llama"), adaptive("snapkv", **options), layout=layout), batch, "turn"))
    assert difference(*answers) <= 1e-5


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("method", ["snapkv", "h2o"])
def test_a_row_answers_in_a_batch_as_alone(method, budget):
    batch, steps = prompts(), [1, 1, 9, 1]
    together = feed(prune(build("llama"), adaptive(method, budget)), batch, [40, *steps])
    for row, length in enumerate(LENGTHS):
        single = feed(prune(build("llama"), adaptive(method, budget)), alone(batch, row), [length, *steps])
        assert difference([x[row : row + 1] for x in together], single) <= 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_keeping_everything_is_the_dense_model_bit_for_bit(way):
    for batch in (prompts(LENGTHS[:1]), prompts()):
        if way in ways_of(batch, "keydiff"):
            whole = run(prune(build("llama"), adaptive("keydiff", keep=1.0)), batch, way)
            assert all(torch.equal(a, b) for a, b in zip(whole, run(build("llama"), batch, way), strict=True))


# --- which, how many, in which bytes ---------------------------------------------------------------------------------
def test_the_best_of_all_heads_stay_and_a_share_of_each():
    scores = torch.stack([torch.arange(20.0), torch.arange(20.0) + 100])[None]
    protected, live = torch.zeros(1, 2, 20, dtype=torch.bool), torch.ones(1, 2, 20, dtype=torch.bool)
    assert shares(scores, protected, live, torch.tensor([[[10]]])).tolist() == [[[2], [18]]]
    protected[:, 0, :5] = True  # the share of the first head lies within them
    assert shares(scores, protected, live, torch.tensor([[[10]]])).tolist() == [[[5], [15]]]
    live[:, 1, 5:] = False  # of the second head hardly anything is there
    assert shares(scores, protected, live, torch.tensor([[[10]]])).tolist() == [[[15], [5]]]


@pytest.mark.parametrize("lengths", [LENGTHS[:1], LENGTHS])
def test_heads_differ_and_bytes_are_those_of_the_formula(lengths):
    steps, rows = 3, len(lengths)
    model = prune(build("llama"), adaptive("snapkv"))
    cache, uneven = filled(model, prompts(lengths), steps), False
    for layer in ours(cache).values():
        held = sum(map(sum, layer.store.lengths)) + rows * 2 * steps
        assert layer.counts == [12 + steps] * rows and held == 2 * rows * (12 + steps)
        assert layer.store.keys.shape == (2 * rows * 12, 8) and layer.nbytes == held * ENTRY
        uneven = uneven or layer.store.lengths[0] != [12, 12]
    assert uneven
    row = model.token_pruner.report[1]
    assert row["bytes"] == rows * 2 * (12 + steps) * ENTRY and row["held"] == rows * (12 + steps)


def test_the_choice_is_that_of_the_mask():
    """And so is what is held: the positions of each head."""
    caches = [filled(prune(build("llama"), adaptive("h2o"), layout=way), prompts()) for way in ("evict", "mask")]
    for one, other in zip(*(ours(cache).values() for cache in caches), strict=True):
        assert isinstance(one, RaggedLayer) and torch.equal(one.store.position, other.position[other.live])
        assert ((one.store.received - other.received[other.live]).abs() < 1e-6).all()


def test_crop_goes_into_the_store():
    model = prune(build("llama"), adaptive("snapkv"))
    cache, again = filled(model, prompts(), steps=2), filled(model, prompts())
    for both in (cache, again):
        both.crop(-4 if both is cache else -2)  # recent=4: so many stay in each head
        assert both.get_seq_length() == 38
    for one, other in zip(ours(cache).values(), ours(again).values(), strict=True):
        assert one.counts == other.counts == [10, 10] and one.nbytes == 2 * 2 * 10 * ENTRY
        assert torch.equal(one.store.keys, other.store.keys)
    with pytest.raises(ValueError, match="3 tokens cannot be taken back"):
        again.crop(-3)


def test_rows_are_chosen_copied_and_pickled():
    model = prune(build("llama"), adaptive("h2o", "hold"))
    cache = filled(model, prompts(), steps=2)
    others = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    swapped = copy.deepcopy(cache)
    swapped.batch_repeat_interleave(2)
    swapped.batch_select_indices(torch.tensor([2, 0]))
    answer = model(**STEP, past_key_values=cache).logits
    for other in others:
        assert torch.equal(model(**STEP, past_key_values=other).logits, answer)
    assert (
        difference([model(input_ids=STEP["input_ids"].flip(0), past_key_values=swapped).logits], [answer.flip(0)])
        <= 1e-5
    )
    cache.reset()
    assert cache.get_seq_length() == 0 and ours(cache)[0].store is None


def test_it_goes_on_within_dense_and_not_without_the_method():
    model = prune(build("llama"), adaptive("snapkv"))
    cache = filled(model, prompts())
    other = copy.deepcopy(cache)
    with dense(model):
        answer = model(**STEP, past_key_values=copy.deepcopy(cache)).logits
    assert torch.equal(model(**STEP, past_key_values=cache).logits, answer)
    with pytest.raises(ValueError, match="its heads hold different numbers of entries: go on with the pruned model"):
        unprune(model)(**STEP, past_key_values=other)
    assert other.get_seq_length() == 40


def test_half_precision():
    model = prune(build("llama").to(torch.bfloat16), adaptive("snapkv", "hold"))
    cache = filled(model, prompts(), steps=5)
    assert ours(cache)[0].store.keys.dtype == torch.bfloat16
    assert model(**STEP, past_key_values=cache).logits.isfinite().all()


def test_what_cannot_share_is_refused():
    with pytest.raises(ValueError, match="heads='adaptive': StreamingLLM goes by places"):
        StreamingLLM(keep=64, heads="adaptive")
    with pytest.raises(ValueError, match="TOVA makes one choice for a layer"):
        TOVA(keep=64, heads="adaptive")
    for family, options in (("deepseek-v3", {}), ("llama", {"num_key_value_heads": 1})):
        with pytest.raises(ValueError, match=r"heads='adaptive' is not possible with \w+, whose layers have one key"):
            prune(build(family, **options), KeyDiff(keep=64, heads="adaptive"))


# --- layers that share a budget: KVzip, whose scores are there before anything leaves --------------------------------
SHARING = {"heads": "adaptive", "layers": "adaptive"}


@pytest.mark.parametrize("way", [way for way in WAYS if way != "lookup"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_what_layers_evict_together_is_as_if_hidden(way, implementation):
    for batch in (prompts(LENGTHS[:1]), prompts()):
        evicted, hidden = (
            run(prune(build("llama", implementation), make("kvzip", **SHARING), layout=layout), batch, way)
            for layout in ("evict", "mask")
        )
        assert difference(evicted, hidden) <= 1e-5


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2", "gemma3"])
def test_layers_share_in_other_families(family):
    evicted, hidden = (
        run(prune(build(family), make("kvzip", "share", **SHARING), layout=layout), prompts(), "turn")
        for layout in ("evict", "mask")
    )
    assert difference(evicted, hidden) <= 1e-5


def test_layers_share_and_a_row_answers_in_a_batch_as_alone():
    batch, steps = prompts(), [1, 1, 9, 1]
    together = feed(prune(build("llama"), make("kvzip", **SHARING)), batch, [40, *steps])
    for row, length in enumerate(LENGTHS):
        single = feed(prune(build("llama"), make("kvzip", **SHARING)), alone(batch, row), [length, *steps])
        assert difference([x[row : row + 1] for x in together], single) <= 1e-5
    whole = run(prune(build("llama"), make("kvzip", keep=1.0, **SHARING)), batch, "turn")
    assert all(torch.equal(a, b) for a, b in zip(whole, run(build("llama"), batch, "turn"), strict=True))


@pytest.mark.parametrize("lengths", [LENGTHS[:1], LENGTHS])
def test_the_best_of_all_layers_stay_in_the_bytes_of_the_formula(lengths):
    """No entry that has left is better than one that stayed, in any head of any layer."""
    rows, model = len(lengths), prune(build("llama"), make("kvzip", **SHARING), layout="mask")
    whole = ours(filled(model, prompts(lengths)))
    unprune(model)
    layers = ours(filled(prune(model, make("kvzip", **SHARING)), prompts(lengths)))
    assert sum(layer.nbytes for layer in layers.values()) == rows * 3 * 2 * 12 * ENTRY
    assert len({tuple(map(tuple, layer.store.lengths)) for layer in layers.values()}) > 1
    for row in range(rows):
        stayed, left = [], []
        for number, layer in whole.items():
            real = layer.position[row] >= 0
            free = real & (layer.position[row] >= 2) & (layer.position[row] < lengths[row] - 4)
            stayed.append(layer.received[row][free & layer.live[row]])
            left.append(layer.received[row][free & ~layer.live[row]])
            assert bool(layer.live[row][real & ~free].all())
            assert layers[number].store.lengths[row] == layer.live[row].sum(-1).tolist()
        assert torch.cat(stayed).min() >= torch.cat(left).max()


def test_a_single_head_of_each_layer_shares_with_other_layers_not():
    with pytest.raises(ValueError, match=r"have one key head, .*give heads='own', layers='equal'"):
        prune(build("deepseek-v3"), KVzip(keep=64))
    with pytest.raises(ValueError, match="layers='adaptive' shares a budget between layers: it is for KVzip, which"):
        KeyDiff(keep=64, **SHARING)
    with pytest.raises(ValueError, match="between layers: it is for heads='adaptive'"):
        KVzip(keep=64, heads="own")
