"""What leaves a cache is as if hidden; keeping everything is the dense model; a row answers in a batch as alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import DynamicCache

from support.decoders import (
    BUDGETS,
    DECODERS,
    EAGER_ONLY,
    LENGTHS,
    METHODS,
    WAYS,
    alone,
    build,
    difference,
    feed,
    make,
    prompts,
    run,
)
from thresher import StreamingLLM, dense, prune, unprune

TOLERANCE = 1e-5
REFUSED = {(method, "deepseek-v3") for method in ("knorm", "expectedattention", "triattention", "ltp-cache")}
REFUSED |= {("triattention", "gpt2")}
SLIDING = ("gemma2", "gemma3")  # one of three layers slides


def cases(families, methods, budgets=("hold",), implementations=("sdpa", "eager")):
    """(family, implementation, method, budget) where each can be."""
    return [
        (family, implementation, method, budget)
        for family in families
        for implementation in implementations
        if not (implementation == "sdpa" and family in EAGER_ONLY)
        for method in methods
        if (method, family) not in REFUSED
        for budget in budgets
    ]


def pruned(case, layout: str = "evict"):
    family, implementation, method, budget = case
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*QK-norm.*", UserWarning)
        return prune(build(family, implementation), make(method, budget), layout=layout)


def hides_as_it_evicts(case, batch: dict, way: str) -> None:
    evicted, hidden = (run(pruned(case, layout), batch, way) for layout in ("evict", "mask"))
    assert difference(evicted, hidden) <= TOLERANCE


def ways_of(batch: dict, method: str = "") -> list[str]:
    """Drafts are for one text, and KVzip refuses a prompt that comes with one."""
    return [way for way in WAYS if way != "lookup" or (len(batch["input_ids"]) == 1 and method != "kvzip")]


QUICK = [
    *cases(["llama"], METHODS, implementations=["sdpa"]),
    *cases(["qwen3"], ["snapkv"], BUDGETS, ["eager"]),
    *cases(["gpt2", "deepseek-v3"], ["h2o", "streamingllm"], implementations=["sdpa"]),
]


@pytest.mark.parametrize("case", QUICK, ids="-".join)
def test_what_is_evicted_is_as_if_hidden(case):
    for batch, way in ((prompts(), "turn"), (prompts(LENGTHS[:1]), "lookup")):
        if way in ways_of(batch, case[2]):
            hides_as_it_evicts(case, batch, way)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", [*cases(DECODERS, METHODS), *cases(["llama"], METHODS, BUDGETS)], ids="-".join)
def test_what_is_evicted_is_as_if_hidden_in_every_family_and_way(case):
    for batch in (prompts(LENGTHS[:1]), prompts()):
        for way in ways_of(batch, case[2]):
            hides_as_it_evicts(case, batch, way)


@pytest.mark.parametrize("method", METHODS)
def test_something_leaves(method):
    plain, model = build("llama"), prune(build("llama"), make(method))
    batch = prompts()
    assert difference(run(model, batch, "step"), run(plain, batch, "step")) > 1e-2
    assert all(row["held"] < row["seen"] for row in model.token_pruner.report)


@torch.no_grad()
def test_eviction_is_a_mask_over_the_keys_of_a_model_that_nobody_touched():
    batch, steps = prompts(LENGTHS[:1]), 6
    answers = feed(prune(build("llama"), StreamingLLM(keep=12, sinks=2)), batch, [40, *[1] * steps])
    plain, cache = build("llama"), DynamicCache()
    logits = [plain(input_ids=batch["input_ids"], past_key_values=cache).logits[:, -1]]
    sees = torch.ones(40 + steps, dtype=torch.bool)
    sees[2:30] = False
    more = torch.randint(5, 97, (steps,), generator=torch.Generator().manual_seed(9))
    for i, token in enumerate(more):
        mask = sees[: 41 + i][None, None, None]
        logits.append(plain(input_ids=token[None, None], attention_mask=mask, past_key_values=cache).logits[:, -1])
    assert difference(answers, logits) <= TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@pytest.mark.parametrize("way", WAYS)
def test_keeping_everything_is_the_dense_model_bit_for_bit(family, way):
    method = make("keydiff", "count", keep=1.0)
    for batch in (prompts(LENGTHS[:1]), prompts()):
        if way in ways_of(batch):
            whole, plain = run(prune(build(family), copy_of(method)), batch, way), run(build(family), batch, way)
            assert all(torch.equal(a, b) for a, b in zip(whole, plain, strict=True))


def copy_of(method):
    return type(method).from_dict(method.to_dict())


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("method", METHODS)
def test_a_row_answers_in_a_batch_as_alone(method, budget):
    batch, parts = prompts(), [20, 20, *[1] * 6]
    together = run_rows(prune(build("llama"), make(method, budget)), batch)
    for row, length in enumerate(LENGTHS):
        parts = [length, *[1] * 8]
        single = feed(prune(build("llama"), make(method, budget)), alone(batch, row), parts)
        assert difference([x[row : row + 1] for x in together], single) <= TOLERANCE


def test_a_row_answers_in_a_batch_as_alone_where_states_have_four_dimensions():
    """Gemma 3n carries several states of each token, in front of the rows."""

    def made():
        return prune(build("gemma3n", num_kv_shared_layers=0), make("snapkv", "hold"))

    batch, steps = prompts(), [1, 1, 9, 1]
    together = feed(made(), batch, [LENGTHS[0], *steps])
    single = feed(made(), alone(batch, 1), [LENGTHS[1], *steps])
    assert difference([x[1:] for x in together], single) <= TOLERANCE


def run_rows(model, batch: dict):
    return feed(model, batch, [40, *[1] * 8])


@pytest.mark.parametrize("method", ["keydiff", "snapkv"])
def test_a_row_with_fewer_tokens_than_the_budget_keeps_all_of_them(method):
    batch = prompts((40, 9))
    together = run_rows(prune(build("llama"), make(method)), batch)
    single = feed(prune(build("llama"), make(method)), alone(batch, 1), [9, *[1] * 8])
    plain = feed(build("llama"), alone(batch, 1), [9, *[1] * 8])
    assert difference(single, plain) == 0.0
    assert difference([x[1:] for x in together], single) <= TOLERANCE


@pytest.mark.parametrize("way", ["beams", "lookup"])
def test_a_second_turn_of_generate_goes_on_from_what_is_held(way):
    model, batch = prune(build("llama"), make("keydiff", "count", keep=20)), prompts(LENGTHS[:1])
    cache = DynamicCache(config=model.config)
    options = {"max_new_tokens": 4, "do_sample": False, "past_key_values": cache, "return_dict_in_generate": True}
    first = model.generate(**batch, **options).sequences
    turn = torch.cat([first, prompts((7,))["input_ids"]], 1)
    second = model.generate(input_ids=turn, attention_mask=torch.ones_like(turn), output_logits=True, **options)
    fed = feed_ids(model, [batch["input_ids"], first[:, 40:43], turn[:, 43:]])
    assert difference([second.logits[0]], [fed]) <= TOLERANCE


@torch.no_grad()
def feed_ids(model, parts):
    """Logits behind the last of ``parts``, of which the second one comes token by token."""
    cache = DynamicCache(config=model.config)
    model(input_ids=parts[0], past_key_values=cache)
    for token in parts[1].unbind(1):
        model(input_ids=token[:, None], past_key_values=cache)
    return model(input_ids=parts[2], past_key_values=cache).logits[:, -1]


def test_drafts_change_nothing_that_is_generated():
    batch = {name: torch.cat([x[:, -20:]] * 2, 1) for name, x in prompts(LENGTHS[:1]).items()}
    for method in ("keydiff", "h2o"):
        options = {"max_new_tokens": 12, "do_sample": False}
        plain = prune(build("llama"), make(method)).generate(**batch, **options)
        drafted = prune(build("llama"), make(method)).generate(**batch, **options, prompt_lookup_num_tokens=3)
        assert torch.equal(plain, drafted)


def test_within_dense_and_after_unprune_the_cache_is_whole():
    batch, model = prompts(LENGTHS[:1]), prune(build("llama"), make("keydiff"))
    plain = run(build("llama"), batch, "step")
    with dense(model):
        assert difference(run(model, batch, "step"), plain) == 0.0
    assert difference(run(model, batch, "step"), plain) > 1e-2
    assert difference(run(unprune(model), batch, "step"), plain) == 0.0
