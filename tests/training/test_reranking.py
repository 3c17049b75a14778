"""A pruned reranker learns its teacher's order, with and without labels."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from support.tiny import tiny_tokenizer
from support.training import build, losses, rows
from thresher import LTP, ToP, TopK, prune
from thresher.methods.parts.distillation import margin_loss
from thresher.training.reranking import RerankTrainer
from thresher.training.trainer import Collator

PER = 4


def made(folder, method=None, data=None, steps=4, eval_dataset=None, **own) -> RerankTrainer:
    """A trainer of a tiny reranker; ``own`` are options of the trainer."""
    model = build(num_labels=1, problem_type="multi_label_classification")
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    collate = Collator(tiny_tokenizer(), highest=2.0)
    model = prune(model, method or TopK(keep=0.5, at=(1,)))
    return RerankTrainer(model, arguments, collate, data if data is not None else pairs(), eval_dataset, **own)


def pairs(labels: bool = True, taught: bool = True, **columns):
    """Rows of queries with four candidates; the teacher's score is the number of the candidate."""
    columns |= {"row": lambda i: i // PER}
    columns |= {"teacher_logits": lambda i: [float(i % PER)]} if taught else {}
    data = rows(32, **columns)
    data = data.remove_columns("labels")
    return data.add_column("labels", [float(max(0, i % PER - 1)) for i in range(32)]) if labels else data


def test_the_loss_is_of_labels_and_margins(tmp_path):
    trainer = made(tmp_path, TopK(keep=1.0, at=(1,)))
    data = pairs()
    batch = trainer.data_collator([data[i] for i in range(8)])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    wanted = torch.tensor([0, 0, 0.5, 1] * 2)
    task = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted)
    margins = margin_loss(logits, torch.arange(8.0) % PER, torch.arange(8) // PER)
    torch.testing.assert_close(loss, 0.5 * task + 0.5 * margins, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("teaching", ["margin", "order"])
@pytest.mark.parametrize("method", ["topk", "ltp"])
def test_an_order_is_learned_without_labels(tmp_path, teaching, method):
    columns = {"input_ids": lambda i: [2] + [5 + 7 * (i % PER)] * 9 + [3], "attention_mask": lambda i: [1] * 11}
    data = pairs(labels=False, **columns)
    method = TopK(keep=0.5, at=(1,)) if method == "topk" else LTP(target_flops=0.6, soft_until=0.5)
    trainer = made(tmp_path, method, data, steps=40, teaching=teaching)
    trainer.train()
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]
    batch = trainer.data_collator([data[i] for i in range(PER)])
    with torch.no_grad():
        said = trainer.model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert said[:, 0].argsort().tolist() == [0, 1, 2, 3]


def test_a_teacher_that_ranks_tokens_teaches_both(tmp_path):
    teacher = build(1, num_labels=1, problem_type="multi_label_classification")
    trainer = made(tmp_path, ToP(target_flops=0.6), pairs(labels=False, taught=False), teacher=teacher)
    trainer.train()
    assert all(loss > 0 for loss in losses(trainer)) and not hasattr(teacher, "token_pruner")
    assert any("rank_overlap_0" in line for line in trainer.state.log_history)


def test_batches_hold_whole_queries_and_held_out_rows_have_a_loss(tmp_path):
    trainer = made(tmp_path, eval_dataset=pairs(labels=False))
    for batch in trainer.get_train_dataloader():
        assert (batch["row"].unique(return_counts=True)[1] == PER).all() and len(batch["row"]) == 8
    assert trainer.evaluate()["eval_loss"] > 0


def test_held_out_candidates_meet_their_rivals(tmp_path):
    """Whatever the arguments say of an order, and in the same batches each time."""
    trainer = made(tmp_path, eval_dataset=pairs(labels=False))
    trainer.args.train_sampling_strategy = "group_by_length"
    found = [batch["row"].tolist() for batch in trainer.get_eval_dataloader()]
    assert all(own.count(query) == PER for own in found for query in own)
    assert found == [batch["row"].tolist() for batch in trainer.get_eval_dataloader()]


def test_what_cannot_be_trained_is_told(tmp_path):
    with pytest.raises(ValueError, match="no loss 'listwise': expected margin or order"):
        made(tmp_path, teaching="listwise")
    with pytest.raises(ValueError, match="expected 'row', the query's"):
        made(tmp_path, data=pairs().remove_columns("row"))
