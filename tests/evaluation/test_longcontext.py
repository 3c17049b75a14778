"""Questions about long texts: the answers are those of a model that is pruned while it reads and generates."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from support.decoders import build, byte_tokenizer, make
from thresher import SnapKV, dense, prune, unprune
from thresher.data.longcontext import Case, Context
from thresher.evaluation.longcontext import FULL, Judge, fluency, repeat_request, summary

TEXT = "the farmer sows. the pass key is 4711. the farmer reaps wheat and grain."
EXACT = Case("needle", "what is the pass key?", "the pass key is", (" 4711",), depth=0.4)
FREE = replace(EXACT, task="squad", exact=False)
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}<assistant>"
ADAPTIVE = partial(make, "kvzip", heads="adaptive", layers="adaptive")


@pytest.fixture(scope="module")
def model():
    return build("llama", vocab_size=257)


@pytest.fixture(params=["plain", "chat"])
def tokenizer(request):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE if request.param == "chat" else None
    return tokenizer


def as_users_do(model, tokenizer, judge, case, when, method):
    """The log probability of the first token of the right answer, and what ``generate`` says of a pruned model: to the
    whole prompt, or to a question that follows on a text."""
    head, question, tail = judge.parts(TEXT, case)
    gold, ids = tokenizer(case.answers[0])["input_ids"], torch.tensor([head + question + tail])
    how = {"max_new_tokens": len(gold), "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    how |= {"attention_mask": torch.ones_like(ids), "past_key_values": DynamicCache()}
    prune(model, SnapKV(keep=1.0) if method is None else method)
    with torch.no_grad():
        if when == "after":
            model(input_ids=torch.tensor([head]), past_key_values=how["past_key_values"])
        with dense(model) if when == "after" else nullcontext():
            answer = model.generate(ids, **how)
    unprune(model)
    first = answer.logits[0].float().log_softmax(-1)[0, gold[0]]
    return float(first), tokenizer.decode(answer.sequences[0, ids.shape[1] :])


@pytest.mark.parametrize("when", ["after", "before"])
def test_answers_are_those_of_a_pruned_model(model, tokenizer, when):
    one = replace(EXACT, answers=(" ",))  # a single token, so that its log probability is that of the first step
    methods = {name: make(name, "count") for name in ("snapkv", "h2o", "keydiff", "streamingllm")}
    methods |= {"shared": ADAPTIVE()} if when == "after" else {}
    judge = Judge(model, tokenizer, methods, (when,))
    found = {row["method"]: row for row in judge(Context(0, TEXT, (one,)))}
    assert {*found} == {FULL, *methods}
    for name, row in found.items():
        method = (ADAPTIVE() if name == "shared" else make(name, "count")) if name in methods else None
        logprob, said = as_users_do(model, tokenizer, judge, one, when, method)
        assert row["logprob"] == pytest.approx(logprob, abs=1e-4)
        assert row["said"] == said and row["score"] == float(said == " ")
        assert row["held"] == (12 if method else row["tokens"])
        assert row["bytes"] == row["held"] * 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, channels, fp32


@pytest.mark.parametrize("when", ["after", "before"])
def test_greedy_answers_are_those_of_generate(model, tokenizer, when):
    judge = Judge(model, tokenizer, {"snapkv": make("snapkv", "count")}, (when,), longest=5)
    free, exact = ({r["method"]: r for r in judge(Context(0, TEXT, (case,)))} for case in (FREE, EXACT))
    gold = tokenizer(FREE.answers[0])["input_ids"]
    for name, method in ((FULL, None), ("snapkv", make("snapkv", "count"))):
        said = as_users_do(model, tokenizer, judge, FREE, when, method)[1]
        assert len(gold) == judge.longest
        assert free[name]["said"] == (said.strip().splitlines() or [""])[0]
        assert free[name]["logprob"] == pytest.approx(exact[name]["logprob"], abs=1e-4)


def test_several_questions_do_not_disturb_each_other(model, tokenizer):
    methods = {"kvzip": make("kvzip", "count"), "tova": make("tova", "count")}
    judge = Judge(model, tokenizer, methods)
    other = replace(EXACT, question="what does the farmer reap?", lead="he reaps", answers=(" wheat",))
    both, alone = judge(Context(3, TEXT, (other, EXACT))), judge(Context(3, TEXT, (EXACT,)))
    for together, one in zip(both[-len(alone) :], alone, strict=True):
        assert together.pop("logprob") == pytest.approx(one.pop("logprob"), abs=1e-4)
        assert together == one
    assert {row["when"] for row in alone if row["method"] == "kvzip"} == {"after"}
    assert {row["when"] for row in alone if row["method"] == "tova"} == {"after", "before"}


def test_an_answer_with_other_words_before_it_counts_once_it_is_begun(model):
    tokenizer = byte_tokenizer()
    judge = Judge(model, tokenizer, {})

    class Foresees:
        """Foresees the letters that it is told, whatever is fed."""

        device = model.device

        def __init__(self, text):
            self.ids = torch.tensor(tokenizer(text)["input_ids"])

        def __call__(self, input_ids, past_key_values, logits_to_keep):
            return SimpleNamespace(logits=torch.nn.functional.one_hot(self.ids, 257)[None].float())

    def scores(text):
        cache = DynamicCache(config=model.config)
        prune(model, SnapKV(keep=1.0))
        with torch.no_grad():
            model(input_ids=judge.ids([5, 6]), past_key_values=cache)
        unprune(model)
        (row,) = replace(judge, model=Foresees(text)).said(cache, [7], None, EXACT)
        return row["score"], row["score_begun"]

    assert [scores(text) for text in (" 4711", "a4711", " 4712", "a471.")] == [(1, 1), (0, 1), (0, 0), (0, 0)]
    assert judge.blank(torch.tensor(tokenizer("  4 ")["input_ids"])) == 2
    assert judge.blank(torch.tensor(tokenizer("  ")["input_ids"])) == 1


class Speaker(torch.nn.Module):
    """Says what it is given, row by row, a token a call."""

    def __init__(self, *rows):
        super().__init__()
        self.rows, self.calls = rows, 0

    def forward(self, input_ids, past_key_values, logits_to_keep):
        says = torch.tensor([row[self.calls] for row in self.rows])
        self.calls += 1
        return SimpleNamespace(logits=torch.nn.functional.one_hot(says, 257)[:, None].float())


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("said", "wanted"),
    [("42#zzzz", "42"), ("42\nzzzz", "42"), ("\n42\nzzz", "42"), ("#zzzzzz", ""), ("\n\nab#zz", "ab")],
)
def test_an_answer_ends_where_it_ends_alone(said, wanted, begun):
    tokenizer, end = byte_tokenizer(), byte_tokenizer().eos_token_id
    rows = [
        [end if letter == "#" else tokenizer(letter)["input_ids"][0] for letter in text] for text in (said, "a b cde")
    ]
    for batch in (rows[:1], rows):
        asked = torch.tensor([[row[0]] if begun else [5, 6] for row in batch])
        judge = Judge(Speaker(*(row[begun:] for row in batch)), tokenizer, {}, longest=7)
        assert judge.generated(None, asked, begun) == [wanted, "a b cde"][: len(batch)]


def test_a_decoder_whose_layers_slide_answers_in_a_batch_as_alone():
    model, tokenizer = build("gemma3", vocab_size=257), byte_tokenizer()
    methods = {name: make(name, "count") for name in ("snapkv", "keydiff")}
    together = {(r["method"], r["when"]): r for r in Judge(model, tokenizer, methods)(Context(0, TEXT, (FREE,)))}
    assert len(together) == 6
    for name, method in methods.items():
        for row in Judge(model, tokenizer, {name: method})(Context(0, TEXT, (FREE,))):
            other = together[row["method"], row["when"]]
            assert other.pop("logprob", row["logprob"]) == pytest.approx(row.pop("logprob"), abs=1e-4)
            assert other == row


def test_a_question_is_cut_from_its_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    judge = Judge(build("llama", vocab_size=257), tokenizer, {})
    parts = [tokenizer.decode(piece) for piece in judge.parts(f"{EXACT.question} {TEXT}", EXACT)]
    assert parts == [f"<user>{EXACT.question} {TEXT}\n\n", EXACT.question, f"</><assistant>{EXACT.lead}"]
    assert tokenizer.decode(repeat_request(tokenizer)).endswith("word by word.</><assistant>")
    tokenizer.chat_template = None
    parts = [tokenizer.decode(piece) for piece in judge.parts(TEXT, EXACT)]
    assert parts == [f"{TEXT}\n\n", EXACT.question, f"\n{EXACT.lead}"]
    assert tokenizer.decode(repeat_request(tokenizer)) == "\n\nRepeat the text above, word by word."


def test_likelihood_and_divergence():
    model, tokenizer = build("llama", vocab_size=257), byte_tokenizer()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    whole, kept, small = fluency(model, ids, 20, {"all": SnapKV(keep=1.0), "snapkv": make("snapkv")})
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, -21:-1].float()
    wanted = torch.nn.functional.cross_entropy(logits, ids[0, -20:])
    assert whole["nll"] == pytest.approx(float(wanted), abs=1e-4) == pytest.approx(kept["nll"], abs=1e-4)
    assert whole["kl"] == 0 and abs(kept["kl"]) < 1e-5 < small["kl"]


def test_losses_are_paired():
    def result(method, number, score):
        known = {
            "task": "needle",
            "when": "after",
            "logprob": -1.0,
            "held": 5,
            "bytes": 10,
            "tokens": 20,
            "exact": True,
        }
        later = float(method != "b@0.5" or score)
        return known | {"method": method, "number": number, "score": score, "score_begun": later}

    scores = {FULL: [1, 1, 1, 0], "a@0.5": [1, 1, 0, 0], "b@0.5": [1, 0, 0, 0]}
    rows = summary(
        (result(name, n, float(score)) for name, own in scores.items() for n, score in enumerate(own)), ["b@0.5"]
    )
    assert [row["quality"] for row in rows] == [75, 50, 25]
    assert [row["drop"] for row in rows] == [0, 25, 50]
    assert [row["quality_begun"] for row in rows] == [100, 100, 25]
    assert [row["drop_begun"][0] for row in rows] == [0, 0, 75] and len(rows[2]["drop_begun"]) == 3
    assert rows[1]["gains"]["b@0.5"][0] == 25 and rows[2]["gains"] == {}
    assert all(row["interval_low"] <= row["drop"] <= row["interval_high"] for row in rows)
    assert np.isfinite([row["interval_low"] for row in rows]).all() and all(row["exact"] for row in rows)
