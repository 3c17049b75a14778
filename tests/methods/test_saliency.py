"""What teaches policies and predictors: saliency, losses of single texts; and AdapLeR, which saliency teaches."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification

from support.families import FAMILIES, NO_DROPOUT, TEXT
from support.soft import BERT, batch, learning, loss_of
from support.training import build, inputs, trainer
from thresher import AdapLeR, ToP, prune
from thresher.methods.parts.saliency import answer_saliency, saliency, task_losses
from thresher.training.trainer import Ranking, ranking_of


@pytest.mark.parametrize("family", ["bert", "modernbert", "distilbert", "albert"])
def test_saliency_is_what_fading_a_token_does_to_the_loss(family):
    """By differences: one gate a little less open."""
    model, method = learning(AdapLeR(at=(0, 1)), FAMILIES[family].build().double())
    inputs = batch() | {"labels": torch.tensor([0, 1, 1])}
    found = saliency(method, lambda: model(**inputs))
    assert [x.shape for x in found] == [(3, 9)] * 2
    for site, row, slot in ((0, 0, 3), (0, 2, 6), (1, 1, 0), (1, 0, 8)):

        def loss(step, at=(site, row, slot)):
            def gate(score, view):
                gates = torch.zeros(view.alive.shape, dtype=torch.float64)
                if view.site == at[0]:
                    gates[at[1:]] = step
                return gates

            with torch.no_grad(), method.hooks.asking(gates=gate):
                return model(**inputs).loss.item()

        slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
        assert found[site][row, slot].item() == pytest.approx(abs(slope), rel=1e-3, abs=1e-7)
    padding = ~inputs["attention_mask"].bool()
    assert all((x[padding] == 0).all() and (x[~padding] > 0).any() for x in found)


def test_the_predictors_learn_the_shares_of_saliency():
    """The KL beside a sum in plain loops; by the KL alone the predictors come to rank as saliency does."""
    model, method = learning(AdapLeR(weight=0.0, init=0.0, at=(0, 1)))
    inputs = batch()
    model(**inputs)
    salient = saliency(method, lambda: model(**inputs))
    for view, found in zip(method.record.sites, salient, strict=True):
        total = 0.0
        for row, length in enumerate((9, 6, 7)):
            share = (found[row, :length] / found[row, :length].sum()).tolist()
            said = (view.score[row, :length] / length).tolist()
            assert sum(said) == pytest.approx(1, abs=1e-5)
            total += sum(s * math.log(s / p) for s, p in zip(share, said, strict=True)) / 3
        assert method.apart(view, found).item() == pytest.approx(total, abs=1e-5)
    optimizer, seen = torch.optim.Adam(method.parameters(), 1e-2), []
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(model, method, inputs).backward()
        optimizer.step()
        seen.append(method.metrics()["saliency_kl"])
    assert seen[-1] < 0.5 * seen[0]


def test_gates_become_hard_and_what_has_faded_takes_no_share():
    model, method = learning(AdapLeR(init=0.9, soft_until=0.5, temperature=0.2), progress=0.0)
    for predictor in method.predictors:
        predictor[2].weight.data.mul_(30)
    opened = []
    for method.progress in (0.0, 0.25, 0.499):
        model(**batch((24, 18, 10)))
        first = method.record.sites[0]
        opened.append((method.opening(first.score, first.view) / (first.score - 0.9)).nanmean().item())
    assert opened == pytest.approx([5, 5 * 10**0.5, 50], rel=0.02)
    faded = method.record.sites[1]
    closed = faded.alive & (faded.tokens.log_gate < -6)
    assert closed.any() and (faded.score[closed] < 0.1).all()
    torch.testing.assert_close(faded.score.sum(1), faded.tokens.live, atol=1e-4, rtol=0)


@pytest.mark.parametrize("head", ["classes", "number", "tokens", "answer"])
def test_losses_of_single_texts_average_to_the_models(head):
    torch.manual_seed(0)
    config = {**TEXT, **NO_DROPOUT, "num_hidden_layers": 2}
    inputs = BERT.batch((9, 9, 9))
    if head == "classes":
        model, more = BERT.build(), {"labels": torch.tensor([0, 2, 1])}
    elif head == "number":
        model = BERT.build(num_labels=1, problem_type="regression")
        more = {"labels": torch.tensor([0.1, 2.0, -1.0])}
    elif head == "tokens":
        labels = torch.randint(0, 4, (3, 9))
        labels[:, :2] = -100
        model, more = BertForTokenClassification(BertConfig(**config, num_labels=4)), {"labels": labels}
    else:
        model = BertForQuestionAnswering(BertConfig(**config))
        more = {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([4, 5, 6])}
    output = model.eval()(**inputs, **more)
    found = task_losses(output, inputs | more)
    assert found.shape == (3,) and found.std() > 0
    torch.testing.assert_close(found.mean(), output.loss)


# --- of an answer ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("head", ["classes", "number", "tokens", "answer"])
def test_the_saliency_of_an_answer_is_what_fading_a_token_does_to_its_logit(head):
    """By differences, in evaluation mode, of a teacher that is frozen; padding neither has any nor changes it."""
    torch.manual_seed(0)
    config = BertConfig(**{**TEXT, **NO_DROPOUT, "num_hidden_layers": 2})
    kinds = {"tokens": BertForTokenClassification, "answer": BertForQuestionAnswering}
    model = kinds[head](config) if head in kinds else BERT.build(num_labels=1 if head == "number" else 3)
    model = prune(model.double().eval().requires_grad_(False), Ranking("saliency"), layout="mask")
    inputs, pruner = BERT.batch((9, 6, 7)), model.token_pruner
    with torch.no_grad():
        found = answer_saliency(pruner, lambda: model(**inputs), inputs["attention_mask"])
    real = inputs["attention_mask"].bool()
    assert found.shape == (3, 9) and (found[~real] == 0).all() and (found[real] > 0).all()

    def answer(row, slot, step):
        def gate(score, view):
            return torch.zeros(view.alive.shape, dtype=torch.float64).index_put((row, slot), step)

        with torch.no_grad(), pruner.hooks.asking(gates=gate):
            output = model(**inputs)
        if head == "answer":
            logits = torch.stack([output.start_logits, output.end_logits]).masked_fill(~real, -torch.inf)
            return logits.amax(-1).sum()
        best = output.logits.amax(-1)
        return (best * real).sum() if head == "tokens" else best.sum()

    for row, slot in ((0, 3), (2, 6), (1, 0)):
        at = torch.tensor(row), torch.tensor(slot)
        steps = [answer(*at, torch.tensor(step, dtype=torch.float64)) for step in (1e-4, -1e-4)]
        assert found[row, slot].item() == pytest.approx(abs((steps[0] - steps[1]).item()) / 2e-4, rel=1e-3, abs=1e-7)
    wider = {name: torch.nn.functional.pad(x, (0, 4)) for name, x in inputs.items()}
    again = answer_saliency(pruner, lambda: model(**wider), wider["attention_mask"])
    torch.testing.assert_close(again[:, :9], found, atol=1e-9, rtol=1e-6)


def test_top_learns_the_saliency_of_its_teacher(tmp_path):
    """From a teacher in the same step, and from a column of the data."""
    teacher = build(1)
    made = trainer(tmp_path, ToP(target_flops=0.6, ranking="saliency"), teacher=teacher, max_steps=2)
    seen, loss = [], made.pruner.ranking_loss_of
    made.pruner.ranking_loss_of = lambda record, taught: seen.append(taught["ranking"]) or loss(record, taught)
    made.train()
    assert len(seen) == 2 and not hasattr(teacher, "token_pruner")
    assert all((x > 0).any() for x in seen) and "rank_overlap_0" in made.pruner.metrics()
    batch = inputs()
    prune(teacher.eval(), Ranking("saliency"), layout="mask")
    known = {name: x for name, x in batch.items() if name != "labels"}
    teacher(**known)
    column = ranking_of(teacher, known)
    seen.clear()
    made.pruner.progress = 0.1
    made.compute_loss(made.model.train(), batch)
    made.compute_loss(made.model, batch | {"teacher_ranking": column, "teacher_logits": torch.zeros(6, 3)})
    torch.testing.assert_close(seen[0], seen[1])


def test_a_model_without_logits_has_no_saliency():
    model = prune(BERT.build().bert, Ranking("saliency"))
    with pytest.raises(ValueError, match="ranking='saliency' asks what the teacher's logits hang on"):
        answer_saliency(model.token_pruner, lambda: model(**BERT.batch()))
    with pytest.raises(ValueError, match="ranking='chance': expected one of attention, saliency"):
        ToP(ranking="chance")
