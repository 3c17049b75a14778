"""The losses that teach a ranking, the measure of agreement, and how ToP teaches its early layers."""

import math

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

from support.families import FAMILIES
from thresher import ToP, prune
from thresher.methods.parts.rank_distillation import overlap, ranking_loss, taught_by
from thresher.methods.top import BOUND

BERT, LENGTHS = FAMILIES["bert"], (24, 18, 10, 21)

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


def test_of_an_odd_number_of_tokens_the_better_half_is_rounded_up():
    score, teacher, free = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[1.0, 3.0, 2.0]]), torch.ones(1, 3).bool()
    assert overlap(score, teacher, free, 20) == 0.5, "the best two: 0 and 1 here, 1 and 2 of the teacher"
    five = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    assert overlap(five, five[:, [2, 1, 0, 3, 4]], torch.ones(1, 5).bool(), 20) == 1, "the best three, in another order"


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


RANKING = torch.rand(len(LENGTHS), 24, generator=torch.Generator().manual_seed(0))


def taught(layout: str, progress: float, checkpointing: bool = False, **options):
    """A model whose early layers have been taught RANKING: its method, the loss and the gradient of layer 1's keys."""
    method = ToP(bins=4, floor=0, site_gates=False, topk=5, **options)
    model = prune(BERT.build(), method, layout=layout).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    method.early, method.progress = [0, 1], progress
    method.mask[0] = torch.tensor([True, False, True, False])
    with torch.no_grad():
        method.rank[0] = torch.tensor([BOUND, -BOUND, BOUND, -BOUND])
    torch.manual_seed(1)
    BERT.run(model, BERT.batch(LENGTHS))
    loss = method.ranking_loss_of(method.record, {"ranking": RANKING})
    loss.backward()
    return method, loss.item(), model.bert.encoder.layer[1].attention.self.key.weight.grad


@pytest.mark.parametrize("kind", ["arp2", "arp2-topk", "ndcg"])
def test_the_ranking_is_learned_to_the_end_alike_in_every_executor(kind):
    """In the hard stage, of the tokens that are left, whatever slots they are in."""
    (_, loss, gradient), *others = (taught(e, 1.0, rank_loss=kind) for e in ("mask", "padded", "packed"))
    assert loss > 0 and gradient.abs().sum() > 0
    for _, other, found in others:
        assert other == pytest.approx(loss, abs=1e-5)
        torch.testing.assert_close(found, gradient, atol=1e-5, rtol=0)


@pytest.mark.parametrize("progress, layout", [(0.0, "auto"), (1.0, "mask"), (1.0, "padded"), (1.0, "packed")])
def test_checkpointing_teaches_the_same_ranking(progress, layout):
    (_, loss, gradient), (_, again, found) = (taught(layout, progress, c) for c in (False, True))
    assert again == pytest.approx(loss, abs=1e-6) and gradient.abs().sum() > 0
    torch.testing.assert_close(found, gradient, atol=1e-6, rtol=0)


@pytest.mark.parametrize("progress", [0.0, 1.0], ids=["soft", "hard"])
def test_what_is_ranked_are_logarithms_of_open_tokens_that_may_leave(progress):
    method, loss, _ = taught("mask", progress)
    views, total = method.record.sites[:2], 0.0
    gone = [torch.zeros_like(RANKING).bool(), ~views[0].keep if progress else views[1].tokens.log_gate < -10]
    assert gone[1].any() and not gone[1].all()
    for view, left in zip(views, gone, strict=True):
        free = (torch.arange(24) < torch.tensor(LENGTHS)[:, None]) & ~left
        free[:, 0] = False  # the first token never leaves
        total += ranking_loss(view.score.detach().log(), RANKING, free, 5, "arp2").item()
    assert loss == pytest.approx(total, rel=1e-5)


def test_the_papers_ranking_is_of_shares_of_all_attention():
    method, loss, _ = taught("mask", 0.0, rank_loss="arp2-topk")
    total = 0.0
    for view in method.record.sites[:2]:
        shares = view.score.detach() / view.score.detach().sum(1, keepdim=True)
        total += ranking_loss(shares, RANKING, view.view.free, 5, "arp2-topk").item()
    assert loss == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("progress", [0.0, 1.0], ids=["soft", "hard"])
def test_the_ranking_loss_has_its_weight(progress):
    method, loss, _ = taught("mask", progress)
    losses = []
    for method.rank_weight in (0.0, 2.0):
        losses.append(method.loss(None, {}, method.record, {"ranking": RANKING}).item())
    assert losses[1] - losses[0] == pytest.approx(2 * loss, rel=1e-4)


def test_a_reader_learns_the_ranking_of_the_answers_at_all_sites():
    config = BertConfig(num_hidden_layers=4, hidden_size=32, num_attention_heads=4, intermediate_size=64, vocab_size=99)
    method = ToP(bins=4, topk=5)
    model = prune(BertForQuestionAnswering(config), method).train()
    method.progress = 0.1
    model(**BERT.batch(LENGTHS))
    begin, end = torch.randn(2, len(LENGTHS), 24, generator=torch.Generator().manual_seed(0))
    teacher = {"start_logits": begin, "end_logits": end, "ranking": RANKING}
    loss = method.ranking_loss_of(method.record, teacher).item()
    assert loss == method.ranking_loss_of(method.record, {"ranking": torch.maximum(begin, end)}).item()
    assert loss != method.ranking_loss_of(method.record, {"ranking": RANKING}).item()
    assert [name for name in method.metrics() if name.startswith("rank")] == [f"rank_overlap_{i}" for i in range(3)]


def test_a_reader_may_learn_saliency_in_place_of_its_answers():
    begin, end = torch.randn(2, 2, 7, generator=torch.Generator().manual_seed(0))
    teacher = {"start_logits": begin, "end_logits": end, "ranking": RANKING}
    assert taught_by(teacher, "saliency") is RANKING
    torch.testing.assert_close(taught_by(teacher), torch.maximum(begin, end))
