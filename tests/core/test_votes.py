"""Whose attention makes the score: all tokens', or that of the protected ones alone."""

from __future__ import annotations

import pytest
import torch

from support.families import FAMILIES
from support.tiny import tiny_model, tiny_tokenizer
from thresher import ATS, LTP, Cut, Entropy, PoWERBERT, SpAtten, Threshold, ToP, TopK, calling, prune
from thresher.core import scoring
from thresher.core.pruner import TokenPruner
from thresher.core.scoring import repeat_heads
from thresher.core.view import View
from thresher.methods.powerbert import others
from thresher.training.trainer import Ranking

PAIRS = [
    ("the farmer", "wheat and chaff , the grain & script"),
    ("script", "the wheat threshing grains"),
    ("and", "the"),
]
UNTIL = {"until": [3]}  # [SEP] of the tiny tokenizer


def batch() -> dict:
    tokenizer = tiny_tokenizer()
    assert tokenizer.sep_token_id == UNTIL["until"][0]
    return dict(tokenizer([a for a, _ in PAIRS], [b for _, b in PAIRS], padding=True, return_tensors="pt"))


def by_hand(model, inputs: dict, layer: int) -> torch.Tensor:
    """The attention that each token receives from the query, the mean over heads and the query's rows, times the number
    of tokens."""
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions[layer]
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    rows = []
    for b in range(len(ids)):
        end = ids[b].tolist().index(3) + 1
        rows.append(weights[b, :, :end].mean((0, 1)) * mask[b].sum())
    return torch.stack(rows)


