"""A pruned embedder learns its teacher's vectors."""

from __future__ import annotations

import pytest
import torch
from transformers import BertModel, TrainingArguments

from support.tiny import tiny_tokenizer
from support.training import BERT, losses, rows
from thresher import LTP, ToP, TopK, prune
from thresher.core.pruner import pruner_in
from thresher.data.embedder import Embedder, load_embedder
from thresher.evaluation.predict import predict
from thresher.evaluation.retrieval import cosines
from thresher.training.embedding import EmbedTrainer
from thresher.training.trainer import Collator


def embedder(method=None) -> Embedder:
    torch.manual_seed(0)
    config = BERT.build(0, num_hidden_layers=3, initializer_range=0.3).config
    net = Embedder(BertModel(config, add_pooling_layer=False))
    return net.eval() if method is None else prune(net, method).eval()


def made(folder, method, steps=4, save="no", **own) -> EmbedTrainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy=save,
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    return EmbedTrainer(embedder(method), arguments, Collator(tiny_tokenizer()), **own)


def texts(taught: bool = True):
    data = rows(32).remove_columns("labels")
    vectors = predict(embedder(), data).logits
    return (data.add_column("teacher_sentence_embedding", vectors.tolist()) if taught else data), vectors


@pytest.mark.parametrize("pooling", ["put-back", "survivors"])
def test_vectors_are_learned(tmp_path, pooling):
    data, vectors = texts()
    method = TopK(keep=0.2, at=(0,), pooling=pooling)
    trainer = made(tmp_path, method, steps=120, train_dataset=data, eval_dataset=data)
    before = cosines(predict(trainer.model, data).logits, vectors).mean()
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = predict(trainer.model.eval(), data)
    assert cosines(after.logits, vectors).mean() > before + 0.3 * (1 - before), "nearer by a third of what was missing"
    assert trainer.evaluate()["eval_loss"] < 0.8 * first and after.macs_used < 0.75 * after.macs_dense


def test_a_soft_method_meets_its_budget(tmp_path):
    data, vectors = texts()
    trainer = made(tmp_path, LTP(target_flops=0.6, soft_until=0.3), steps=60, train_dataset=data)
    trainer.train()
    after = predict(trainer.model.eval(), data)
    assert after.macs_used / after.macs_dense == pytest.approx(0.6, rel=0.05)
    assert cosines(after.logits, vectors).mean() > 0.5


def test_a_teacher_that_ranks_tokens_teaches_both(tmp_path):
    data, _ = texts(taught=False)
    teacher = embedder()
    trainer = made(tmp_path, ToP(target_flops=0.6), train_dataset=data, teacher=teacher)
    trainer.train()
    assert all(loss > 0 for loss in losses(trainer)) and teacher.token_pruner is None


def test_what_was_trained_is_saved_and_goes_on(tmp_path):
    data, _ = texts()
    whole = made(tmp_path / "whole", TopK(keep=0.5, at=(0,)), steps=8, train_dataset=data)
    whole.train()
    made(tmp_path / "cut", TopK(keep=0.5, at=(0,)), steps=8, save="steps", train_dataset=data).train()
    again = made(tmp_path / "cut", TopK(keep=0.5, at=(0,)), steps=8, train_dataset=data)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], tensor, msg=name)
    again.model.save_pretrained(tmp_path / "saved", tiny_tokenizer())
    opened, _ = load_embedder(str(tmp_path / "saved"))
    assert pruner_in(opened).name == "topk"
    torch.testing.assert_close(predict(opened, data).logits, predict(again.model.eval(), data).logits)
