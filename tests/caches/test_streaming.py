"""Endless generation: the sinks follow the last tokens, and nothing drifts."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from support.decoders import alone, build, difference, feed, make, prompts
from thresher import StreamingLLM, TopK, prune
from thresher.caches.hooks import ours
from thresher.core import compat

FAMILIES = ["llama", "gpt-neox", "phi3", "gemma3"]


def streaming(**options):
    return StreamingLLM(**{"hold": 12, "sinks": 2, "every": 1} | options)


@torch.no_grad()
def last_logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("options", [{}, {"every": 3}, {"dtype": torch.float64}], ids=str)
@pytest.mark.parametrize("family", ["llama", "phi", "gpt-neox", "deepseek-v3", "yarn", "cohere", "cohere2"])
@torch.no_grad()
def test_one_layer_sees_sinks_and_window_as_if_they_stood_next_to_each_other(family, options):
    """With one layer, keys depend on their own token alone, so that the dense model on the shortened text is right."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    own = {"num_hidden_layers": 1, "first_k_dense_replace": 1} if family == "deepseek-v3" else {"num_hidden_layers": 1}
    own |= {"rope_parameters": yarn} if family == "yarn" else {}
    own |= {"layer_types": ["full_attention"]} if family == "cohere2" else {}  # which has no positions then
    plain = build({"yarn": "llama"}.get(family, family), **own).to(options.get("dtype", torch.float32))
    model = build({"yarn": "llama"}.get(family, family), **own).to(options.get("dtype", torch.float32))
    every = options.get("every", 1)
    prune(model, streaming(every=every))
    ids, cache = prompts((60,))["input_ids"], DynamicCache(config=model.config)
    model(input_ids=ids[:, :30], past_key_values=cache)
    for at in range(30, 60):
        held = 12 + (at - 30) % every
        answer = model(input_ids=ids[:, at : at + 1], past_key_values=cache).logits[:, -1]
        shown = torch.cat([ids[:, :2], ids[:, at - held + 2 : at + 1]], 1)
        assert difference([answer], [last_logits(plain, shown)]) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_it_goes_on_beyond_the_trained_range_in_the_same_bytes(family):
    model = prune(build(family, max_position_embeddings=64), streaming())
    batch = prompts((20,))
    sizes = set()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**batch, past_key_values=cache)
        for token in range(80):
            assert model(input_ids=torch.tensor([[5 + token]]), past_key_values=cache).logits.isfinite().all()
            sizes.add(sum(layer.nbytes for layer in ours(cache).values()))
    assert len(sizes) == 1 and cache.get_seq_length() == 100


def test_sinks_are_turned_from_what_they_were_at_first():
    model = prune(build("llama").to(torch.bfloat16), streaming())
    batch, cache = prompts((20,)), DynamicCache(config=model.config)
    with torch.no_grad():
        model(**batch, past_key_values=cache)
        first = [layer.sink_keys.clone() for layer in ours(cache).values()]
        for token in range(60):
            model(input_ids=torch.tensor([[5 + token]]), past_key_values=cache)
    for number, (layer, keys) in enumerate(zip(ours(cache).values(), first, strict=True)):
        assert layer.shift.unique().tolist() == [80 - 12]
        assert torch.equal(layer.sink_keys, keys)
        turned = model.token_pruner.hooks.rotation(number).further(keys, torch.tensor(68))
        assert torch.equal(layer.keys[:, :, :2], turned.to(torch.bfloat16))


@pytest.mark.parametrize("short", [8, 5, 4, 3])
def test_rows_of_different_lengths_move_their_own_sinks(short):
    options = {"sinks": 4, "every": 3} if short < 8 else {}
    batch, steps = prompts((40, short)), [1] * 12
    together = feed(prune(build("llama"), streaming(**options)), batch, [40, *steps])
    for row, length in enumerate((40, short)):
        single = feed(prune(build("llama"), streaming(**options)), alone(batch, row), [length, *steps])
        assert difference([x[row : row + 1] for x in together], single) <= 1e-5


def test_what_cannot_follow_is_refused():
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match=r"has dynamic rotary positions, whose frequencies change.*move_sinks=False"):
        prune(build("llama", rope_parameters=dynamic), streaming())
    prune(build("llama", rope_parameters=dynamic), streaming(move_sinks=False))
    prune(build("llama", rope_parameters=dynamic), StreamingLLM(keep=12, sinks=2))
    with pytest.raises(ValueError, match="the sinks of GPT2LMHeadModel cannot follow: its layers have no rotary"):
        prune(build("gpt2"), streaming(move_sinks=True))


@pytest.mark.parametrize("family", ["cohere2", "exaone4", "llama", "gpt2"])
def test_layers_without_positions_turn_nothing(family):
    """Their source turns keys all the same, in a branch that is not taken where they do not slide."""
    hooks = prune(build(family), make("expectedattention")).token_pruner.hooks
    turned = [number for number in hooks.full if hooks.rotation(number) is not None]
    assert turned == (hooks.full if family == "llama" else [])
    assert all(hooks.turns(number) is (family in ("llama", "gpt2")) for number in hooks.full)


def test_a_rotation_of_another_kind_is_not_known(monkeypatch):
    monkeypatch.setattr(compat, "rotary_pairs", lambda block: "neighbours")
    with pytest.raises(ValueError, match="which turns its queries in a way that is not known"):
        prune(build("llama"), make("expectedattention"))
    with pytest.raises(ValueError, match="or turn them in a way that is not known"):
        prune(build("llama"), streaming())


@pytest.mark.parametrize("before", [TopK(keep=0.5), make("keydiff")], ids=["tokens", "cache"])
@pytest.mark.filterwarnings("ignore:the model was pruned with")
def test_rotations_are_tried_on_a_model_that_is_pruned_already(before):
    model = prune(prune(build("llama").to(torch.bfloat16), before), streaming())
    assert all(model.token_pruner.hooks.rotation(number) is not None for number in range(3))


def test_a_model_that_trains_is_tried_at_rest():
    model = build("gpt-neox", hidden_dropout=0.5, attention_dropout=0.5).train()
    model.gpt_neox.layers[0].eval()
    hooks = prune(model, streaming()).token_pruner.hooks
    assert all(hooks.rotation(number) is not None for number in range(3))
    assert model.training and not model.gpt_neox.layers[0].training and model.gpt_neox.layers[1].training


def test_learned_positions_end():
    model = prune(build("gpt2", n_positions=48), make("streamingllm", "hold"))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has learned 48 positions and cannot place token 49"):
        feed(model, prompts((40,)), [40, *[1] * 9])
