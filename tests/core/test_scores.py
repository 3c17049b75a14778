"""Scores of the methods that need no training, beside the papers' sums in plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from support.families import FAMILIES
from thresher import ATS, VATP, Entropy, SpAtten, Transkimmer, prune
from thresher.core.tokens import LAYOUTS
from thresher.core.view import View

BERT, LENGTHS = FAMILIES["bert"], (24, 18, 10)


def layers(length: int, row: int):
    """Of one row alone, without pruning, per layer: attention (H, n, n) and values (H, n, d)."""
    model = BERT.build(attn_implementation="eager")
    ids = BERT.batch(LENGTHS)["input_ids"][row : row + 1, :length]
    with torch.no_grad():
        output = model.bert(ids, output_attentions=True, output_hidden_states=True)
        found = []
        for layer, weights, x in zip(model.bert.encoder.layer, output.attentions, output.hidden_states, strict=False):
            value = layer.attention.self.value(x).view(length, weights.shape[1], -1).transpose(0, 1)
            found.append((weights[0], value))
    return found


def scores(method, layout: str) -> list[list[list[float]]]:
    """What a pruned model scored, per site and row."""
    model = prune(BERT.build(), method, layout=layout)
    with torch.no_grad():
        BERT.run(model, BERT.batch(LENGTHS))
    return [[s[a].tolist() for s, a in zip(v.score, v.alive, strict=True)] for v in model.token_pruner.record.sites]


def by_hand(name: str, weights, value) -> list[float]:
    """(n,) in loops over heads, queries and keys."""
    heads, n, _ = weights.shape
    a = weights.tolist()
    if name == "row":
        return [sum(p * math.log(p) for h in a for p in h[i] if p > 0) / heads for i in range(n)]
    if name == "column":
        return [sum(h[i][j] ** 2 for h in a for i in range(n)) / heads for j in range(n)]
    if name == "vatp":
        received = [sum(h[i][j] for h in a for i in range(n)) / heads for j in range(n)]
        return [received[j] * sum(value[h, j].abs().sum().item() for h in range(heads)) / heads for j in range(n)]
    size = value.norm(dim=-1).tolist()
    return [0.0] + [sum(a[h][0][j] * size[h][j] for h in range(heads)) / heads for j in range(1, n)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "method"),
    [("row", Entropy), ("column", lambda **k: Entropy(criterion="column", **k)), ("vatp", VATP), ("ats", ATS)],
)
def test_scores_are_the_papers(name, method, layout):
    (found,) = scores(method(keep=0.6, at=(1,)), layout)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(
            torch.tensor(found[row]), torch.tensor(by_hand(name, *layers(length, row)[1])), atol=1e-5, rtol=1e-5
        )


def test_ats_in_a_decoder_asks_the_last_token():
    family = FAMILIES["llama"]
    model = prune(family.build(), ATS(keep=0.9, at=(1,)))
    with torch.no_grad():
        family.run(model, family.batch(LENGTHS))
    (view,) = model.token_pruner.record.sites
    kept, live = view.keep.sum(1), view.alive.sum(1)
    assert ((kept > 3) & (kept < live)).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_spatten_adds_up_what_the_survivors_received(layout, monkeypatch):
    own, received = [], View.attention_received
    monkeypatch.setattr(View, "attention_received", lambda view: own.append(received(view)) or own[-1])
    model = prune(BERT.build(), SpAtten(keep=0.5, at=(0, 1, 2)), layout=layout)
    with torch.no_grad():
        BERT.run(model, BERT.batch(LENGTHS))
    first, *_ = views = model.token_pruner.record.sites
    for row, length in enumerate(LENGTHS):
        weights, _ = layers(length, row)[0]
        torch.testing.assert_close(first.score[row, first.alive[row]], weights.mean(0).sum(0), atol=1e-5, rtol=1e-5)
    for row in range(len(LENGTHS)):
        for i in view_places(views[-1], row):
            if i < 0:
                continue
            total = sum(o[row, view_places(v, row).index(i)] for o, v in zip(own, views, strict=True))
            assert abs(views[-1].score[row, view_places(views[-1], row).index(i)] - total) <= 1e-5


def view_places(view, row: int) -> list[int]:
    """Original places of the slots of a row, -1 where there is no token."""
    return torch.where(view.alive[row], view.tokens.index[row], -1).tolist()


def test_spatten_does_not_remember_the_last_call():
    model = prune(BERT.build(), SpAtten(keep=0.5))
    with torch.no_grad():
        first, second = (BERT.run(model, BERT.batch(LENGTHS)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("keep", [0.3, 0.8, 4, 1])
def test_ats_keeps_what_points_on_the_distribution_hit(keep):
    model = prune(BERT.build(), ATS(keep=keep, at=(1,)))
    with torch.no_grad():
        BERT.run(model, BERT.batch(LENGTHS))
    (view,) = model.token_pruner.record.sites
    for row, length in enumerate(LENGTHS):
        most = min(keep, length) if isinstance(keep, int) else math.ceil(keep * length)
        points = most - 1  # the first token stays anyhow
        share = view.score[row, view.alive[row]].double()
        edges = (share.cumsum(0) / share.sum()).tolist()
        hit = {0} | {
            next(j for j, e in enumerate(edges) if e > (2 * k - 1) / (2 * points)) for k in range(1, points + 1)
        }
        assert view.keep[row].nonzero()[:, 0].tolist() == sorted(hit)
        assert len(hit) <= most <= model.token_pruner.width(max(LENGTHS), 0)


def test_what_a_method_needs_of_a_model_is_said_when_it_is_pruned():
    with pytest.raises(ValueError, match="vatp is not possible with MPNetModel: it needs the keys or values"):
        prune(FAMILIES["mpnet"].build(), VATP())
    with pytest.raises(ValueError, match="ats is not possible with BertForSequenceClassification, which has no class"):
        prune(BERT.build(), ATS(protect=()))
    with pytest.raises(ValueError, match="use criterion='column'"):
        prune(FAMILIES["llama"].build(), Entropy())
    with pytest.raises(ValueError, match="expected one of row, column"):
        Entropy(criterion="rows")
    with pytest.raises(ValueError, match="ATS decides by itself"):
        ATS(keep="replay")


def test_what_predictors_cost_is_counted():
    model = prune(BERT.build(), Transkimmer(start=50.0, at=(0, 2)))
    with torch.no_grad():
        BERT.run(model, BERT.batch(LENGTHS))
    more = [row["macs"] - row["dense_macs"] for row in model.token_pruner.report]
    size = sum(
        p.numel() for m in model.token_pruner.predictors[0] if isinstance(m, torch.nn.Linear) for p in [m.weight]
    )
    assert more == [sum(LENGTHS) * size, 0, sum(LENGTHS) * size, 0]


def test_transkimmer_draws_in_the_soft_stage_alone_and_learns_what_stays():
    model = prune(BERT.build(), Transkimmer(target_flops=0.5, start=0.0)).train()
    pruner, batch = model.token_pruner, BERT.batch(LENGTHS)
    pruner.progress = 0.1
    first, second = ((BERT.run(model, batch), pruner.record.counts[-1].n_ffn.clone())[1] for _ in range(2))
    assert not torch.equal(first, second)
    pruner.loss(None, batch, pruner.record).backward()
    assert all(p.grad.abs().sum() > 0 for p in pruner.predictors[0].parameters())
    pruner.progress = 1.0
    first, second = ((BERT.run(model, batch), pruner.record.counts[-1].n_ffn.clone())[1] for _ in range(2))
    assert torch.equal(first, second)
