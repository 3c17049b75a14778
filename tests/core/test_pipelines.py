"""Task heads and transformers' pipelines see the shapes that they always saw.

transformers 5 has no pipeline for question answering; there the head is called.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, pipeline

from support.families import FAMILIES
from thresher import LTP, TopK, prune, unprune
from thresher.core.tokens import LAYOUTS

WORDS = [
    "the",
    "a",
    "good",
    "film",
    "plot",
    "was",
    "is",
    "not",
    "very",
    "who",
    "made",
    "it",
    "long",
    "and",
    "dull",
    "in",
]
TEXTS = ["the film was very good", "it is not a good plot , Ann made it long and dull in Paris", "dull"]
METHODS = {"topk": lambda: TopK(keep=0.5), "ltp": lambda: LTP(init=3.2, min_keep=1)}


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **special)


def bert(head: str, **options):
    return dataclasses.replace(FAMILIES["bert"], model="Bert" + head).build(**options)


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]()


def both(task: str, model, tokenizer, method, layout, *inputs, **options):
    """What a pipeline answers without and with pruning, in batches of two."""
    dense = pipeline(task, model=model, tokenizer=tokenizer, batch_size=2)(*inputs, **options)
    run = pipeline(task, model=prune(model, method, layout=layout), tokenizer=tokenizer, batch_size=2)
    pruned = run(*inputs, **options)
    assert model.token_pruner.report[-1]["tokens_kept"] < model.token_pruner.report[0]["tokens_in"]
    return dense, pruned


def test_text_classification(tokenizer, method, layout):
    dense, pruned = both(
        "text-classification", bert("ForSequenceClassification"), tokenizer, method, layout, TEXTS, top_k=None
    )
    assert [{x["label"] for x in row} for row in pruned] == [{x["label"] for x in row} for row in dense]
    assert [sum(x["score"] for x in row) for row in pruned] == pytest.approx([1.0] * 3)
    assert pruned != dense


def test_token_classification(tokenizer, method, layout):
    dense, pruned = both("token-classification", bert("ForTokenClassification"), tokenizer, method, layout, TEXTS)
    assert [[x["word"] for x in row] for row in pruned] == [[x["word"] for x in row] for row in dense]
    assert [len(row) for row in pruned] == [5, 15, 1]
    assert pruned != dense


def test_question_answering(tokenizer, method, layout):
    asked = [{"question": "who made it", "context": text} for text in TEXTS[:2]]
    model = bert("ForQuestionAnswering", num_labels=2)
    encoded = tokenizer(
        [a["question"] for a in asked], [a["context"] for a in asked], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        dense = model(**encoded)
        pruned = prune(model, method, layout=layout)(**encoded)
    assert (
        pruned.start_logits.shape == pruned.end_logits.shape == dense.start_logits.shape == encoded["input_ids"].shape
    )
    assert model.token_pruner.report[-1]["tokens_kept"] < model.token_pruner.report[0]["tokens_in"]


def test_feature_extraction(tokenizer, method, layout):
    dense, pruned = both("feature-extraction", bert("Model"), tokenizer, method, layout, TEXTS, return_tensors=True)
    assert [x.shape for x in pruned] == [x.shape for x in dense] and {x.shape[-1] for x in pruned} == {32}
    assert all(x.isfinite().all() for x in pruned)


def test_image_classification_shapes(method, layout):
    model, batch = FAMILIES["vit"].build(), FAMILIES["vit"].batch()
    with torch.no_grad():
        dense = model(**batch, output_hidden_states=False).logits
        assert prune(model, method, layout=layout)(**batch).logits.shape == dense.shape


def test_tuples_in_place_of_dictionaries(layout):
    model, batch = FAMILIES["bert"].build(), FAMILIES["bert"].batch()
    prune(model, TopK(keep=0.5), layout=layout)
    with torch.no_grad():
        (logits,) = model(**batch, return_dict=False)
        assert torch.equal(logits, model(**batch).logits)


def test_positional_inputs(layout):
    model, batch = prune(FAMILIES["bert"].build(), TopK(keep=0.5), layout=layout), FAMILIES["bert"].batch()
    with torch.no_grad():
        assert torch.equal(model(batch["input_ids"], batch["attention_mask"]).logits, model(**batch).logits)


def test_multiple_choice_flattens_its_inputs(layout):
    model, batch = bert("ForMultipleChoice"), FAMILIES["bert"].batch((9, 7, 8, 5))
    batch = {k: v.view(2, 2, -1) for k, v in batch.items()}
    reference = prune(model, TopK(keep=0.5), layout="mask")
    with torch.no_grad():
        expected = reference(**batch).logits
        found = prune(unprune(model), TopK(keep=0.5), layout=layout)(**batch).logits
    assert found.shape == (2, 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_generation_with_everything_kept_is_the_dense_models(family):
    model = FAMILIES[family].build()
    prompt, options = FAMILIES[family].batch((12,)), {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**prompt, **options)
    assert torch.equal(prune(model, TopK(keep=1.0)).generate(**prompt, **options), expected)
    unprune(model)
    shorter = prune(model, TopK(keep=0.5)).generate(**prompt, **options)
    assert shorter.shape == expected.shape
    assert model.token_pruner.report[-1]["tokens_kept"] < 12


def test_a_padded_batch_decodes_on_a_pruned_cache_as_its_rows_do():
    model, options = prune(FAMILIES["llama"].build(), TopK(keep=0.5)), {"max_new_tokens": 5, "do_sample": False}
    batch = FAMILIES["llama"].batch((12, 8), side="left")
    together = model.generate(**batch, **options)
    short = model.generate(input_ids=batch["input_ids"][1:, 4:], **options)
    assert torch.equal(together[1, 12:], short[0, 8:])
