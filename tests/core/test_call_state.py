"""What belongs to one call stays with it: threads, exceptions, caches, states that are asked for, direct calls."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from transformers import QuantizedCache, Wav2Vec2Config, Wav2Vec2ForSequenceClassification

from support.families import FAMILIES, difference
from thresher import LTP, FirstK, Threshold, TopK, dense, prune
from thresher.core import attachment as machinery
from thresher.core.tokens import LAYOUTS

BERT, LLAMA = FAMILIES["bert"], FAMILIES["llama"]
everywhere = pytest.mark.parametrize("layout", LAYOUTS)


@torch.no_grad()
def logits(model, batch: dict, **more) -> torch.Tensor:
    return model(**batch, **more).logits


# --- threads ----------------------------------------------------------------------------------------------------------
def test_dense_in_one_thread_leaves_the_others_pruned():
    model, batch = prune(BERT.build(), TopK(keep=0.3)), BERT.batch()
    expected, entered, leave = logits(model, batch), threading.Event(), threading.Event()

    def shadow():
        with dense(model):
            entered.set()
            leave.wait(60)

    other = threading.Thread(target=shadow)
    other.start()
    assert entered.wait(60)
    try:
        assert torch.equal(logits(model, batch), expected)
        assert model.token_pruner.report[-1]["tokens_kept"] < 52
    finally:
        leave.set()
        other.join()


def test_a_forward_that_has_begun_is_not_changed_by_dense():
    """The mode is read once, when a call begins."""
    model, batch = prune(BERT.build(), TopK(keep=0.3)), BERT.batch()
    expected, inside = logits(model, batch), dense(model)
    handle = model.bert.encoder.layer[0].register_forward_pre_hook(lambda *_: inside.__enter__() and None)
    try:
        assert torch.equal(logits(model, batch), expected)
    finally:
        handle.remove()
        inside.__exit__(None, None, None)
    assert torch.equal(logits(model, batch), expected)


def test_the_report_is_the_callers_own():
    model = prune(BERT.build(), TopK(keep=0.5))
    logits(model, BERT.batch((24,)))

    def elsewhere():
        with pytest.raises(RuntimeError, match="recorded yet in this thread"):
            _ = model.token_pruner.report
        logits(model, BERT.batch((8, 8)))

    other = threading.Thread(target=elsewhere)
    other.start()
    other.join()
    assert model.token_pruner.report[0]["tokens_in"] == 24


# --- exceptions and re-entrancy ---------------------------------------------------------------------------------------
def test_an_exception_leaves_no_state_and_the_model_can_be_copied():
    model, batch = prune(BERT.build().train(), LTP(target_flops=0.5)), BERT.batch()
    handle = model.bert.encoder.layer[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    handle.remove()
    assert not machinery._THREAD.calls and model.token_pruner.record is None
    twin = copy.deepcopy(model).eval()
    assert torch.equal(logits(twin, batch), logits(model.eval(), batch))


def test_a_training_step_does_not_live_through_the_next_forward():
    model, batch, seen = prune(BERT.build().train(), TopK(keep=0.5)), BERT.batch(), []
    model(**batch)
    handle = model.bert.encoder.layer[0].register_forward_pre_hook(lambda *_: seen.append(model.token_pruner.record))
    model(**batch)
    handle.remove()
    assert seen == [None], "the record of the last step is gone when the next one begins"


def test_a_forward_within_a_forward():
    model, batch, other = prune(BERT.build(), TopK(keep=0.5)), BERT.batch(), BERT.batch((7, 5), seed=3)
    expected, wanted, got = logits(model, batch), logits(model, other), []

    def again(*_):
        if not got:
            got.append(None)
            got[0] = logits(model, other)

    handle = model.bert.encoder.layer[1].register_forward_pre_hook(again)
    assert torch.equal(logits(model, batch), expected)
    handle.remove()
    assert torch.equal(got[0], wanted)


# --- never silently dense ---------------------------------------------------------------------------------------------
@everywhere
def test_forward_called_directly_prunes(layout):
    model, batch = BERT.build().bert, BERT.batch()
    with torch.no_grad():
        plain = model(**batch).last_hidden_state
        prune(model, TopK(keep=0.3), layout=layout)
        called, direct = model(**batch).last_hidden_state, model.forward(**batch).last_hidden_state
    assert torch.equal(called, direct) and (direct - plain).abs().max() > 1e-3


def test_positional_arguments_are_read_by_name():
    model, batch = prune(BERT.build().bert, TopK(keep=0.3)), BERT.batch()
    with torch.no_grad():
        named = model(**batch).last_hidden_state
        assert torch.equal(model(batch["input_ids"], batch["attention_mask"]).last_hidden_state, named)


def test_layers_called_outside_the_forward_raise():
    """A head that calls embeddings and encoder apart would run dense without a word."""
    model, batch = prune(BERT.build().bert, TopK(keep=0.3)), BERT.batch((9,))
    states = model.embeddings(input_ids=batch["input_ids"])
    with pytest.raises(RuntimeError, match="was called outside the forward of BertModel, so nothing would be pruned"):
        model.encoder(states)
    with dense(model), torch.no_grad():
        expected = model(**batch).last_hidden_state
        torch.testing.assert_close(model.encoder(states).last_hidden_state, expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")  # torch says that its tracer is deprecated, in several ways
def test_tracing_is_refused():
    model, batch = prune(BERT.build(return_dict=False), TopK(keep=0.5)), BERT.batch()
    with torch.no_grad():
        model(**batch)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace would freeze how many tokens stay"):
        torch.jit.trace(model, (batch["input_ids"], batch["attention_mask"]))


def test_a_mask_of_samples_becomes_one_of_frames():
    """Wav2Vec2 is given a mask of samples: padding must neither vote nor stay."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    config = Wav2Vec2Config(**sizes, **convolutions, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    model = prune(Wav2Vec2ForSequenceClassification(config).eval(), FirstK(keep=0.5))
    mask = torch.ones(2, 400, dtype=torch.long)
    mask[1, 100:] = 0
    with torch.no_grad():
        model(torch.randn(2, 400), attention_mask=mask)
    frames = model._get_feat_extract_output_lengths(mask.sum(1)).tolist()
    assert model.token_pruner.record.counts[0].n_attention.tolist() == frames


