"""Graphs of one length: widths follow from the length, kept counts from the text, and the answers are the model's."""

from __future__ import annotations

from threading import Thread

import pytest
import torch

from support.families import FAMILIES
from support.methods import METHODS
from support.tiny import tiny_tokenizer
from thresher import LTP, Threshold, ToP, TopK, compiled, dense, prune, unprune
from thresher.core.view import Widths
from thresher.data.embedder import Embedder, Pooling
from thresher.exporting.export import inputs_of, padded_layout
from thresher.exporting.shapes import check_lengths, counts_of, filled, one_shape, widths_by_length, widths_of

LENGTH = 24
LEFT_TO_THE_DATA = {"adapler", "atome", "ltmp", "ltp", "ltp-fused", "threshold", "transkimmer", "trbert"}
OTHERS = {"lazyllm", "silence"}  # for decoders, for sounds
USUAL = {"topk", "top", "evit", "threshold"}


def classifier(method=None, **options):
    """A tiny model whose scores are far apart, so that no rounding decides which token leaves."""
    model = FAMILIES["bert"].build(pad_token_id=0, vocab_size=len(tiny_tokenizer()), **options)
    return model if method is None else prune(model, method)


def texts(model, longest: int = LENGTH) -> list[dict]:
    return [inputs_of(model, tiny_tokenizer(), 1, n) for n in range(1, longest + 1)]


def slow_but(usual: set[str]):
    return [n if n in usual else pytest.param(n, marks=pytest.mark.slow) for n in METHODS if n not in OTHERS]


# --- the property ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", slow_but(USUAL))
def test_a_graph_of_one_length_answers_as_its_model(name):
    model = classifier(METHODS[name][1]())
    with padded_layout(model), torch.no_grad():
        widths, cut = widths_of(model, (LENGTH,), texts(model))
        assert bool(cut) == (name in LEFT_TO_THE_DATA)
        with one_shape(model, widths[LENGTH]):
            graph = torch.export.export(model, args=(), kwargs=texts(model)[-1], strict=False).module()
    worst = 0.0
    for given in texts(model):
        with torch.no_grad():
            found = graph(**filled(given, LENGTH, 0)).logits
            with one_shape(model, widths[LENGTH] if cut else None):
                expected = model(**given).logits
        worst = max(worst, float((found - expected).abs().max()))
    assert worst <= 1e-5


def test_it_holds_no_symbol_and_no_sum_of_the_data():
    model = classifier(TopK(keep=0.5))
    with padded_layout(model), torch.no_grad(), one_shape(model, widths_by_length(model.token_pruner, LENGTH)):
        graph = torch.export.export(model, args=(), kwargs=texts(model)[-1], strict=False).graph
    names = {str(node.target) for node in graph.nodes}
    assert not any("aten.item" in name or "sym_" in name or "_local_scalar" in name for name in names)
    states = [node.meta["val"].shape for node in graph.nodes if "layer_norm" in str(node.target)]
    assert all(isinstance(size, int) for shape in states for size in shape)
    assert {shape[1] for shape in states} == {24, 12, 6, 3}, "as wide as the longest text keeps"


@pytest.mark.parametrize("name", sorted({*METHODS} - LEFT_TO_THE_DATA - OTHERS))
def test_no_text_keeps_more_than_the_width(name):
    model = classifier(METHODS[name][1]())
    widths = widths_by_length(model.token_pruner, LENGTH)
    most = counts_of(model, texts(model))[:, 1:].max(0).values
    assert not widths.capped and all(int(n) <= width for n, width in zip(most, widths.slots, strict=True))
    spare = [width - int(n) for n, width in zip(most, widths.slots, strict=True)]
    assert name in ("ats", "top-holes") or max(spare) <= 1, spare


@pytest.mark.parametrize("options, slots", [({"min_tokens": 20}, (19, 19)), ({"protect": (0, 1, 2, 3, -1)}, (7, 5))])
def test_widths_know_of_what_never_leaves(options, slots):
    model = classifier(TopK(keep=0.3, at=(0, 1), **options))
    assert widths_by_length(model.token_pruner, 22).slots == slots
    most = counts_of(model, texts(model, 22))[:, 1:].max(0).values
    assert most.tolist() == list(slots)


# --- thresholds ------------------------------------------------------------------------------------------------------
def test_of_a_text_that_wants_more_the_best_go_on():
    model = classifier(Threshold(0.0, at=(1,)))
    given = texts(model)[-1]
    with torch.no_grad():
        model(**given)
        site = model.token_pruner.record.sites[0]
        free, wanted = site.score.clone(), int(site.keep.sum())
        assert wanted == LENGTH
        with one_shape(model, Widths((6,), capped=True)):
            model(**given)
    kept = model.token_pruner.record.sites[0].keep[0]
    free[:, 0] = torch.inf  # the class token never leaves
    assert set(kept.nonzero()[:, 0].tolist()) == set(free[0].topk(6).indices.tolist())


