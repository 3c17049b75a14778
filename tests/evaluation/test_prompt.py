"""A prompt that is read once: what leaves a copy of its cache is what leaves while it is read."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import StaticLayer

from support.decoders import METHODS, build, make, prompts
from support.visual import VISUAL
from thresher import LTPCache, RandomCache, SnapKV, TriAttention, dense, prune, unprune
from thresher.caches.hooks import ours
from thresher.evaluation.prompt import going_on, read_prompt, stacked, uneven

EVEN = [name for name in METHODS if name != "ltp-cache"]  # methods that leave all layers and heads equally full

UNEVEN = {
    "pyramid": lambda: make("snapkv", layers="pyramid"),
    "heads": lambda: make("h2o", heads="adaptive"),
    "layers": lambda: make("kvzip", heads="adaptive", layers="adaptive"),
    "thresholds": lambda: make("ltp-cache", heads="adaptive"),
}


def next_logits(model, ids, cache):
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


def both(model, method, before, after):
    """Logits of ``after`` behind a pruned ``before``, and the cache: as a user gets them."""
    cache = DynamicCache()
    prune(model, method)
    with torch.no_grad():
        model(input_ids=before, past_key_values=cache)
        with dense(model):
            logits = next_logits(model, after, cache)
    unprune(model)
    return logits, cache


@pytest.mark.filterwarnings("ignore:.*QK-norm")  # of Knorm
@pytest.mark.parametrize("budget", ["share", "hold"])
@pytest.mark.parametrize("method", EVEN)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_copy_loses_what_the_cache_of_a_pruned_model_loses(family, method, budget):
    if (family, method) == ("gpt2", "triattention"):
        pytest.skip("it goes by rotary positions")
    model, ids = build(family), prompts((40,))["input_ids"]
    before, after = ids[:, :34], ids[:, 34:]
    prompt = read_prompt(model, before)
    for _ in range(2):  # whatever was evicted before
        wanted, cache = both(model, make(method, budget), before, after)
        own = prompt.evicted(make(method, budget))
        for number, layer in ours(own).items():
            assert torch.equal(ours(cache)[number].position[..., : layer.held], layer.position)
        torch.testing.assert_close(next_logits(model, after, own), wanted, atol=1e-5, rtol=0)
    assert ours(prompt.cache)[len(prompt.cache.layers) - 1].held == 34


@pytest.mark.parametrize("method", EVEN)
def test_a_prompt_in_two_pieces_is_as_one(method):
    model, ids = build("llama"), prompts((40,))["input_ids"]
    whole = read_prompt(model, ids[:, :36])
    parts = read_prompt(model, ids[:, 20:36], read_prompt(model, ids[:, :20]))
    torch.testing.assert_close(parts.logits, whole.logits, atol=1e-5, rtol=0)
    logits = [next_logits(model, ids[:, 36:], one.evicted(make(method))) for one in (whole, parts)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


def test_everything_kept_is_the_dense_model():
    model, ids = build("llama"), prompts((40,))["input_ids"]
    prompt = read_prompt(model, ids[:, :30])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    torch.testing.assert_close(prompt.logits, wanted[:, 29], atol=1e-5, rtol=0)
    for cache in (prompt.full(), prompt.evicted(SnapKV(keep=1.0, sinks=1, recent=1))):
        torch.testing.assert_close(next_logits(model, ids[:, 30:], cache), wanted[:, 30:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rows_of_several_caches_answer_as_alone(family):
    model, ids = build(family), prompts((40,))["input_ids"]
    names = [name for name in EVEN if name != "knorm" or family == "llama"]  # which QK-norm serves badly
    prompt = read_prompt(model, ids[:, :34])
    alone = torch.cat([next_logits(model, ids[:, 34:], prompt.evicted(make(name))) for name in names])
    together = stacked([prompt.evicted(make(name)) for name in names])
    found = next_logits(model, ids[:, 34:].expand(len(names), -1), together)
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="unequal numbers"):
        stacked([prompt.full(), prompt.evicted(make("snapkv"))])


def test_a_pruned_model_is_refused():
    model = prune(build("llama"), RandomCache(keep=0.5))
    with pytest.raises(ValueError, match="unprune"):
        read_prompt(model, prompts((40,))["input_ids"])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("method", UNEVEN)
def test_an_uneven_cache_goes_on_as_that_of_a_pruned_model(family, method):
    model, ids = build(family), prompts((40,))["input_ids"]
    before, after = ids[:, :34], ids[:, 34:]
    prompt = read_prompt(model, before)
    for _ in range(2):
        wanted, _ = both(model, UNEVEN[method](), before, after)
        cache = prompt.evicted(UNEVEN[method]())
        assert uneven(cache)
        with going_on(model, cache):
            found = next_logits(model, after, cache)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert not hasattr(model, "token_pruner") and not uneven(prompt.full())


@pytest.mark.parametrize(("method", "said"), [(TriAttention, "knows no centres"), (LTPCache, "no thresholds")])
def test_a_method_that_has_learned_nothing_is_refused(method, said):
    prompt = read_prompt(build("llama"), prompts((40,))["input_ids"])
    with pytest.raises(ValueError, match=said):
        prompt.evicted(method(keep=0.5, heads="own"))


def test_a_target_of_time_is_measured_first():
    prompt = read_prompt(build("llama"), prompts((40,))["input_ids"])
    method = SnapKV(target_ms_per_token=1e6, every=1, sinks=2, recent=4)
    assert {layer.held for layer in ours(prompt.evicted(method)).values()} == {40} and [*method.costs] == [1]
    with pytest.raises(ValueError, match="cannot be reached"):
        prompt.evicted(SnapKV(target_ms_per_token=1e-9, every=1, sinks=2, recent=4))


def test_layers_that_are_no_rectangles_of_entries_are_not_stacked():
    cache = DynamicCache()
    cache.layers = [StaticLayer(max_cache_len=8)]
    with pytest.raises(ValueError, match="is a StaticLayer"):
        stacked([cache])


def test_pictures_cannot_be_read_from_their_ids():
    reader = VISUAL["llava"].build()
    with pytest.raises(ValueError, match="holds placeholders of pictures or sounds"):
        read_prompt(reader, VISUAL["llava"].batch(reader, (1,))["input_ids"])
