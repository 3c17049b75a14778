"""A token classifier shortens a prompt: exact numbers of tokens, whole words, numbers, names; what it learns from."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForTokenClassification, DataCollatorForTokenClassification

from prompts.test_compress import tokenizer as decoders_tokenizer
from support.decoders import build
from support.tiny import VOCABULARY, tiny_model, tiny_tokenizer
from thresher import GemFilter, KeyDiff, LLMLingua2, TopK, compress, likelihood_labels, prune, unprune
from thresher.prompts.llmlingua2 import windows_of
from thresher.prompts.words import read_text

TEXT = (
    "The farmer Anna Berg threshed 48213 grains . and the wheat and the chaff , and the script . Then the farmer sang !"
)
LONG = " ".join(f"{word}{'s' * (i % 3)} and" for i, word in enumerate(("farmer", "wheat", "chaff", "grain") * 60))


def classifier(seed: int = 0, **options) -> BertForTokenClassification:
    torch.manual_seed(seed)
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(**small, vocab_size=len(VOCABULARY), max_position_embeddings=128, **options)
    model = BertForTokenClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return model


def shortened(text: str, method: LLMLingua2, model=None):
    return compress(model or classifier(), text, method, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize("keep", [0.1, 0.33, 0.5, 0.8, 7, 40])
@pytest.mark.parametrize("text", [TEXT, LONG, "the wheat and the grain"])
def test_the_number_of_tokens_is_met(text, keep):
    got, read = shortened(text, LLMLingua2(keep, numbers=False, names=False)), tiny_tokenizer()
    most = min(got.tokens_in, keep if isinstance(keep, int) else -(-got.tokens_in * keep // 1))
    sizes = torch.tensor(read_text(text, read, True, False).units).bincount()
    left = sizes.tolist()
    for unit in {read_text(text, read, True, False).units[i] for i in got.kept}:
        left[unit] = 10**6
    assert got.tokens_out <= most and got.tokens_out + min(left) > most, "no word that left would fit"
    assert got.tokens_in == len(read(text, add_special_tokens=False)["input_ids"])
    words = iter(text.split())
    assert all(word in words for word in got.text.split()), "whole words, in their order"


@pytest.mark.parametrize("window", [16, 40, 512])
def test_scores_are_those_of_each_window_alone(window):
    model, read = classifier(), tiny_tokenizer()
    prompt, room = read_text(LONG, read, True, False), min(window, 128) - 2
    scores, at = LLMLingua2(window=window).scores(model, prompt, read), 0
    while at < len(prompt.ids):
        end = min(at + room, len(prompt.ids))
        while end < len(prompt.ids) and prompt.units[end] == prompt.units[end - 1]:
            end -= 1
        ids = torch.tensor([[read.cls_token_id, *prompt.ids[at:end], read.sep_token_id]])
        with torch.no_grad():
            alone = model(input_ids=ids).logits[0, 1:-1].softmax(-1)[:, 1]
        torch.testing.assert_close(scores[at:end], alone, atol=1e-5, rtol=0)
        at = end
    assert at == len(scores)


def test_the_side_of_the_padding_does_not_matter():
    left = tiny_tokenizer()
    left.padding_side = "left"
    model, prompt, method = classifier(), read_text(LONG, left, True, False), LLMLingua2(window=40)
    assert torch.equal(*(method.scores(model, prompt, read) for read in (left, tiny_tokenizer())))
    assert left.padding_side == "left"


def test_a_word_scores_the_mean_of_its_tokens():
    model, read = classifier(), tiny_tokenizer()
    prompt, method = read_text(LONG, read, True, False), LLMLingua2(60, numbers=False, names=False)
    scores, of = method.scores(model, prompt, read), torch.tensor(prompt.units)
    means = torch.stack([scores[of == unit].mean() for unit in range(len(prompt.parts))])
    stays = {prompt.units[i] for i in shortened(LONG, method, model).kept}
    ranked = means.argsort(descending=True).tolist()
    total, wanted = 0, set()
    for unit in ranked:
        size = int((of == unit).sum())
        if total + size <= 60:
            wanted.add(unit)
            total += size
    assert stays == wanted


def test_numbers_names_and_what_is_forced_stay():
    for seed in range(3):
        got = shortened(TEXT, LLMLingua2(0.3), classifier(seed))
        assert {"Anna", "Berg", "48213"} <= {*got.text.split()} and got.tokens_out <= -(-got.tokens_in * 0.3 // 1)
    assert LLMLingua2().forced(["The", " farmer", " Anna", " sang.", " Then", " B2", "\nThey"]) == [
        *(False, False, True, False, False, True, False)
    ]
    assert LLMLingua2(names=False, numbers=False, force=("\n", "?")).forced(["a", "\nb", " c?", " 1"]) == [
        *(False, True, True, False)
    ]


def test_what_is_forced_may_be_too_much():
    with pytest.warns(UserWarning, match=r"numbers, names and what is forced take \d+ tokens and 4 are to stay"):
        got = shortened("1 2 3 4 5 6 7 and 8", LLMLingua2(4))
    assert got.tokens_out == 4 and "and" not in got.text


@pytest.mark.parametrize("layout", ["mask", "padded", "packed"])
def test_a_pruned_classifier_chooses_as_it_is_pruned(layout):
    model, read, prompt = classifier(), tiny_tokenizer(), read_text(LONG, tiny_tokenizer(), True, False)
    dense = LLMLingua2().scores(model, prompt, read)
    whole = LLMLingua2().scores(prune(model, TopK(keep=1.0), layout=layout), prompt, read)
    torch.testing.assert_close(whole, dense, atol=1e-5, rtol=0)
    unprune(model)
    half = LLMLingua2().scores(prune(model, TopK(keep=0.5), layout=layout), prompt, read)
    unprune(model)
    masked = LLMLingua2().scores(prune(model, TopK(keep=0.5), layout="mask"), prompt, read)
    torch.testing.assert_close(half, masked, atol=1e-5, rtol=0)
    assert (half - dense).abs().max() > 1e-3


def test_windows_end_between_words():
    assert windows_of([0, 0, 1, 1, 1, 2], 4) == [(0, 2), (2, 6)]
    assert windows_of([0] * 9, 4) == [(0, 4), (4, 8), (8, 9)] and windows_of([0, 1], 4) == [(0, 2)]


# --- what it learns from ----------------------------------------------------------------------------------------------
def test_labels_are_the_words_that_a_decoder_finds_least_likely():
    teacher, told, read = build("llama"), decoders_tokenizer(), tiny_tokenizer()
    text = "one code is 48213 . the farmer keeps wheat and grain"
    (row,) = likelihood_labels([text], read, teacher, told, keep=0.5)
    ids = torch.tensor([[told.bos_token_id, *told(text, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        loss = -teacher(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    words, worth, ends = text.split(" "), [], 0
    spans = told(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for word in words:
        start, ends = ends, ends + len(word) + (ends > 0)
        own = sum(loss[i].item() for i, (_, end) in enumerate(spans) if start < end <= ends)
        worth.append((own / len(read(word, add_special_tokens=False)["input_ids"]), word))
    labels, sizes, room, wanted = row["labels"], {}, int(0.5 * (len(row["labels"]) - 2)), set()
    for _, word in sorted(worth, reverse=True):
        sizes[word] = len(read(word, add_special_tokens=False)["input_ids"])
        if sizes[word] <= room:
            room -= sizes[word]
            wanted.add(word)
    assert labels[0] == labels[-1] == -100 and row["input_ids"] == read(text)["input_ids"]
    flat = [int(word in wanted) for word in words for _ in range(sizes[word])]
    assert labels[1:-1] == flat and 0 < sum(flat) < len(flat)


def test_long_texts_make_several_rows_and_a_classifier_learns_from_them():
    read, teacher = tiny_tokenizer(), build("llama")
    rows = likelihood_labels([LONG, TEXT, ""], read, teacher, decoders_tokenizer(), window=48)
    assert len(rows) > 3 and all(len(row["input_ids"]) == len(row["labels"]) <= 48 for row in rows)
    joined = [i for row in rows for i in row["input_ids"][1:-1]]
    assert joined == [i for text in (LONG, TEXT) for i in read(text, add_special_tokens=False)["input_ids"]]
    model, batch = classifier(), DataCollatorForTokenClassification(read, return_tensors="pt")(rows)
    adam, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(40):
        loss = model(**batch).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_pruned_teacher_foresees_unpruned():
    read, told = tiny_tokenizer(), decoders_tokenizer()
    wanted = likelihood_labels([TEXT], read, build("llama"), told)
    pruned = prune(build("llama"), TopK(keep=0.5, at=(0,)))
    cached = prune(build("llama"), KeyDiff(keep=64))
    assert likelihood_labels([TEXT], read, pruned, told) == likelihood_labels([TEXT], read, cached, told) == wanted


def test_what_is_refused():
    for given, what in (
        ({"keep": 1.5}, "keep=1.5"),
        ({"window": 4}, "window=4: expected 8"),
        ({"force": "?"}, r"force='\?': expected strings"),
        ({"force": ("",)}, "expected strings"),
    ):
        with pytest.raises(ValueError, match=what):
            LLMLingua2(**given)
    for model in (tiny_model(), build("llama"), classifier(num_labels=3)):
        with pytest.raises(ValueError, match="LLMLingua2 asks a token classifier of two labels"):
            shortened("the wheat and the grain", LLMLingua2(0.5), model)
    with pytest.raises(ValueError, match="GemFilter is not possible with"):
        compress(classifier(), "the wheat", GemFilter(0.5), tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="LLMLingua2 needs tokenizer="):
        compress(classifier(), [9, 8, 7, 6], LLMLingua2(0.5))
    with pytest.raises(ValueError, match="is no decoder, and foresees no words"):
        likelihood_labels(["the wheat"], tiny_tokenizer(), tiny_model(), tiny_tokenizer())
    with pytest.raises(ValueError, match="keep=1: expected a share"):
        likelihood_labels(["the wheat"], tiny_tokenizer(), build("llama"), decoders_tokenizer(), keep=1)
