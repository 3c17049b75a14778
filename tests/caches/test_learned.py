"""Methods that learn from texts: the centres of TriAttention, the thresholds of LTPCache."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from support.decoders import LENGTHS, SMALL, alone, build, difference, prompts, run
from thresher import LTPCache, TriAttention, dense, prune
from thresher.caches import ltp
from thresher.caches.hooks import ours
from thresher.caches.listen import hear
from thresher.caches.ltp import Halves

TEXTS = [prompts((60, 33), seed) for seed in range(4)]
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}


def tri(**options):
    return TriAttention(**{"keep": 14, **SMALL} | options)


def thresholds(keep: float = 0.4, **options):
    return LTPCache(keep=keep, observe=6, **SMALL, **options)


@torch.no_grad()
def filled(model, batch=None):
    cache, batch = DynamicCache(config=model.config), prompts() if batch is None else batch
    places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model(**batch, position_ids=places, past_key_values=cache)
    return cache


# --- TriAttention ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def unturned_queries(model, number: int, batch: dict) -> torch.Tensor:
    """(n, H, d) of one layer's real tokens, as its own map makes them."""
    seen, block = [], model.model.layers[number].self_attn
    with block.q_proj.register_forward_hook(lambda module, args, output: seen.append(output)), dense(model):
        model(**batch)
    return seen[0].unflatten(-1, (-1, block.head_dim))[batch["attention_mask"].bool()]


@pytest.mark.parametrize("options", [{}, {"rope_parameters": YARN}], ids=["plain", "yarn"])
def test_centres_are_means_of_queries_before_they_turn(options):
    model = prune(build("llama", **options), tri())
    assert model.token_pruner.calibrate(TEXTS) == 4 * 93
    for number in range(3):
        queries = torch.cat([unturned_queries(model, number, batch) for batch in TEXTS])
        halves = queries.unflatten(-1, (2, -1)).norm(dim=-2)
        method = model.token_pruner
        if number == 0:  # behind it positions count, which padding shifts here
            assert (method.centre[number] - queries.mean(0)).abs().max() < 1e-5
            assert (method.length[number] - torch.cat([halves, halves], -1).mean(0)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "phi", "cohere"])
