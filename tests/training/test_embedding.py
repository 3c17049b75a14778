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
from thresher.training.embedding import SCALE, EmbedTrainer, pair_loss
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


NONE = float("nan")


def test_similar_pairs_are_to_be_nearer():
    torch.manual_seed(0)
    vectors, value = torch.randn(6, 8), torch.tensor([0.9, 0.9, 0.1, 0.1, 0.5, 0.5])
    given = {"group": torch.tensor([0, 0, 1, 1, 2, 2]), "place": torch.tensor([0, 1] * 3), "similarity": value}
    c = torch.nn.functional.cosine_similarity(vectors[0::2], vectors[1::2])
    wrong = [(c[j] - c[i]) * SCALE for i, j in ((0, 1), (0, 2), (2, 1))]
    expected = torch.log(1 + sum(one.exp() for one in wrong))
    same = torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(pair_loss(vectors, **given, same=same), expected)
    scaled = given | {"similarity": 5 * value}
    torch.testing.assert_close(pair_loss(vectors, **scaled, same=same), expected)
    order = torch.tensor([3, 5, 0, 2, 1, 4])
    mixed = {name: one[order] for name, one in given.items()}
    torch.testing.assert_close(pair_loss(vectors[order], **mixed, same=same), expected)


def test_a_near_text_is_to_be_nearest():
    """Among its own second text, those of others and further ones; a copy of it is no rival."""
    torch.manual_seed(0)
    vectors, group, place = torch.randn(6, 8), torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 1, 0, 1, 2, 0])
    given = {"group": group, "place": place, "similarity": torch.full((6,), NONE)}
    near = torch.nn.functional.normalize(vectors, dim=-1)
    logits = SCALE * near[[0, 2]] @ near[[1, 3, 4]].T
    same = torch.eye(6, dtype=torch.bool)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(pair_loss(vectors, **given, same=same), expected)
    same[1, 4] = same[4, 1] = True
    logits[0, 2] = -torch.inf
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(pair_loss(vectors, **given, same=same), expected)


def test_lone_texts_have_no_loss():
    vectors = torch.randn(3, 8, requires_grad=True)
    given = {"group": torch.arange(3), "place": torch.zeros(3, dtype=torch.long)}
    loss = pair_loss(vectors, **given, similarity=torch.full((3,), NONE), same=torch.eye(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and not vectors.grad.any()


@pytest.mark.parametrize("scored", [True, False])
def test_pairs_teach_beside_the_teacher(tmp_path, scored):
    """Whole pairs are in a batch, and move the vectors to where the pairs say; the teacher alone does not."""
    data, _ = texts()
    number = torch.arange(32)
    columns = {"group": number // 2, "place": number % 2, "similarity": (number // 4 % 2).double()}
    if not scored:
        columns["similarity"] = torch.full((32,), NONE)
    for name, values in columns.items():
        data = data.add_column(name, values.tolist())

    def loss_of(net) -> float:
        given = {name: torch.as_tensor(values) for name, values in columns.items()}
        said = predict(net.eval(), data).logits
        return pair_loss(said, **given, same=torch.eye(32, dtype=torch.bool)).item()

    method = {"keep": 0.6, "at": (0,)}
    paired = made(tmp_path / "a", TopK(**method), steps=60, train_dataset=data)
    for batch in paired.get_train_dataloader():
        assert all((batch["group"] == one).sum() == 2 for one in batch["group"])
    alone = made(tmp_path / "b", TopK(**method), steps=60, train_dataset=data.remove_columns([*columns]))
    before = loss_of(paired.model)
    paired.train()
    alone.train()
    assert loss_of(paired.model) < 0.7 * min(before, loss_of(alone.model))