def test_a_mask_of_another_shape_is_refused():
    model = prune(FAMILIES["whisper-encoder"].build(), TopK(keep=0.5))
    with pytest.raises(ValueError, match=r"the attention mask has shape \(1, 60\), but the layers of .* see \(1, 30\)"):
        model.get_encoder()(**FAMILIES["whisper-encoder"].batch((1,)), attention_mask=torch.ones(1, 60))


# --- states and probabilities that are asked for ----------------------------------------------------------------------
@everywhere
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_hidden_states_and_attentions_have_their_shapes(layout, implementation):
    model, batch = BERT.build(attn_implementation=implementation), BERT.batch()
    wants = {"output_hidden_states": True, "output_attentions": implementation == "eager"}
    results = {}
    for name in dict.fromkeys((layout, "mask")):
        with torch.no_grad():
            results[name] = prune(copy.deepcopy(model), TopK(keep=0.5), layout=name)(**batch, **wants)
    found, expected = results[layout], results["mask"]
    real = batch["attention_mask"].bool()
    assert len(found.hidden_states) == 5
    for state, reference in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert state.shape == (3, 24, 32)
        torch.testing.assert_close(state[real], reference[real], atol=1e-5, rtol=0)
    for weights, reference in zip(found.attentions or (), expected.attentions or (), strict=True):
        assert weights.shape == (3, 4, 24, 24)
        torch.testing.assert_close(weights, reference, atol=1e-5, rtol=0)
    with torch.no_grad():
        model = prune(model, TopK(keep=1.0), layout=layout)
        kept = model(**batch, **wants)
        with dense(model):
            plain = model(**batch, **wants)
    for state, reference in zip(kept.hidden_states, plain.hidden_states, strict=True):
        torch.testing.assert_close(state[real], reference[real], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_hidden_states_of_the_dense_shape(family):
    source = FAMILIES[family]
    model, batch = source.build(), source.batch()
    if family == "whisper-encoder":
        model = model.get_encoder()
    with torch.no_grad():
        plain = model(**batch, output_hidden_states=True).hidden_states
        prune(model, FirstK(keep=0.5))
        states = model(**batch, output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [state.shape for state in plain]
    assert torch.equal(states[0], plain[0])


# --- caches -----------------------------------------------------------------------------------------------------------
def test_the_verdict_on_a_cache_is_on_the_cache():
    """A good cache stays good, and a bad one bad, whatever is called in between; of caches that do not know what their
    layers hold."""
    model = prune(LLAMA.build(), Threshold(0.9, at=(0, 1)), layout="padded")
    ragged = LLAMA.batch((24, 24), seed=7)
    token = torch.tensor([[8], [8]])
    with torch.no_grad():
        one = {"input_ids": ragged["input_ids"][:1]}
        good = model(**one, past_key_values=QuantizedCache("fp8", model.config)).past_key_values
        bad = QuantizedCache("fp8", model.config)
        model(input_ids=ragged["input_ids"], past_key_values=bad)
        kept = [count.n_attention.tolist() for count in model.token_pruner.record.counts]
        assert any(len(set(row)) > 1 for row in kept), "the rows keep different counts"
        expected = model(token[:1], past_key_values=copy.deepcopy(good)).logits
        model(**one, use_cache=False)
        with pytest.raises(ValueError, match="cannot be decoded from: its rows have padding or kept different counts"):
            model(token, past_key_values=bad)
        model(input_ids=ragged["input_ids"], use_cache=False)
        assert torch.equal(model(token[:1], past_key_values=copy.deepcopy(good)).logits, expected)


def test_more_than_one_token_onto_a_cache_that_does_not_know_what_it_holds_is_refused():
    model, batch = prune(LLAMA.build(), TopK(keep=0.5), layout="padded"), LLAMA.batch((18,))
    with torch.no_grad():
        cache = QuantizedCache("fp8", model.config)
        model(input_ids=batch["input_ids"], past_key_values=cache)
        with pytest.raises(ValueError, match="a cache of pruned tokens takes one token at a time, got 6"):
            model(batch["input_ids"][:, :6], past_key_values=cache)
        with dense(model):
            whole = model(input_ids=batch["input_ids"], use_cache=True).past_key_values
        assert model(batch["input_ids"][:, :6], past_key_values=whole).logits.shape[1] == 6, "a dense cache takes more"


def test_a_decoder_without_a_mask_looks_back_alone():
    """Scores of one query row, in a causal model that is given no mask."""
    from thresher import ATS

    batch = LLAMA.batch((17, 17))
    del batch["attention_mask"]
    answers = {}
    for layout in LAYOUTS:
        model = prune(LLAMA.build(), ATS(keep=0.6), layout=layout)
        with torch.no_grad():
            answers[layout] = LLAMA.answers(model, batch)
    assert max(difference(answers[layout], answers["mask"]) for layout in LAYOUTS) <= 1e-5


@everywhere
def test_what_was_given_is_not_written_into(layout):
    model, batch = prune(LLAMA.build(), TopK(keep=0.4, at=(0, 1, 2)), layout=layout), LLAMA.batch((20, 12))
    given = LLAMA.build().get_input_embeddings()(batch.pop("input_ids")).detach()
    kept = given.clone()
    with torch.no_grad():
        model(inputs_embeds=given, **batch, use_cache=False)
    assert torch.equal(given, kept)


# --- a fresh process --------------------------------------------------------------------------------------------------
def test_a_pickled_model_prunes_in_a_fresh_process(tmp_path):
    model, batch = prune(BERT.build(), LTP(init=1.6)), BERT.batch()
    file = tmp_path / "model.pickle"
    file.write_bytes(pickle.dumps((model, batch, logits(model, batch))))
    code = (
        "import pickle, sys, torch\n"
        "model, batch, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
        "with torch.no_grad():\n"
        "    found = model(**batch).logits\n"
        "assert torch.equal(found, expected), 'another answer'\n"
        "assert model.token_pruner.report[-1]['tokens_kept'] < 52\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
