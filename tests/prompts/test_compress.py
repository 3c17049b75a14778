"""A prompt that is shorter before an engine reads it: what is kept, what is run, and what is refused."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from support.decoders import build, prompts
from support.families import FAMILIES
from support.visual import VISUAL
from thresher import GemFilter, KeyDiff, TopK, compress, prune
from thresher.core.scoring import repeat_heads
from thresher.prompts.gemfilter import chosen, shown
from thresher.prompts.words import cuts_of, read_text

SMALL = {"sinks": 2, "recent": 4}
TEXT = "one code is 48213 . " + "the farmer keeps wheat and grain " * 9 + "\nwhich code ?"


def tokenizer() -> PreTrainedTokenizerFast:
    """Words, and single digits, with the space before them apart, as many tokenizers of decoders do."""
    split = pre_tokenizers.Split(Regex(r"\d| ?[^\s\d]+|\s"), "isolated")
    pieces = sorted({piece for piece, _ in split.pre_tokenize_str(TEXT + "".join(map(str, range(10))))})
    vocabulary = {piece: number for number, piece in enumerate(["<pad>", "<s>", "<unk>", *pieces])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")


def by_hand(model, ids: torch.Tensor, number: int, kernel: int) -> torch.Tensor:
    """(N,) the product of the last query and each key, summed over heads, and its mean over neighbours."""
    caught = {}

    def catch(block, args, kwargs):
        caught["states"], caught["turn"] = kwargs["hidden_states"], kwargs["position_embeddings"]

    block = model.model.layers[number].self_attn
    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    states, (cos, sin) = caught["states"], caught["turn"]

    def heads(map_):
        x = map_(states).unflatten(-1, (-1, 8)).transpose(1, 2)
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    query, key = heads(block.q_proj), heads(block.k_proj)
    raw = (query[:, :, -1:] @ repeat_heads(key, query).transpose(-1, -2)).sum(1)[0, 0]
    half = kernel // 2
    return torch.stack([raw[max(0, i - half) : i + half + 1].mean() for i in range(len(raw))])


@pytest.mark.parametrize("kernel", [1, 5])
def test_scores_are_products_of_the_last_query_with_the_keys(kernel):
    model, ids = build("llama"), prompts((40,))["input_ids"]
    scores = GemFilter(at=1, kernel=kernel).scores(model, ids)
    torch.testing.assert_close(scores, by_hand(model, ids, 1, kernel).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt-neox", "deepseek-v3"])
def test_layers_behind_the_one_that_chooses_are_not_run(family):
    model, ran = build(family), []
    block = {"gpt2": "attn", "gpt-neox": "attention"}.get(family, "self_attn")
    for number, layer in enumerate(next(m for m in model.modules() if type(m).__name__ == "ModuleList")):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
        for name, child in layer.named_children():
            child.register_forward_pre_hook(lambda *_, number=number, name=name: ran.append((number, name)))
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    before = model.config._attn_implementation
    model.lm_head.register_forward_pre_hook(lambda *_: ran.append("head")) if hasattr(model, "lm_head") else None
    got = compress(model, prompts((40,))["input_ids"], GemFilter(keep=12, at=1, **SMALL))
    assert [n for n in ran if isinstance(n, int)] == [0, 1] and "head" not in ran
    assert {name for number, name in (x for x in ran if isinstance(x, tuple)) if number == 1 and "mlp" in name} == set()
    assert any(x == (1, block) for x in ran) and (got.layers_run, got.layers, got.tokens_out) == (2, 3, 12)
    assert model.config._attn_implementation == before
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) - sum(hooks) == int(hasattr(model, "lm_head"))


@pytest.mark.parametrize("keep", [0.2, 0.5, 12, 1.0, 400])
@pytest.mark.parametrize("length", [9, 40, 77])
def test_ids_are_kept_to_an_exact_number(keep, length):
    ids = prompts((length,))["input_ids"][0]
    got = compress(build("llama"), ids, GemFilter(keep, at=1, **SMALL))
    wanted = min(length, max(6, keep if isinstance(keep, int) else -(-length * keep // 1)))
    assert got.tokens_out == len(got.ids) == wanted and got.tokens_in == length and got.text is None
    assert got.kept == sorted(set(got.kept)) and {0, 1, *range(length - 4, length)} <= {*got.kept}
    assert got.ids == ids[got.kept].tolist() and (got.layers_run == 0) == (wanted == length)


def test_ids_come_in_several_forms_and_one_prompt_at_a_time():
    model, ids = build("llama"), prompts((40,))["input_ids"]
    method = GemFilter(0.3, at=1, **SMALL)
    first = compress(model, ids, method)
    assert first.ids == compress(model, ids[0], method).ids == compress(model, ids[0].tolist(), method).ids
    assert compress(model, ids, method, keep=7).tokens_out == 7
    with pytest.raises(ValueError, match=r"the prompt has shape \(2, 40\): expected the ids of one prompt"):
        compress(model, ids.expand(2, -1), method)


@pytest.mark.parametrize("keep", [0.2, 0.4, 0.8])
def test_a_text_keeps_whole_words_as_they_stood(keep):
    read, model = tokenizer(), build("llama")
    got = compress(model, TEXT, GemFilter(keep, at=1, **SMALL), tokenizer=read)
    assert got.tokens_out <= -(-got.tokens_in * keep // 1) and got.tokens_out > got.tokens_in * keep - 5
    words, left = iter(TEXT.split()), got.text.split()
    assert all(word in words for word in left), "words of the text, in their order"
    assert "48213" in left or not any(digit in got.text for digit in "48213"), "no part of a number"
    assert got.text.endswith("which code ?") and got.text.startswith("one")
    assert read(got.text)["input_ids"] == got.ids


def test_a_text_that_stays_is_the_text():
    got = compress(build("llama"), TEXT, keep=1.0, tokenizer=tokenizer())
    assert got.text == TEXT and got.tokens_in == got.tokens_out and got.layers_run == 0


def test_tokens_may_leave_alone_where_that_is_asked_for():
    got = compress(build("llama"), TEXT, GemFilter(0.4, at=1, words=False, **SMALL), tokenizer=tokenizer())
    assert got.tokens_out == -(-got.tokens_in * 0.4 // 1) and got.text == "".join(
        read_text(TEXT, tokenizer(), False).parts[i] for i in got.kept
    )


def test_special_tokens_never_leave():
    read = tokenizer()
    ids = read(TEXT)["input_ids"]
    ids[20] = ids[30] = read.bos_token_id
    got = compress(build("llama"), ids, GemFilter(8, at=1, **SMALL), tokenizer=read)
    assert {20, 30} <= {*got.kept} and got.tokens_out == 8


def test_units_fill_a_budget_best_first():
    scores, units = torch.tensor([0.0, 5.0, 1.0, 4.0, 3.0, 2.0]), [0, 1, 1, 1, 2, 3]
    stays = torch.tensor([True, False, False, False, False, False])
    assert chosen(scores, stays, units, 4) == [0, 1, 2, 3]
    assert chosen(scores, stays, units, 3) == [0, 4, 5]  # the best one does not fit
    assert chosen(scores, stays, units, 1) == chosen(scores, stays, units, 0) == [0]


def test_a_word_without_end_is_cut_between_its_tokens():
    assert cuts_of([1, 2, 4, 7], [0, 2], 7) == [0, 2, 7]
    long = list(range(1, 41))
    assert cuts_of(long, [0], 40) == [0, *long] and cuts_of([3, 5], [], 6) == [0, 3, 5, 6]


def test_a_pruned_model_chooses_unpruned():
    ids, method = prompts((40,))["input_ids"], GemFilter(0.3, at=2, **SMALL)
    expected = compress(build("llama"), ids, method).ids
    for model in (
        prune(build("llama"), TopK(keep=0.3, at=(0, 1))),
        prune(build("llama"), KeyDiff(keep=8, **SMALL)),
        prune(build("llama"), TopK(keep=0.3, at=(0,)), cache=KeyDiff(keep=8, **SMALL)),
    ):
        assert compress(model, ids, method).ids == expected


def test_the_layer_by_default_sees_all_of_a_prompt():
    options = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "num_hidden_layers": 4}
    model = build("gemma3", **options)
    assert compress(model, prompts((40,))["input_ids"], GemFilter(0.4, **SMALL)).layers_run == 4
    assert compress(build("llama"), prompts((40,))["input_ids"], GemFilter(0.4, **SMALL)).layers_run == 2


def test_threads_do_not_meet():
    """One shortens a prompt while another one does, and a third one runs the model."""
    model, method, given = build("llama"), GemFilter(keep=0.3, at=1, sinks=1, recent=2), prompts((60, 60))["input_ids"]
    expected = [compress(model, row.tolist(), method).kept for row in given]
    with torch.no_grad():
        answer = model(input_ids=given[:, :20], use_cache=False).logits

    def shorten(row: int) -> list:
        return [compress(model, given[row].tolist(), method).kept == expected[row] for _ in range(8)]

    @torch.no_grad()
    def ask(_: int) -> list:
        found = [model(input_ids=given[:, :20], use_cache=False).logits for _ in range(8)]
        return [bool((one - answer).abs().max() <= 1e-5) for one in found]

    before, _ = sys.getswitchinterval(), sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(*one) for one in ((shorten, 0), (shorten, 1), (ask, 0))]
            assert all(all(job.result()) for job in jobs)
    finally:
        sys.setswitchinterval(before)


def test_what_is_refused():
    model, ids = build("llama"), prompts((40,))["input_ids"]
    for given, what in (
        ({"keep": 0}, "keep=0"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"keep": True}, "keep=True"),
        ({"keep": 20}, "keep=20 is below the 4 first and 32 last tokens"),
        ({"kernel": 4}, "kernel=4"),
        ({"recent": 0}, "recent=0"),
    ):
        with pytest.raises(ValueError, match=what):
            GemFilter(**given)
    with pytest.raises(ValueError, match=r"at=3: .* has layers 0 to 2"):
        compress(model, ids, GemFilter(0.3, at=3, **SMALL))
    with pytest.raises(ValueError, match="the prompt is empty"):
        compress(model, [])
    with pytest.raises(ValueError, match="the prompt is empty"):
        compress(model, "", tokenizer=tokenizer())
    with pytest.raises(ValueError, match="a text needs tokenizer=, the model's fast one"):
        compress(model, "wheat")
    with pytest.raises(ValueError, match=r"the prompt has 300 tokens, and .* takes 256"):
        compress(model, prompts((300,))["input_ids"])
    reader = VISUAL["llava"].build()
    with pytest.raises(ValueError, match=r"holds placeholders of pictures or sounds \(id 100\), which cannot be read"):
        compress(reader, VISUAL["llava"].batch(reader, (1,))["input_ids"])
    assert compress(reader, ids, keep=0.95).tokens_out == 38  # text alone
    with pytest.raises(ValueError, match="GemFilter is not possible with BertForSequenceClassification"):
        compress(FAMILIES["bert"].build(), [5] * 60)


def test_a_forward_that_shows_nothing_is_an_error():
    with pytest.raises(RuntimeError, match="layer 7 of LlamaForCausalLM delivered no attention"):
        shown(build("llama"), prompts((9,))["input_ids"], 7)