def score_at(model, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        model(**inputs)
    site = model.token_pruner.record.sites[0]
    return torch.zeros(inputs["input_ids"].shape).scatter_add(1, site.tokens.index, site.score.float() * site.alive)


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("layout", ("mask", "padded", "packed"))
def test_the_score_is_the_attention_of_the_query(layout, attention):
    inputs = batch()
    expected = by_hand(tiny_model(attn_implementation="eager").eval(), inputs, 1)
    model = tiny_model(TopK(keep=0.5, at=(1,), protect=UNTIL), layout=layout, attn_implementation=attention).eval()
    assert model.token_pruner.votes == "protected"
    assert score_at(model, inputs) == pytest.approx(expected * inputs["attention_mask"], abs=1e-5)


def test_it_differs_from_the_attention_of_all():
    inputs = batch()
    scores = [
        score_at(tiny_model(TopK(keep=0.5, at=(1,), protect=UNTIL, votes=votes)).eval(), inputs)
        for votes in ("all", "protected")
    ]
    assert (scores[0] - scores[1]).abs().max() > 1e-3
    live = inputs["attention_mask"].sum(1)
    for score in scores:  # both average 1
        assert score.sum(1) / live == pytest.approx(torch.ones(3), abs=1e-4)


METHODS = [
    TopK(keep=0.5, protect=UNTIL),
    Threshold(0.9, protect=UNTIL),
    SpAtten(keep=0.6, protect=UNTIL),
    Entropy(keep=0.6, criterion="column", protect=UNTIL),
    TopK(keep=0.5, votes="protected"),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{method.votes}")
def test_removed_is_masked_and_a_row_answers_alone_as_in_a_batch(method):
    inputs, logits = batch(), {}
    for layout in ("mask", "padded", "packed"):
        model = tiny_model(TokenPruner.from_dict(method.to_dict()), layout=layout).eval()
        with torch.no_grad():
            logits[layout] = model(**inputs).logits
            for b in range(len(PAIRS)):
                alone = {name: x[b : b + 1, : inputs["attention_mask"][b].sum()] for name, x in inputs.items()}
                assert (model(**alone).logits - logits[layout][b]).abs().max() <= 1e-5
        assert model.token_pruner.votes == "protected"
    assert (logits["mask"] - logits["padded"]).abs().max() <= 1e-5
    assert (logits["mask"] - logits["packed"]).abs().max() <= 1e-5


@pytest.mark.parametrize("layout", ("mask", "padded", "packed"))
@pytest.mark.parametrize("family", ("bert", "modernbert", "llama", "gemma2", "gpt-oss"))
@pytest.mark.parametrize("side", ("right", "left"))
def test_the_voters_rows_alone_are_the_rows_of_all(family, layout, side, monkeypatch):
    """Whatever the attention: windows, causal masks, soft caps, sinks, grouped keys; voters anywhere in a row, as many
    as they are, or none, where the row votes as a whole."""
    source = FAMILIES[family]
    if layout == "packed" and not source.packed:
        pytest.skip("has no packed rows")
    batch = source.batch((24, 18, 10, 1), side=side)
    chosen = torch.rand(batch["attention_mask"].shape, generator=torch.Generator().manual_seed(7)) < 0.25
    chosen[2] = False
    found = []
    for whole in (False, True):
        method = Seen(keep=0.6, at=(0, 2), votes="protected")
        model = prune(source.build(), method, layout=layout)
        if whole:  # a look at all rows, as where everybody votes
            monkeypatch.setattr(View, "_reduce_voters", all_rows)
        with torch.no_grad(), calling(model, protect=chosen):
            source.answers(model, batch)
        found.append([site.score * site.alive for site in model.token_pruner.record.sites])
    for rows, reference in zip(*found, strict=True):
        assert (rows - reference).abs().max() <= 1e-5 and reference.abs().max() > 0.1


class Seen(TopK):
    name = ""


def all_rows(view: View, slots: torch.Tensor, reduce) -> torch.Tensor:
    """The score by all rows of the probabilities, of which the votes choose."""
    shown = view._shown
    slots = torch.arange(view.alive.shape[1]).expand_as(view.alive)
    given = shown.inputs
    query, key = view._queries(slots), repeat_heads(view.key, view._queries(slots))
    logits = given.logits.cap(query @ key.transpose(-1, -2) * given.logits.scaling)
    bias = view._bias(slots)
    weights = given.logits.softmax(logits if bias is None else logits + bias)
    return (weights * shown.votes[:, None, :, None]).sum(2).mean(1)


def test_few_rows_of_scores_are_made(monkeypatch):
    inputs, seen = batch(), []
    plain = scoring.reduce_over_heads

    def watched(query, *rest):
        seen.append(tuple(query.shape))
        return plain(query, *rest)

    monkeypatch.setattr("thresher.core.view.reduce_over_heads", watched)
    query = max(ids.index(3) + 1 for ids in inputs["input_ids"].tolist())
    for layout in ("mask", "padded", "packed"):
        model = tiny_model(TopK(keep=0.5, at=(0, 1), protect=UNTIL), layout=layout).eval()
        with torch.no_grad():
            model(**inputs)
    assert [shape[2] for shape in seen] == [query] * 6 and query < inputs["input_ids"].shape[1] / 2


@pytest.mark.parametrize("layout", ("mask", "padded", "packed"))
def test_what_a_token_gives_itself_is_left_out_in_the_voters_rows_as_in_all(layout):
    inputs = batch()
    weights = tiny_model(attn_implementation="eager").eval()(**inputs, output_attentions=True).attentions[1].detach()
    real, query = inputs["attention_mask"], torch.zeros_like(inputs["attention_mask"])
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        query[row, : ids.index(3) + 1] = 1
    votes = query * real.sum(1, keepdim=True) / query.sum(1, keepdim=True)
    expected = others(weights, votes) / weights.shape[1]
    method = PoWERBERT(keep=0.5, at=(1,), protect=UNTIL)
    found = score_at(tiny_model(method, layout=layout).eval(), inputs)
    assert found == pytest.approx(expected * real, abs=1e-5)


@pytest.mark.parametrize("make", (LTP, ToP, PoWERBERT))
def test_a_soft_stage_hears_the_query_alone_too(make):
    model = tiny_model(make(protect=UNTIL))
    model.train()
    model.token_pruner.progress = 0.0
    model(**batch()).logits.sum().backward()
    assert model.token_pruner.votes == "protected"
    for parameter in model.token_pruner.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_a_saved_model_keeps_its_voters(tmp_path):
    model = tiny_model(TopK(keep=0.5, protect=UNTIL, votes="all"))
    model.save_pretrained(tmp_path)
    again = prune(type(model).from_pretrained(tmp_path))
    assert again.token_pruner.votes == "all"


def test_an_entry_that_knows_no_votes_was_made_with_those_of_all():
    entry = tiny_model(TopK(keep=0.5, protect=UNTIL)).token_pruner.to_dict()
    assert entry.pop("votes") == "protected"
    assert tiny_model(TokenPruner.from_dict(entry)).token_pruner.votes == "all"


def test_a_decoder_hears_all_since_its_query_sees_nothing_behind_it():
    model = prune(FAMILIES["llama"].build(), TopK(keep=0.5, at=(1,), protect=UNTIL))
    assert model.token_pruner.votes == "all"
    with pytest.raises(ValueError, match="a query sees no token behind it"):
        prune(FAMILIES["llama"].build(), TopK(keep=0.5, protect=UNTIL, votes="protected"))
    prune(FAMILIES["llama"].build(), TopK(keep=0.5, votes="protected"))  # by what the last token looks at


def test_a_teacher_ranks_by_the_votes_of_its_student():
    student = tiny_model(ToP(protect=UNTIL)).token_pruner
    teacher = tiny_model(Ranking.like(student), layout="mask").eval()
    inputs = batch()
    expected = by_hand(tiny_model(attn_implementation="eager").eval(), inputs, teacher.config.num_hidden_layers - 1)
    assert score_at(teacher, inputs) == pytest.approx(expected * inputs["attention_mask"], abs=1e-5)


def test_without_a_query_all_vote():
    assert tiny_model(TopK(keep=0.5)).token_pruner.votes == "all"


def test_rows_without_a_protected_token_vote_as_a_whole():
    inputs = batch()
    one, other = (tiny_model(TopK(keep=0.5, at=(1,), protect=(), votes=votes)).eval() for votes in ("protected", "all"))
    assert torch.equal(score_at(one, inputs), score_at(other, inputs))


@pytest.mark.parametrize(
    ("make", "votes", "message"), [(TopK, "some", "all or protected"), (ATS, "protected", "ats takes no score")]
)
def test_what_cannot_vote_is_refused(make, votes, message):
    with pytest.raises(ValueError, match=message):
        make(votes=votes)


@pytest.mark.parametrize("method", (Cut(protect=UNTIL), ATS(protect=UNTIL)), ids=lambda method: method.name)
def test_methods_that_take_no_votes_prune_queries_as_ever(method):
    assert tiny_model(method).token_pruner.votes == "all"