@torch.no_grad()
def test_the_score_is_the_mean_over_distances_of_what_a_centre_looks_at(family, monkeypatch):
    model, views = prune(build(family), tri()), []
    own = TriAttention.score
    monkeypatch.setattr(TriAttention, "score", lambda self, view: views.append(view) or own(self, view))
    model.token_pruner.calibrate(TEXTS)
    filled(model, prompts((40,)))
    for number, view in enumerate(views):
        rotation = view.rotation
        key = rotation.back(view.key, view.position).repeat_interleave(4 // view.heads, 1)[0]  # (H, P, d)
        f = len(rotation.frequencies)

        def pair(x, f=f, rotation=rotation):
            x, rest = x[..., : 2 * f], x[..., 2 * f :]
            x = x.unflatten(-1, (f, 2)).unbind(-1) if rotation.neighbours else x.unflatten(-1, (2, f)).unbind(-2)
            return torch.complex(*x), rest

        (centre, other), (k, still) = pair(model.token_pruner.centre[number]), pair(key)
        length = model.token_pruner.length[number][..., : 2 * f]
        length = length[..., ::2] if rotation.neighbours else length[..., :f]
        expected = ((length - centre.abs())[:, None] * k.abs()).sum(-1) + (other[:, None] * still).sum(-1)
        angle = centre.angle()[:, None] - k.angle()
        for power in range(17):
            distance = 39 - torch.arange(40) + 2**power
            turned = distance[:, None] * rotation.frequencies
            expected += (centre.abs()[:, None] * k.abs() * (turned + angle).cos()).sum(-1) / 17
        assert difference([own(model.token_pruner, view)[0]], [expected]) < 2e-4  # cosines of 2^16 radians in fp32


def test_calibration_leaves_no_trace_and_is_saved(tmp_path):
    model, batch = prune(build("llama"), tri(hold=14, keep=None, every=3)), prompts(LENGTHS[:1])
    with pytest.raises(ValueError, match=r"triattention knows no centres of queries yet: model.token_pruner.calibrate"):
        run(model, batch, "step")
    with dense(model):
        plain = run(model, batch, "step")
    model.token_pruner.calibrate(iter(TEXTS))
    with dense(model):
        assert difference(run(model, batch, "step"), plain) == 0.0
    answers = run(model, batch, "step")
    model.save_pretrained(tmp_path)
    again = prune(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert difference(run(again, batch, "step"), answers) == 0.0
    with pytest.raises(ValueError, match=r"calibrate\(\) got no texts"):
        again.token_pruner.calibrate([])
    assert difference(run(again, batch, "step"), answers) == 0.0


def test_padding_changes_no_centre():
    one, other = (prune(build("llama"), tri()) for _ in range(2))
    one.token_pruner.calibrate(TEXTS)
    other.token_pruner.calibrate([alone(batch, row) for batch in TEXTS for row in (0, 1)])
    for name in ("centre", "length"):
        a, b = getattr(one.token_pruner, name), getattr(other.token_pruner, name)
        assert difference([a], [b]) < 1e-5


def test_what_triattention_cannot_serve():
    with pytest.raises(ValueError, match="is not possible with GPT2LMHeadModel, which has no rotary"):
        prune(build("gpt2"), tri())
    with pytest.raises(ValueError, match="TriAttention is not possible with DeepseekV3ForCausalLM, whose cache holds"):
        prune(build("deepseek-v3"), tri())
    model = prune(build("llama"), tri())
    model.token_pruner.calibrate(TEXTS)
    with pytest.raises(ValueError, match="needs the position_ids of a padded batch, as generate gives"):
        model(**prompts())
    model(**prompts(LENGTHS[:1]))


# --- LTPCache --------------------------------------------------------------------------------------------------------
def test_thresholds_keep_the_share_that_was_asked_for():
    model = prune(build("llama"), thresholds())
    told = model.token_pruner.learn(TEXTS)
    assert told["keep"] == pytest.approx(0.4, abs=0.01)
    assert model.token_pruner.threshold.isfinite().all()
    held = seen = 0
    for batch in TEXTS:  # the halves that were learned from, as prompts
        for row, length in enumerate((60, 33)):
            one = alone(batch, row)
            filled(model, {name: x[:, : length // 2] for name, x in one.items()})
            held += sum(line["held"] for line in model.token_pruner.report)
            seen += sum(line["seen"] for line in model.token_pruner.report)
    assert 0.4 - 0.01 <= held / seen <= 0.4 + 0.05  # what fills up the last of a layer's heads


def test_how_much_a_layer_holds_follows_from_the_text():
    model = prune(build("llama"), thresholds())
    model.token_pruner.threshold.fill_(0.05)
    counts = [ours(filled(model, prompts((60,), seed)))[1].counts[0] for seed in range(6)]
    assert len({*counts}) > 2 and min(counts) > 6 and max(counts) < 60


@torch.no_grad()
def test_hard_gates_are_what_leaves_with_heads_of_their_own(monkeypatch):
    """Reading on over the cache is what was learned from, where each head keeps just what lies above its threshold."""
    model, text = prune(build("llama"), thresholds()), prompts((60,))
    method = model.token_pruner
    method.threshold.copy_(torch.tensor([0.0, -0.5, 0.3]))
    gated = hear(method.hooks, text, Halves(method, method.threshold, hard=True)).logits[:, 30:]
    model = prune(build("llama"), thresholds(), layout="mask")
    model.token_pruner.threshold.copy_(method.threshold)

    def above(self, view, scores, kept):
        slots = torch.arange(scores.shape[-1]).expand_as(scores)
        return slots, ~(view.live & (view.protected | (scores >= self.threshold[view.layer])))

    monkeypatch.setattr(LTPCache, "best", above)
    cache = filled(model, {name: x[:, :30] for name, x in text.items()})
    with dense(model):
        answer = model(input_ids=text["input_ids"][:, 30:], past_key_values=cache).logits
    assert difference([answer], [gated]) <= 1e-5


def test_a_layer_that_adds_nothing_gives_its_entries_to_the_others():
    """So that learning comes nearer to the model than the same share of each layer."""
    model = prune(build("llama"), thresholds(0.4))
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    told = model.token_pruner.learn(TEXTS, epochs=6)
    assert 0 < told["kl"] < 0.9 * told["kl_equal"] and told["keep"] == pytest.approx(0.4, abs=0.01)
    filled(model, prompts((30,)))
    first, idle, _ = (row["held"] for row in model.token_pruner.report)
    assert idle == 6 and first > 12  # the first and the last tokens, and more than its share


def test_learning_changes_the_thresholds_alone_and_is_saved(tmp_path):
    model, batch = prune(build("llama"), thresholds()), prompts(LENGTHS[:1])
    before = {name: x.clone() for name, x in model.state_dict().items() if "token_pruner" not in name}
    with pytest.raises(ValueError, match=r"ltp-cache has no thresholds yet: model.token_pruner.learn\("):
        run(model, batch, "step")
    model.train()
    model.token_pruner.learn(TEXTS, epochs=1)
    assert model.training and all(p.grad is None for p in model.parameters())
    model.eval()
    after = model.state_dict()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    model.save_pretrained(tmp_path)
    again = prune(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(again.token_pruner.threshold, model.token_pruner.threshold)
    assert difference(run(again, batch, "step"), run(model, batch, "step")) <= 1e-5


def test_thresholds_are_learned_within_no_grad_as_without():
    one, other = (prune(build("llama"), thresholds()).token_pruner for _ in range(2))
    with torch.no_grad():
        told = one.learn(TEXTS, epochs=1)
    assert told == other.learn(TEXTS, epochs=1) and torch.equal(one.threshold, other.threshold)


def test_what_cannot_be_learned_is_refused():
    with pytest.raises(ValueError, match=r"give keep as a share, as 0\.25"):
        LTPCache(keep=64)
    with pytest.raises(ValueError, match="give keep as a share"):
        LTPCache(hold=64)
    with pytest.raises(ValueError, match="layers='pyramid': thresholds say what each layer holds"):
        LTPCache(keep=0.5, layers="pyramid")
    headless = prune(build("llama").model, thresholds())
    with pytest.raises(ValueError, match=r"compares next words, and LlamaModel has no head that says one: load it"):
        headless.token_pruner.learn(TEXTS)
    model = prune(build("llama"), thresholds())
    with pytest.raises(ValueError, match=r"learn\(\) got no text of more than 13 tokens: nothing can leave"):
        model.token_pruner.learn([prompts((10,))])
    assert math.isnan(model.token_pruner.threshold[0]) and ltp.TEMPERATURE > 0
