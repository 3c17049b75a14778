"""The losses that teach a ranking, and the measure of agreement."""

import math

import pytest
import torch

from thresher.ranking import overlap, ranking_loss

FREE = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]]).bool()


@pytest.mark.parametrize("k", [4, 9])
@pytest.mark.parametrize("kind", ["arp2", "arp2-topk", "ndcg"])
def test_the_ranking_loss_is_the_sum_over_pairs(kind, k):
    """Also where a row has fewer than k; empty slots behind the tokens change nothing."""
    torch.manual_seed(0)
    score, teacher, total = torch.rand(2, 7), torch.rand(2, 7), 0.0
    for row in range(2):
        order = sorted(FREE[row].nonzero()[:, 0].tolist(), key=lambda i: -teacher[row, i].item())
        mine = sorted(order, key=lambda i: -score[row, i].item())
        summed = weights = 0.0
        for a, i in enumerate(order[:k]):
            for b, j in enumerate(order):
                if b <= a or (kind == "arp2-topk" and b >= k):
                    continue
                weight = min(b, k) - a
                if kind == "ndcg":
                    weight *= abs(1 / math.log2(2 + mine.index(i)) - 1 / math.log2(2 + mine.index(j)))
                summed += weight * math.log2(1 + math.exp(-(score[row, i] - score[row, j]).item()))
                weights += weight
        total += summed / (k**2 if kind == "arp2-topk" else weights)
    for more in (0, 5):
        padded = [torch.nn.functional.pad(x, (0, more)) for x in (score, teacher, FREE)]
        assert ranking_loss(*padded, k, kind).item() == pytest.approx(total / 2, rel=1e-5)


def learned(kind: str, k: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """A teacher's scores of 11 tokens, and those that the loss arrives at from random ones."""
    torch.manual_seed(0)
    teacher, free = torch.rand(3, 12), torch.ones(3, 12, dtype=torch.bool)
    free[:, 0] = False
    score = torch.rand(3, 12, requires_grad=True)
    optimizer = torch.optim.Adam([score], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        ranking_loss(score, teacher, free, k, kind).backward()
        optimizer.step()
    return teacher[:, 1:], score.detach()[:, 1:]


@pytest.mark.parametrize("kind, places", [("arp2", 8), ("arp2-topk", 8), ("ndcg", 6)])
def test_the_ranking_loss_pulls_scores_into_the_teachers_order(kind, places):
    """The NDCG hardly weighs the last places."""
    teacher, score = learned(kind)
    assert (score.gather(1, teacher.topk(places).indices).diff(dim=1) < 0).all()


@pytest.mark.parametrize("kind, found", [("arp2", 1.0), ("ndcg", 1.0)])
def test_the_best_tokens_rise_above_the_others(kind, found):
    teacher, score = learned(kind, k=4)
    assert overlap(score, teacher, torch.ones_like(score).bool(), 4) == found


def test_pairs_among_the_best_alone_leave_the_others_where_they_are():
    torch.manual_seed(0)
    score, teacher = torch.rand(2, 7, requires_grad=True), torch.rand(2, 7)
    ranking_loss(score, teacher, FREE, 2, "arp2-topk").backward()
    best = teacher.masked_fill(~FREE, 0).topk(2).indices
    assert (score.grad.scatter(1, best, 0.0) == 0).all() and (score.grad.gather(1, best) != 0).all()


@pytest.mark.parametrize("kind", ["arp2", "arp2-topk", "ndcg"])
def test_rows_with_fewer_tokens_than_are_asked_for(kind):
    score = torch.rand(2, 7, requires_grad=True)
    none = FREE & False
    for free in (FREE, none):
        loss = ranking_loss(score, torch.rand(2, 7), free, 20, kind)
        loss.backward()
        assert loss.isfinite() and (score.grad[~free] == 0).all()
        score.grad = None
    assert loss == 0, "no tokens, no pairs"
    assert overlap(score.detach(), torch.rand(2, 7), none, 20) == 0
