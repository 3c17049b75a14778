"""Prompts that shorten: what has left is as if hidden while decoding, also of an untouched model; cache methods work
on the tokens that are left."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Llama4ForCausalLM,
    Llama4TextConfig,
    QuantizedCache,
    StaticCache,
)

from support.decoders import (
    DECODERS,
    EAGER_ONLY,
    GROUPED,
    LENGTHS,
    SMALL,
    WAYS,
    alone,
    build,
    difference,
    feed,
    prompts,
    run,
)
from thresher import (
    H2O,
    KeyDiff,
    KVzip,
    LazyLLM,
    LTPCache,
    SnapKV,
    StreamingLLM,
    Threshold,
    TopK,
    TriAttention,
    dense,
    prune,
    unprune,
)
from thresher.caches import layer as layers
from thresher.caches.hooks import ours
from thresher.caches.layer import PrunedLayer

TOLERANCE = 1e-5
TOKENS = {  # rows of a batch keep equal shares, or as many as a threshold says, also all of them
    "share": lambda: TopK(keep=0.5, at=(0, 1)),
    "threshold": lambda: Threshold(0.9, at=(0, 1)),
    "one": lambda: TopK(keep=8, at=(1,)),
    "short rows stay": lambda: TopK(keep=0.5, at=(0, 1), min_tokens=30),
    "queries and keys": lambda: LazyLLM(keep=0.5, at=(0, 1), **SMALL),  # looked at once more when a layer has run
}
CACHES = {
    "none": lambda: None,
    "snapkv": lambda: SnapKV(keep=0.5, **SMALL),
    "h2o": lambda: H2O(hold=10, every=3, **SMALL),
    "keydiff": lambda: KeyDiff(keep=9, **SMALL),
    "kvzip": lambda: KVzip(keep=0.5, request=(9, 8, 7), part=15, overlap=3, **SMALL),
    "streamingllm": lambda: StreamingLLM(hold=12, sinks=2, every=3),
}
SLIDES = {"layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]}
SLIDES |= {"num_hidden_layers": 4, "sliding_window": 12}
ALL_SLIDE = {"sliding_window": 12, "num_hidden_layers": 3}


def pruned(family="llama", tokens="share", cache="none", layout="padded", implementation="sdpa", **options):
    model = build(family, implementation, **options)
    return prune(model, TOKENS[tokens](), cache=CACHES[cache](), layout=layout)


def ways_of(batch: dict) -> list[str]:
    return [way for way in WAYS if way != "lookup"]  # a prompt that comes with a draft is refused


def hides_as_it_drops(batch: dict, way: str, **case) -> None:
    dropped, hidden = (run(pruned(layout=layout, **case), batch, way) for layout in ("padded", "mask"))
    assert difference(dropped, hidden) <= TOLERANCE


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("cache", CACHES)
def test_what_has_left_is_as_if_hidden(tokens, cache):
    hides_as_it_drops(prompts(), "turn", tokens=tokens, cache=cache)
    hides_as_it_drops(prompts(), "beams", tokens=tokens, cache=cache)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DECODERS)
def test_what_has_left_is_as_if_hidden_in_every_family_and_way(family, implementation):
    if implementation == "sdpa" and family in EAGER_ONLY:
        pytest.skip("it has a soft cap")
    for cache in ("none", "snapkv", "h2o"):
        for tokens in ("share", "threshold"):
            for batch in (prompts(LENGTHS[:1]), prompts()):
                for way in ways_of(batch):
                    case = {"family": family, "implementation": implementation, "tokens": tokens, "cache": cache}
                    hides_as_it_drops(batch, way, **case)


# --- an untouched model ----------------------------------------------------------------------------------------------
@torch.no_grad()
def untouched(family: str, batch: dict, steps: int, gone: list[torch.Tensor], **options) -> list[torch.Tensor]:
    """Logits behind the prompt of one row and behind each step after it, of a model that nobody pruned: one forward
    without a cache over all of it, in which ``gone`` (N,) bool are hidden from each layer by masks of our own."""
    model = build(family, "eager", **options)
    more = torch.randint(5, 97, (steps,), generator=torch.Generator().manual_seed(9))
    ids = torch.cat([batch["input_ids"], more[None]], 1)
    count = batch["input_ids"].shape[1]

    def hide(number: int):
        def before(layer, args, kwargs):
            columns = torch.zeros(ids.shape[1], dtype=torch.bool)
            columns[:count] = gone[number]
            hidden = columns[None].expand(len(columns), -1) & ~torch.eye(len(columns), dtype=torch.bool)
            mask = kwargs["attention_mask"].masked_fill(hidden[None, None], torch.finfo(torch.float32).min)
            return args, kwargs | {"attention_mask": mask}

        return before

    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(hide(number), with_kwargs=True)
    logits = model(input_ids=ids, use_cache=False).logits
    return [logits[:, i] for i in range(count - 1, ids.shape[1])]


def gone_before(model, count: int) -> list[torch.Tensor]:
    """(N,) bool for each layer: which tokens of the prompt had left before it."""
    record, gone = model.token_pruner.record, []
    for number in range(model.config.num_hidden_layers):
        tokens = record.entering(number)
        there = torch.zeros(count, dtype=torch.bool)
        there[tokens.index[0][tokens.alive[0]]] = True
        gone.append(~there)
    return gone


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("qwen3", {}), ("gemma3", {}), ("gemma3", SLIDES), ("mistral", ALL_SLIDE), ("phi3", ALL_SLIDE)],
    ids=["llama", "qwen3", "gemma3", "gemma3-behind", "mistral-slides", "phi3-slides"],
)
def test_decoding_is_that_of_an_untouched_model_with_masks(monkeypatch, family, options, implementation):
    monkeypatch.setattr(layers, "SPARE", 2)  # so that layers slide
    steps, batch = 30, prompts(LENGTHS[:1])
    model = pruned(family, "share", implementation=implementation, **options)
    for parts in ([40, *[1] * steps], [40, 1, 12, *[1] * (steps - 13)]):
        answers = feed(model, batch, parts)
        with torch.no_grad():
            model(**batch, use_cache=False)  # the same choice, for its record
        gone = gone_before(model, 40)
        assert [int(there.sum()) for there in gone[:3]] == [0, 20, 30]
        expected = untouched(family, batch, steps, gone, **options)
        ends = torch.tensor(parts).cumsum(0) - 40
        assert difference(answers, [expected[end] for end in ends]) <= TOLERANCE


def test_a_layer_that_slides_stays_bounded(monkeypatch):
    monkeypatch.setattr(layers, "SPARE", 2)
    model, cache = pruned("gemma3", "share", **SLIDES), DynamicCache()
    with torch.no_grad():
        model(**prompts(), past_key_values=cache)
        assert [type(x) is PrunedLayer for x in cache.layers] == [False, True, True, True]
        for token in range(60):
            model(input_ids=torch.tensor([[5 + token], [6 + token]]), past_key_values=cache)
    assert cache.layers[1].held <= 12 + 4 and cache.layers[3].held <= 12 + 4 and cache.layers[2].held == 10 + 60
    assert all(x.get_seq_length() == 100 for x in cache.layers)


# --- keeping everything, rows of a batch -----------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@pytest.mark.parametrize("way", WAYS)
def test_keeping_everything_is_the_dense_model_bit_for_bit(family, way):
    for batch in (prompts(LENGTHS[:1]), prompts()):
        if way in ways_of(batch):
            for cache in (None, KeyDiff(keep=1.0, **SMALL)):
                whole = run(prune(build(family), TopK(keep=1.0), cache=cache, layout="padded"), batch, way)
                assert all(torch.equal(a, b) for a, b in zip(whole, run(build(family), batch, way), strict=True))


@pytest.mark.parametrize("layout", ["auto", "padded", "mask"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("tokens", ["share", "threshold"])
def test_a_row_answers_in_a_batch_as_alone(tokens, cache, layout):
    batch, model = prompts(), pruned("llama", tokens, cache, layout)
    together = feed(model, batch, [40, 1, 9, *[1] * 5])
    for row, length in enumerate(LENGTHS):
        single = feed(model, alone(batch, row), [length, 1, 9, *[1] * 5])
        assert difference([x[row : row + 1] for x in together], single) <= TOLERANCE


@pytest.mark.parametrize("family", ["gemma3", "gpt-neox", "deepseek-v3"])
def test_a_row_answers_in_a_batch_as_alone_in_other_families(family):
    options = SLIDES if family == "gemma3" else {}
    batch, model = prompts(), pruned(family, "threshold", **options)
    together = feed(model, batch, [40, 1, 9, *[1] * 5])
    for row, length in enumerate(LENGTHS):
        single = feed(model, alone(batch, row), [length, 1, 9, *[1] * 5])
        assert difference([x[row : row + 1] for x in together], single) <= TOLERANCE


def test_something_leaves_and_the_cache_says_what_it_has_seen():
    model, cache = pruned("llama", "share"), DynamicCache()
    with torch.no_grad():
        model(**prompts(), past_key_values=cache)
    assert [x.get_seq_length() for x in cache.layers] == [40] * 3 and list(ours(cache)) == [1, 2]
    assert [cache.layers[n].counts for n in (1, 2)] == [[20, 14], [10, 7]]
    entry = 2 * 2 * 8 * 4
    assert [cache.layers[n].nbytes for n in (1, 2)] == [2 * 20 * entry, 2 * 10 * entry]
    assert difference(run(model, prompts(), "step"), run(build("llama"), prompts(), "step")) > 1e-2


@pytest.mark.parametrize("cache", ["none", "snapkv"])
def test_generate_answers_a_padded_batch_as_its_rows(cache):
    model, batch = pruned("llama", "threshold", cache, "auto"), prompts()
    options = {"max_new_tokens": 6, "do_sample": False}
    together = model.generate(**batch, **options)[:, 40:]
    for row, length in enumerate(LENGTHS):
        assert torch.equal(together[row], model.generate(**alone(batch, row), **options)[0, length:])


def test_a_second_turn_of_generate_goes_on_from_what_is_held():
    model, batch, cache = pruned("llama", "share"), prompts(LENGTHS[:1]), DynamicCache()
    options = {"max_new_tokens": 4, "do_sample": False, "past_key_values": cache, "return_dict_in_generate": True}
    first = model.generate(**batch, **options).sequences
    turn = torch.cat([first, prompts((7,))["input_ids"]], 1)
    second = model.generate(input_ids=turn, attention_mask=torch.ones_like(turn), output_logits=True, **options)
    fed = DynamicCache()
    with torch.no_grad():
        model(input_ids=batch["input_ids"], past_key_values=fed)
        for token in first[0, 40:43]:
            model(input_ids=token[None, None], past_key_values=fed)
        logits = model(input_ids=turn[:, 43:], past_key_values=fed).logits[:, -1]
    assert difference([second.logits[0]], [logits]) <= TOLERANCE


def test_drafts_to_a_cache_that_is_filled_are_refused():
    """transformers would feed the prompt once more."""
    batch, held = {name: torch.cat([x[:, -20:]] * 2, 1) for name, x in prompts((20,)).items()}, DynamicCache()
    model = pruned("llama", "share", "snapkv")
    with torch.no_grad():
        token = model(**batch, past_key_values=held).logits[:, -1:].argmax(-1)
    ids, options = torch.cat([batch["input_ids"], token], 1), {"max_new_tokens": 10, "do_sample": False}
    with pytest.raises(ValueError, match="feeds all of a conversation once more where drafts come to a cache that"):
        model.generate(ids, past_key_values=held, prompt_lookup_num_tokens=3, **options)
    assert model.generate(ids, past_key_values=held, **options).shape == (1, 51)


def test_within_dense_nothing_leaves_and_a_pruned_cache_goes_on():
    model, batch, token = pruned("llama", "share", "snapkv"), prompts(), torch.tensor([[7], [8]])
    plain = run(build("llama"), batch, "turn")
    with dense(model):
        assert all(torch.equal(a, b) for a, b in zip(run(model, batch, "turn"), plain, strict=True))
    cache = DynamicCache()
    with torch.no_grad():
        model(**batch, past_key_values=cache)
        twin = copy.deepcopy(cache)
        expected = model(input_ids=token, past_key_values=cache).logits
        with dense(model):
            assert torch.equal(model(input_ids=token, past_key_values=twin).logits, expected)


def test_a_copy_of_a_model_and_its_method_prune_alone():
    model = pruned("llama", "share", "snapkv")
    expected = run(model, prompts(), "step")
    twin = copy.deepcopy(model)
    assert difference(run(twin, prompts(), "step"), expected) == 0.0
    unprune(twin)
    assert difference(run(twin, prompts(), "step"), run(build("llama"), prompts(), "step")) == 0.0
    assert (
        difference(run(model, prompts(), "step"), expected) == 0.0 and vars(unprune(model)).keys() == vars(twin).keys()
    )


# --- together with a cache method ------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["padded", "mask"])
@pytest.mark.parametrize("length", [11, 40, 77])
@pytest.mark.parametrize("keep", [0.25, 0.6, 9])
def test_a_cache_method_keeps_a_share_of_what_came_as_far(length, keep, layout):
    model, cache = build("llama"), DynamicCache()
    prune(model, TopK(keep=0.5, at=(0, 1)), cache=SnapKV(keep, **SMALL), layout=layout)
    with torch.no_grad():
        model(**prompts((length, 10), width=length), past_key_values=cache)
    for number, layer in ours(cache).items():
        for row, came in enumerate((length, 10)):
            for _ in range(number):
                came = -(-came // 2)  # at each site a half leaves
            share = -(-came * keep // 1) if isinstance(keep, float) else keep
            assert layer.arrived[row] == came and layer.counts[row] == min(came, max(6, int(share)))
            assert int(layer.live[row, 0].sum()) == layer.counts[row]


def test_what_stays_in_a_cache_is_among_what_came_as_far():
    model, cache = pruned("llama", "share", "snapkv"), DynamicCache()
    with torch.no_grad():
        model(**prompts(), past_key_values=cache)
        record = model.token_pruner.record
    for number, layer in ours(cache).items():
        tokens = record.entering(number)
        for row, length in enumerate(LENGTHS):
            came = set((tokens.index[row][tokens.alive[row]] - (40 - length)).tolist())
            held = layer.position[row][layer.live[row]].tolist()
            assert {*held} <= came and length - 1 in held  # the last token of a prompt never leaves


def test_the_order_of_rows_and_of_calls_does_not_matter():
    model, batch = pruned("llama", "threshold", "snapkv"), prompts()
    first = run(model, batch, "turn")
    swapped = run(model, {name: x.flip(0) for name, x in batch.items()}, "turn")
    assert difference([x.flip(0) for x in swapped], first) <= TOLERANCE
    assert difference(run(model, batch, "turn"), first) == 0.0


@pytest.mark.parametrize(
    ("kind", "verb", "learned"), [(TriAttention, "calibrate", "centre"), (LTPCache, "learn", "threshold")]
)
def test_a_cache_method_learns_beside_tokens_what_it_learns_alone(kind, verb, learned):
    batch, alone = prompts((60,)), prune(build("llama"), kind(keep=0.5, **SMALL)).token_pruner
    model = prune(build("llama"), LazyLLM(keep=0.5, at=(0,), **SMALL), cache=kind(keep=0.5, **SMALL))
    with pytest.raises(ValueError, match=rf"yet: model\.token_pruner\.cache\.{verb}\("):
        model(**batch)
    for method in (alone, model.token_pruner.cache):
        getattr(method, verb)([batch])
    assert torch.equal(getattr(model.token_pruner.cache, learned), getattr(alone, learned))
    model(**batch)
    assert model.token_pruner.cache.report[1]["held"] < 30  # of which a half leaves at both


def test_a_budget_of_time_is_measured_beside_tokens():
    method = SnapKV(target_ms_per_token=1e9, every=2, **SMALL)
    model = prune(build("llama"), LazyLLM(keep=0.5, at=(0,), **SMALL), cache=method)
    assert model.generate(**prompts(), max_new_tokens=4, do_sample=False).shape == (2, 44)
    assert list(method.costs) == [2] and [row["held"] for row in method.report] == [43 + 30, 20 + 14 + 6, 20 + 14 + 6]


def test_reports_of_both():
    model = pruned("llama", "share", "snapkv")
    run(model, prompts(), "step")
    tokens, cache = model.token_pruner.report, model.token_pruner.cache.report
    assert [row["layer"] for row in cache] == [0, 1, 2] and all(row["bytes"] < row["dense_bytes"] for row in cache)
    assert cache[2]["held"] < cache[1]["held"] < cache[0]["held"] and tokens[0]["tokens_in"] == 67


def test_both_are_saved_and_come_back(tmp_path):
    model = pruned("llama", "share", "snapkv")
    expected = run(model, prompts(), "step")
    model.save_pretrained(tmp_path)
    entry = model.config.to_dict()["token_pruning"]
    assert entry["method"] == "topk" and entry["cache"]["method"] == "snapkv" and entry["cache"]["keep"] == 0.5
    again = prune(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), layout="padded")
    assert isinstance(again.token_pruner.cache, SnapKV)
    assert again.token_pruner.to_dict() == model.token_pruner.to_dict()
    assert difference(run(again, prompts(), "step"), expected) == 0.0


def test_pruning_again_replaces_both_and_can_keep_the_cache_method():
    model = pruned("llama", "share", "snapkv")
    method = model.token_pruner
    prune(model, method, layout="mask")
    assert model.token_pruner is method and isinstance(method.cache, SnapKV) and method.cache.hooks is not None
    with pytest.warns(UserWarning, match="topk replaces it"):
        prune(model, TopK(keep=0.5, at=(0, 1)))
    assert model.token_pruner.cache is None and "cache" not in model.config.token_pruning


# --- what is refused -------------------------------------------------------------------------------------------------
def test_methods_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="cache= goes with a method that prunes tokens"):
        prune(build("llama"), KeyDiff(keep=9, **SMALL), cache=SnapKV(keep=9, **SMALL))
    with pytest.raises(ValueError, match="cache= goes with a method that prunes tokens"):
        prune(build("llama"), cache=SnapKV(keep=9, **SMALL))
    with pytest.raises(TypeError, match="cache= takes a method that prunes a KV cache"):
        prune(build("llama"), TopK(), cache=TopK())
    method = SnapKV(keep=9, **SMALL)
    prune(build("llama"), TopK(), cache=method)
    with pytest.raises(ValueError, match="this SnapKV prunes another model"):
        prune(build("llama"), TopK(), cache=method)


def test_a_cache_method_that_cannot_serve_leaves_the_model_as_it_was():
    model = build("mistral", **ALL_SLIDE)
    with pytest.raises(ValueError, match=r"snapkv is not possible with .*: all of its layers slide"):
        prune(model, TopK(keep=0.5), cache=SnapKV(keep=9, **SMALL))
    assert not hasattr(model, "token_pruner")


def test_a_prompt_that_is_not_there_at_once_is_refused():
    model, batch = pruned("llama", "share"), prompts(LENGTHS[:1])
    options = {"max_new_tokens": 3, "do_sample": False}
    with pytest.raises(ValueError, match="topk looks at all of a prompt, which prefill_chunk_size cuts into parts"):
        model.generate(**batch, **options, prefill_chunk_size=16)
    with pytest.raises(ValueError, match="topk cannot tell a prompt from the draft that comes with it: generate"):
        model.generate(**batch, **options, prompt_lookup_num_tokens=3)
    with dense(model):
        assert model.generate(**batch, **options, prefill_chunk_size=16).shape == (1, 43)


def test_caches_that_are_not_ours_decode_one_even_prompt_or_refuse():
    """A quantized cache holds what it was given; nothing in it says what is missing."""
    model, batch = pruned("llama", "share"), prompts(LENGTHS[:1])
    cache = QuantizedCache("fp8", model.config)
    with torch.no_grad():
        model(**batch, past_key_values=cache)
        assert model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits.isfinite().all()
        padded = QuantizedCache("fp8", model.config)
        model(**prompts(), past_key_values=padded)
        with pytest.raises(ValueError, match="this cache cannot be decoded from: its rows have padding"):
            model(input_ids=torch.tensor([[7], [8]]), past_key_values=padded)


def test_layers_that_attend_in_chunks_are_not_followed():
    sizes = {"head_dim": 8, "attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 48}
    model = Llama4ForCausalLM(Llama4TextConfig(**GROUPED | sizes | {"interleave_moe_layer_step": 1})).eval()
    cache = prune(model, TopK(keep=0.5, at=(0,))) and DynamicCache(config=model.config)
    with torch.no_grad():
        model(**prompts(LENGTHS[:1]), past_key_values=cache)
        with pytest.raises(ValueError, match=r"layers that see a window or a chunk count what they hold.*in chunks"):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    with pytest.raises(ValueError, match="snapkv is not possible with Llama4ForCausalLM: all of its layers slide"):
        prune(model, TopK(keep=0.5, at=(0,)), cache=SnapKV(keep=0.5, **SMALL))


@pytest.mark.parametrize("cache", CACHES)
def test_continuous_batching_is_refused(cache):
    model = pruned("llama", "share", cache)
    with pytest.raises(ValueError, match=r"cannot prune the pages of continuous batching: call generate\(\)"):
        model.init_continuous_batching()
    with pytest.raises(ValueError, match=r"cannot prune the pages of continuous batching: call generate\(\)"):
        model.generate_batch([[5, 6, 7]])


def test_a_static_cache_is_refused():
    model = pruned("llama", "share")
    with pytest.raises(ValueError, match="topk cannot fill a StaticCache"):
        model.generate(**prompts(LENGTHS[:1]), max_new_tokens=3, cache_implementation="static", disable_compile=True)
    with pytest.raises(ValueError, match="topk cannot fill a StaticCache"):
        model(**prompts(LENGTHS[:1]), past_key_values=StaticCache(model.config, 64))


def test_a_model_that_is_pruned_no_more_refuses_what_it_cannot_read():
    model, cache = pruned("llama", "share"), DynamicCache()
    with torch.no_grad():
        model(**prompts(LENGTHS[:1]), past_key_values=cache)
        with pytest.raises(ValueError, match="its rows or layers are uneven: go on with the pruned model"):
            unprune(model)(input_ids=torch.tensor([[7]]), past_key_values=cache)
