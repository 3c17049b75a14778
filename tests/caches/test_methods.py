"""What each method keeps, by its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from support.decoders import METHODS, SMALL, build, make, prompts
from thresher import H2O, TOVA, ExpectedAttention, KeyDiff, Knorm, KVzip, RandomCache, SnapKV, StreamingLLM, prune
from thresher.caches.hooks import ours
from thresher.caches.values import added_norm

N, K = 40, 14


@pytest.fixture(scope="module")
def shown():
    """Of layer 1 of a dense model: queries before and after rotation, keys, values, attention."""
    model, batch, seen = build("llama", "eager"), prompts((N,)), {}
    block = model.model.layers[1].self_attn

    def look(module, args, kwargs, output):
        x = kwargs["hidden_states"]
        q, k, v = (m(x).view(1, N, -1, 8).transpose(1, 2) for m in (module.q_proj, module.k_proj, module.v_proj))
        turned, key = apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"])
        seen.update(q=q[0], query=turned[0], k=key[0], v=v[0], a=output[1][0], o=module.o_proj.weight)

    block.register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(**batch)
    return seen


@torch.no_grad()
def kept(method, implementation: str = "sdpa", layer: int = 1):
    """(KV, K) positions that stay in a layer."""
    model, cache = prune(build("llama", implementation), method), DynamicCache()
    model(**prompts((N,)), past_key_values=cache)
    return ours(cache)[layer].position[0]


def best(scores: torch.Tensor, sinks: int = 2, recent: int = 4, count: int = K) -> torch.Tensor:
    scores = scores.clone()
    scores[..., :sinks] = scores[..., N - recent :] = torch.inf
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count].sort().values.int()


def pairs(x: torch.Tensor) -> torch.Tensor:
    """The mean over the two query heads of each key head."""
    return x.unflatten(0, (2, 2)).mean(1)


def test_streamingllm_keeps_the_first_and_the_last():
    assert kept(StreamingLLM(keep=K, sinks=3)).tolist() == [[*range(3), *range(N - K + 3, N)]] * 2


def test_keydiff_keeps_what_is_unlike_the_mean(shown):
    mean = F.normalize(shown["k"], dim=-1).mean(1, keepdim=True)
    assert torch.equal(kept(KeyDiff(keep=K, **SMALL)), best(-F.cosine_similarity(shown["k"], mean, dim=-1)))


def test_knorm_keeps_short_keys(shown):
    assert torch.equal(kept(Knorm(keep=K, **SMALL)), best(-shown["k"].norm(dim=-1)))


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_snapkv_pools_what_the_last_queries_see(shown, pool):
    seen = pairs(shown["a"])[:, -6:].mean(1)
    pooled = {"avg": F.avg_pool1d, "max": F.max_pool1d}[pool](seen[None], 3, 1, 1)[0]
    assert torch.equal(kept(SnapKV(keep=K, observe=6, kernel=3, pool=pool, **SMALL)), best(pooled))


def test_tova_keeps_what_the_last_query_sees_in_all_heads(shown):
    assert torch.equal(kept(TOVA(keep=K, **SMALL)), best(shown["a"][:, -1].mean(0)).expand(2, -1))


@pytest.mark.parametrize("relative", [False, True])
def test_h2o_sums_what_all_queries_see(shown, relative):
    sums = pairs(shown["a"]).sum(1) / (torch.arange(N, 0, -1) if relative else 1)
    assert torch.equal(kept(H2O(keep=K, relative=relative, **SMALL)), best(sums))


def test_h2o_adds_every_step():
    model, cache = prune(build("llama", "eager"), H2O(keep=1.0)), DynamicCache()
    plain = build("llama", "eager")
    ids = prompts((N,))["input_ids"]
    with torch.no_grad():
        for part in ids.split((20, 1, 1, 18), 1):
            model(input_ids=part, past_key_values=cache)
        weights = plain(input_ids=ids, output_attentions=True).attentions
    for number, layer in ours(cache).items():
        assert (layer.received[0] - pairs(weights[number][0]).sum(1)).abs().max() < 1e-5


def test_expected_attention_is_that_of_queries_to_come(shown):
    model = build("llama")
    cos, sin = model.model.rotary_emb(shown["q"], torch.arange(N, N + 64)[None])
    turn = torch.zeros(64, 8, 8)
    for t in range(64):
        for i in range(4):
            c, s = cos[0, t, i], sin[0, t, i]
            turn[t, i, i] = turn[t, i + 4, i + 4] = c
            turn[t, i, i + 4], turn[t, i + 4, i] = -s, s
    mean_turn, q = turn.mean(0), shown["q"][:, 2:]
    scores = []
    for head in range(4):
        mu, sigma = q[head].mean(0), torch.cov(q[head].T, correction=0)
        mu, sigma = mean_turn @ mu, mean_turn @ sigma @ mean_turn.T
        k = shown["k"][head // 2]
        scores.append((k @ mu / 8**0.5 + ((k @ sigma) * k).sum(-1) / 16).softmax(-1))
    expected = (pairs(torch.stack(scores)) + 0.01) * shown["v"].norm(dim=-1)
    assert torch.equal(kept(ExpectedAttention(keep=K, horizon=64, epsilon=0.01, **SMALL)), best(expected))


@torch.no_grad()
def test_kvzip_keeps_what_a_repetition_sees(shown):
    """The repetition by hand: the text twice, and of its second half what each head sees of the first, at most."""
    model, ids = build("llama", "eager"), prompts((N,))["input_ids"]
    fed, seen = torch.cat([ids, torch.tensor([[9, 8]]), ids], 1), {}
    block = model.model.layers[1].self_attn

    def look(module, args, kwargs, output):
        x = kwargs["hidden_states"]
        q, k = (m(x).view(1, 2 * N + 2, -1, 8).transpose(1, 2) for m in (module.q_proj, module.k_proj))
        seen["q"], seen["k"] = (x[0] for x in apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"]))

    block.register_forward_hook(look, with_kwargs=True)
    model(input_ids=fed)
    q, k = seen["q"][:, N:], seen["k"].repeat_interleave(2, 0)
    products = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~torch.ones(N + 2, 2 * N + 2).tril(N).bool(), -torch.inf)
    most = products.softmax(-1)[..., :N].amax(1).unflatten(0, (2, 2)).amax(1)
    own = {"heads": "own", "layers": "equal", **SMALL}
    assert torch.equal(kept(KVzip(keep=K, request=(9, 8), **own)), best(most))


def test_random_keeps_others_in_each_head_and_layer_and_the_same_again():
    one, two = kept(RandomCache(keep=K, **SMALL)), kept(RandomCache(keep=K, **SMALL), layer=2)
    assert torch.equal(one, kept(RandomCache(keep=K, **SMALL))) and not torch.equal(one, two)
    assert not torch.equal(one[0], one[1]) and not torch.equal(one, kept(RandomCache(keep=K, seed=1, **SMALL)))


def test_values_weigh(shown):
    seen = pairs(shown["a"])[:, -6:].mean(1)
    options = {"keep": K, "observe": 6, "kernel": 1, **SMALL}
    assert torch.equal(kept(SnapKV(value="vatp", **options)), best(seen * shown["v"].abs().sum(-1)))
    by_head = shown["o"].unflatten(1, (4, 8))
    norms = torch.stack([(shown["v"][h // 2] @ by_head[:, h].T).abs().sum(-1) for h in range(4)])
    by_score = best(seen, count=K // 2)
    forced = torch.zeros(2, N).scatter(1, by_score.long(), torch.inf)
    by_both = ((6 * seen + 1e-4) * pairs(norms)).nan_to_num() + forced
    assert torch.equal(kept(SnapKV(value="critical", **options)), best(by_both))


def test_heads_can_share_a_choice(shown):
    mean = F.normalize(shown["k"], dim=-1).mean(1, keepdim=True)
    shared = best(-F.cosine_similarity(shown["k"], mean, dim=-1).mean(0)).expand(2, -1)
    assert torch.equal(kept(KeyDiff(keep=K, heads="shared", **SMALL)), shared)


@torch.no_grad()
def test_a_pyramid_holds_more_below_and_as_much_on_the_whole():
    model, cache = prune(build("llama"), KeyDiff(keep=20, layers="pyramid", **SMALL)), DynamicCache()
    model(**prompts((N,)), past_key_values=cache)
    held = [layer.held for layer in ours(cache).values()]
    assert held == [35, 18, 6]  # 2k - k/20 and k above the 6 that never leave, less what the last layer takes for them
    model(input_ids=torch.tensor([[7, 8]]), past_key_values=cache)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_first_and_last_tokens_stay(method):
    model, cache, batch = prune(build("llama"), make(method)), DynamicCache(), prompts()
    model(**batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0), past_key_values=cache)
    for layer in ours(cache).values():
        for row, length in enumerate((40, 27)):
            for head in layer.position[row]:
                assert {0, 1, *range(length - 4, length)} <= {*head.tolist()}
                assert head.tolist() == sorted(head.tolist())


@pytest.mark.parametrize("name", ["expectedattention", "snapkv", "kvzip"])
@torch.no_grad()
def test_autocast_rounds_no_scores(name):
    """Of equal queries, keys and values; the norms of what values add, too."""
    method, compared = make(name), []
    model, own, listen = prune(build("llama"), method), method.score, getattr(method, "listen", None)

    def twice(view):
        with torch.autocast("cpu", enabled=False):
            plain = own(view), added_norm(view)
        compared.append(((own(view), added_norm(view)), plain))
        return plain[0]

    def heard(layer, *shown):
        before = layer.received
        listen(layer, *shown)
        found, layer.received = layer.received, before
        with torch.autocast("cpu", enabled=False):
            listen(layer, *shown)
        compared.append(((found,), (layer.received,)))

    method.score = twice
    if listen is not None:
        method.listen = heard
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(**prompts((N,)), max_new_tokens=2, do_sample=False)
    assert len(compared) >= 3
    assert all(torch.equal(a, b) for pair in compared for a, b in zip(*pair, strict=True))