def test_of_equals_the_first_go_on():
    """Protected tokens are equals, and more of them than the width: the model keeps what its graph has room for."""
    model = classifier(Threshold(0.0, at=(1,), protect=tuple(range(9))))
    given, widths = texts(model)[-1], Widths((6,), capped=True)
    with padded_layout(model), torch.no_grad(), one_shape(model, widths):
        expected = model(**given).logits
        kept = model.token_pruner.record.sites[0].keep[0]
        graph = torch.export.export(model, args=(), kwargs=given, strict=False).module()
        torch.testing.assert_close(graph(**given).logits, expected, atol=1e-5, rtol=0)
    assert kept.nonzero()[:, 0].tolist() == list(range(6))


def test_a_query_that_is_longer_than_a_site_has_room():
    """Its tokens alone vote, at two sites, and the first one has room for fewer of them."""
    separator, widths = 7, Widths((6, 4), capped=True)
    model = classifier(TopK(keep=0.5, at=(0, 1), protect={"until": [separator]}))
    assert model.token_pruner.votes == "protected"
    for long in (2, 11):
        given = inputs_of(model, tiny_tokenizer(), 1, LENGTH)
        ids = given["input_ids"].clone()
        ids[ids == separator] = separator + 1
        ids[:, long] = separator
        given["input_ids"] = ids
        with padded_layout(model), torch.no_grad(), one_shape(model, widths):
            expected = model(**given).logits
            assert [int(site.keep.sum()) for site in model.token_pruner.record.sites] == [6, 3 if long == 2 else 4]
            graph = torch.export.export(model, args=(), kwargs=given, strict=False)
            torch.testing.assert_close(graph.module()(**given).logits, expected, atol=1e-5, rtol=0)
        names = {str(node.target) for node in graph.graph.nodes}
        assert not any("aten.item" in name or "sym_" in name or "_local_scalar" in name for name in names)


def test_votes_in_a_graph_of_one_length_are_those_of_the_model():
    """All rows are made there, and in the model those of the voters alone."""
    model = classifier(TopK(keep=0.5, at=(0, 1), protect={"until": [7]}))
    given = inputs_of(model, tiny_tokenizer(), 1, LENGTH)
    given["input_ids"][:, 4] = 7
    with padded_layout(model), torch.no_grad():
        expected = model(**given).logits
        kept = [site.keep.clone() for site in model.token_pruner.record.sites]
        with one_shape(model, Widths(tuple(int(one.sum()) for one in kept), capped=True)):
            torch.testing.assert_close(model(**given).logits, expected, atol=1e-5, rtol=0)
        assert all(torch.equal(a.keep, b) for a, b in zip(model.token_pruner.record.sites, kept, strict=True))


def test_a_module_keeps_its_own_mode():
    model = classifier(TopK(keep=0.5)).train()
    model.bert.embeddings.eval()
    with padded_layout(model):
        assert not any(module.training for module in model.modules())
    assert model.training and not model.bert.embeddings.training


def test_other_threads_prune_as_ever_while_a_graph_is_made():
    model = classifier(Threshold(0.0, at=(1,)))
    given, found = texts(model)[-1], []

    @torch.no_grad()
    def ask():
        model(**given)
        found.append(int(model.token_pruner.last_record().sites[0].keep.sum()))

    with one_shape(model, Widths((6,), capped=True)):
        ask()
        (other := Thread(target=ask)).start()
        other.join()
    assert found == [6, LENGTH]


def test_the_texts_that_are_cut_are_counted():
    model = classifier(LTP(init=1.4))
    given = texts(model)
    counts = counts_of(model, given)
    widths, cut = widths_of(model, (12, LENGTH), given)
    for shorter, length in ((0, 12), (12, LENGTH)):
        own = counts[(counts[:, 0] > shorter) & (counts[:, 0] <= length), 1:]
        assert cut[length] == pytest.approx(float((own > torch.tensor(widths[length].slots)).any(1).float().mean()))
    with pytest.raises(ValueError, match="ltp keeps as many tokens as the text wants"):
        widths_of(model, (LENGTH,), None)


# --- compiled --------------------------------------------------------------------------------------------------------
def check(fast, model, lengths=(1, 2, 5, 8, 9, 16)) -> None:
    for n in lengths:
        given = inputs_of(model, tiny_tokenizer(), 1, n)
        with torch.no_grad():
            expected = model(**given)
        for name, x in fast(**given).items():
            torch.testing.assert_close(x, expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["classifier", "dense", "reader", "embedder"])
