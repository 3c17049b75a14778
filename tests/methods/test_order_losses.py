"""The losses of orders and of embeddings, against loops over queries, pairs and texts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from thresher.methods.parts.distillation import embedding_loss, margin_loss, order_loss, scores_of

QUERIES = torch.tensor([3, 1, 3, 1, 1, 7, 3, 3])
STUDENT, TEACHER = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).unbind()


def each(queries):
    """The rows of every query with two candidates or more."""
    found = [torch.nonzero(queries == q).flatten() for q in queries.unique()]
    return [rows for rows in found if len(rows) > 1]


def test_margins_are_compared_pair_by_pair():
    means = []
    for rows in each(QUERIES):
        pairs = [(i, j) for i in rows for j in rows if i < j]
        away = [((STUDENT[i] - STUDENT[j]) - (TEACHER[i] - TEACHER[j])) ** 2 for i, j in pairs]
        means.append(sum(away) / len(pairs))
    torch.testing.assert_close(margin_loss(STUDENT, TEACHER, QUERIES), sum(means) / len(means))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_orders_are_compared_query_by_query(temperature):
    means = []
    for rows in each(QUERIES):
        s, t = STUDENT[rows] / temperature, TEACHER[rows] / temperature
        means.append(temperature**2 * F.kl_div(s.log_softmax(0), t.softmax(0), reduction="sum"))
    found = order_loss(STUDENT, TEACHER, QUERIES, temperature)
    torch.testing.assert_close(found, sum(means) / len(means))


@pytest.mark.parametrize("loss", [margin_loss, order_loss])
def test_a_score_added_to_a_query_changes_nothing(loss):
    added = STUDENT + torch.where(QUERIES == 3, 5.0, -2.0)
    torch.testing.assert_close(loss(added, TEACHER, QUERIES), loss(STUDENT, TEACHER, QUERIES), atol=1e-5, rtol=1e-4)
    assert loss(TEACHER + 3, TEACHER, QUERIES).item() == pytest.approx(0, abs=1e-6)
    assert loss(STUDENT, TEACHER, QUERIES) > 0.1
    student = STUDENT.clone().requires_grad_()
    loss(student, TEACHER, QUERIES).backward()
    assert student.grad.isfinite().all() and student.grad[5] == 0 and (student.grad[:5] != 0).all()
    alone = loss(student, TEACHER, torch.arange(8))
    alone.backward()
    assert alone.item() == 0 and student.grad.isfinite().all(), "there is nothing to compare"


def test_a_score_is_that_of_the_second_class_over_the_first():
    assert scores_of(torch.tensor([[1.0, 3.0], [2.0, 0.0]])).tolist() == [2, -2]
    assert scores_of(torch.tensor([[1.0], [2.0]])).tolist() == [1, 2]


def test_embeddings_are_near_by_their_directions():
    student, teacher = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1)).unbind()
    own = [1 - student[i] @ teacher[i] / student[i].norm() / teacher[i].norm() for i in range(5)]
    torch.testing.assert_close(embedding_loss(student, teacher), sum(own) / 5)
    assert embedding_loss(3 * teacher, teacher).item() == pytest.approx(0, abs=1e-5), "length does not count"
