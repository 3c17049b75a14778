"""A teacher's states: which tokens of which layers are compared, and what the comparison does to a training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification, BertModel, TrainingArguments

from support.families import NO_DROPOUT, TEXT
from support.tiny import tiny_tokenizer
from support.training import SOFT, build, collate, inputs, rows, trainer
from thresher import LTP, TopK, prune
from thresher.data.embedder import Embedder
from thresher.methods.parts.distillation import state_loss
from thresher.training.embedding import EmbedTrainer
from thresher.training.trainer import Collator, Distill, PruningTrainer

STATES = Distill(states=1.0)


def loss_of(made: PruningTrainer, batch: dict) -> torch.Tensor:
    """The loss of the states alone: of a batch without labels, less the loss without them."""
    whole = made.compute_loss(made.model.train(), batch)
    weights, made.distill = made.distill, Distill()
    base, made.taught_by = made.taught_by, None
    try:
        return whole - made.compute_loss(made.model, batch)
    finally:
        made.distill, made.taught_by = weights, base


def reader(kind, seed: int = 0):
    torch.manual_seed(seed)
    return kind(BertConfig(**TEXT | NO_DROPOUT | {"num_hidden_layers": 3})).eval()


def wider(batch: dict, by: int = 7) -> dict:
    return {name: F.pad(x, (0, by)) if x.dim() == 2 else x for name, x in batch.items()}


def test_a_student_that_keeps_all_is_where_its_teacher_is(tmp_path):
    made = trainer(tmp_path, TopK(keep=1.0), teacher=build(), distill=STATES)
    batch = inputs()
    del batch["labels"]
    assert made.compute_loss(made.model.train(), batch).abs() < 1e-5
    made = trainer(tmp_path, TopK(keep=0.3), teacher=build(), distill=STATES)
    assert loss_of(made, batch) > 1e-3


def test_a_sentence_head_compares_the_first_token_of_every_layer(tmp_path):
    teacher, batch = build(1), inputs()
    made = trainer(tmp_path, TopK(keep=0.5), teacher=teacher, distill=Distill(states=0.5))
    with torch.no_grad():
        own = made.model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states
        other = teacher(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states
    pairs = zip(own[1:], other[1:], strict=True)
    expected = sum((1 - F.cosine_similarity(s[:, 0], t[:, 0])).mean() for s, t in pairs)
    torch.testing.assert_close(loss_of(made, batch), 0.5 * expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForQuestionAnswering])
def test_a_head_of_tokens_compares_survivors_and_at_the_end_all(tmp_path, kind):
    batch = inputs()
    del batch["labels"]
    teacher = reader(kind, 1)
    made = trainer(tmp_path, TopK(keep=0.5, at=(0, 1)), reader(kind), teacher=teacher, distill=STATES)
    with torch.no_grad():
        own = made.model(**batch, output_hidden_states=True).hidden_states
        sites = made.pruner.record.sites
        other = teacher(**batch, output_hidden_states=True).hidden_states
    expected = 0.0
    for layer in (1, 2, 3):
        away = 1 - F.cosine_similarity(own[layer], other[layer], dim=-1)
        left = batch["attention_mask"].bool() if layer == 3 else sites[layer - 1].after.spread_votes().bool()
        expected += torch.stack([row[here].mean() for row, here in zip(away, left, strict=True)]).mean()
    torch.testing.assert_close(loss_of(made, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [None, BertForTokenClassification])
@pytest.mark.parametrize("soft", [True, False], ids=["soft", "hard"])
def test_padding_does_not_matter(tmp_path, kind, soft):
    batch = inputs()
    del batch["labels"]
    student, teacher = (build(seed) if kind is None else reader(kind, seed) for seed in (0, 1))
    made = trainer(tmp_path, LTP(init=1.6, weight=0.0, **SOFT), student, teacher=teacher, distill=STATES)
    made.pruner.progress = 0.5 if soft else 1.0
    found = loss_of(made, batch)
    assert found > 1e-3
    torch.testing.assert_close(loss_of(made, wider(batch)), found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("soft", [True, False], ids=["soft", "hard"])
def test_the_gradient_reaches_every_layer_and_the_thresholds(tmp_path, soft):
    made = trainer(tmp_path, LTP(init=1.2, weight=0.0, at=(0, 1), **SOFT), teacher=build(1), distill=STATES)
    made.pruner.progress, batch = 0.5 if soft else 1.0, inputs()
    del batch["labels"]
    loss_of(made, batch).backward()
    for layer in made.model.bert.encoder.layer:
        assert layer.output.dense.weight.grad.abs().max() > 1e-6
    assert (made.pruner.threshold.grad.abs() > 0).all() == soft
    assert all(p.grad is None for p in made.teacher.parameters())


def test_a_resumed_training_is_the_one_that_was_not_interrupted(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "distill": Distill(states=0.5)}
    whole = trainer(tmp_path / "whole", TopK(keep=0.5), teacher=build(1), **options)
    whole.train()
    other = trainer(tmp_path / "other", TopK(keep=0.5), teacher=build(1), **options)
    other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_cached_answers_and_labels_keep_their_place(tmp_path):
    """The teacher runs for its states; the column says what it answers."""
    batch = inputs()
    made = trainer(tmp_path, TopK(keep=0.5), teacher=build(1), distill=Distill(states=0.5))
    without = trainer(tmp_path, TopK(keep=0.5))
    batch["teacher_logits"] = torch.randn(len(batch["labels"]), 3)
    answers = without.compute_loss(without.model.train(), batch)
    states = loss_of(made, batch)
    torch.testing.assert_close(made.compute_loss(made.model.train(), batch), answers + states)


@pytest.mark.parametrize("pooling", ["put-back", "survivors"])
def test_an_embedder_compares_what_is_pooled(tmp_path, pooling):
    teacher, student = (Embedder(reader(BertModel, seed)).eval() for seed in (1, 0))
    prune(student, TopK(keep=0.4, at=(0,), pooling=pooling))
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    made = EmbedTrainer(student, arguments, Collator(tiny_tokenizer()), teacher=teacher, distill=STATES)
    batch = {name: x for name, x in collate(list(rows(6))).items() if name != "labels"}
    with torch.no_grad():
        own = student.model(**batch, output_hidden_states=True)
        other = teacher.model(**batch, output_hidden_states=True).hidden_states
    record = made.pruner.record
    last = batch["attention_mask"] if pooling == "put-back" else own.token_mask
    left = [record.entering(layer).spread_votes().float() for layer in (1, 2)]
    expected = state_loss(own.hidden_states[1:], other[1:], [*left, last.float()])
    torch.testing.assert_close(loss_of(made, batch), expected, atol=1e-5, rtol=1e-5)
    assert pooling == "put-back" or last.sum() < batch["attention_mask"].sum()


def test_what_cannot_be_distilled_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"distill_states=1.0 needs the dense model itself \(teacher=\): columns"):
        trainer(tmp_path, TopK(), data=rows(teacher_logits=lambda i: [0.0] * 3), distill=STATES)
    with pytest.raises(ValueError, match="the teacher has 2 layers of 32 channels, the model 3 of 32"):
        deep = build().config
        deep.num_hidden_layers = 2
        trainer(tmp_path, TopK(), teacher=type(build())(deep), distill=STATES)
    with pytest.raises(ValueError, match=r"a teacher that is pruned are not distilled: unprune"):
        trainer(tmp_path, TopK(), teacher=prune(build(1), TopK()), distill=STATES)
    with pytest.raises(ValueError, match="distill_states=-1"):
        Distill(states=-1)
    with pytest.raises(ValueError, match="temperature=0"):
        Distill(temperature=0)