def test_compiled_code_answers_as_the_model(kind):
    method = None if kind == "dense" else TopK(keep=0.5)
    if kind == "embedder":
        model = Embedder(prune(classifier().bert, method)).eval()
    elif kind == "reader":
        from transformers import BertForQuestionAnswering

        model = prune(BertForQuestionAnswering(classifier(num_labels=2).config).eval(), method)
    else:
        model = classifier(method)
    fast = compiled(model, (8, 16), tokenizer=tiny_tokenizer(), backend="eager")
    check(fast, model)
    assert fast.lengths == [8, 16] and not model.training


def test_what_code_of_one_length_would_answer_wrongly_is_refused():
    with pytest.raises(ValueError, match="is a decoder: of fixed lengths it would answer"):
        compiled(FAMILIES["gpt2"].build(), (8,), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="is being trained, and compiled code has no dropout"):
        compiled(classifier(TopK(keep=0.5)).train(), (8,), tokenizer=tiny_tokenizer())


def test_a_prompt_that_is_read_and_not_pooled_may_be_left_out():
    model = Embedder(classifier().bert, Pooling(include_prompt=False)).eval()
    fast = compiled(model, (8,), tokenizer=tiny_tokenizer(), backend="eager")
    given = {name: x for name, x in inputs_of(model, tiny_tokenizer(), 1, 5).items() if name != "pooling_mask"}
    with torch.no_grad():
        torch.testing.assert_close(*(run(**given)["sentence_embedding"] for run in (fast, model)), atol=1e-5, rtol=0)


def test_nothing_is_compiled_in_service():
    model = classifier(TopK(keep=0.5))
    fast = compiled(model, (8, 16), tokenizer=tiny_tokenizer(), backend="eager")
    threads = torch.get_num_threads()
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            check(fast, model)
            torch.set_num_threads(threads + 1)
            check(fast, model)
            with torch.inference_mode():
                check(fast, model)
    finally:
        torch.set_num_threads(threads)
    batch = inputs_of(model, tiny_tokenizer(), 3, 9)
    with torch.no_grad():
        torch.testing.assert_close(fast(**batch).logits, model(**batch).logits)
        longer = inputs_of(model, tiny_tokenizer(), 1, 17)
        torch.testing.assert_close(fast(**longer).logits, model(**longer).logits)


def test_lengths_are_checked():
    assert check_lengths((), 100) == (32, 64, 100) and check_lengths((64, 8, 8), 64) == (8, 64)
    for wrong in ((0,), (65,), (8.5,)):
        with pytest.raises(ValueError, match="expected numbers of tokens from 1 to 64"):
            check_lengths(wrong, 64)


def test_what_the_code_was_not_made_for_runs_in_the_model():
    model = classifier(TopK(keep=0.5))
    fast, given = compiled(model, (16,), tokenizer=tiny_tokenizer(), backend="eager"), texts(model)[9]
    with torch.no_grad(), dense(model):
        whole = model(**given).logits
        assert torch.equal(fast(**given).logits, whole), "as for a batch"
    with torch.no_grad():
        pruned = model(**given).logits
        none = given | {"token_type_ids": None, "attention_mask": None}
        torch.testing.assert_close(fast(**none).logits, model(input_ids=given["input_ids"]).logits)
        assert len(fast(**given, output_hidden_states=True).hidden_states) == len(model.bert.encoder.layer) + 1
    assert (whole - pruned).abs().max() > 1e-4
    torch.testing.assert_close(fast(**given).logits, pruned, atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", ["weights", "method", "mode"])
def test_stale_code_is_refused(change):
    model = classifier(TopK(keep=0.5))
    fast, given = compiled(model, (16,), tokenizer=tiny_tokenizer(), backend="eager"), texts(model)[9]
    if change == "weights":
        with torch.no_grad():
            model.classifier.weight.mul_(2)
    elif change == "method":
        prune(unprune(model), TopK(keep=0.3))
    else:
        model.train()
    with pytest.raises(ValueError, match="has other weights, another method or another mode than when it was compiled"):
        fast(**given)


def test_a_configuration_that_asks_for_states_is_refused():
    model = classifier(TopK(keep=0.5), output_hidden_states=True)
    with pytest.raises(ValueError, match="asks for hidden states or attentions, which compiled code does not give"):
        compiled(model, (8,), tokenizer=tiny_tokenizer(), backend="eager")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_code_of_inductor_answers_as_the_model():
    model = classifier(ToP(target_flops=0.5))
    model.token_pruner.mask[:, 12:] = False
    check(compiled(model, (8, 16), tokenizer=tiny_tokenizer()), model)
