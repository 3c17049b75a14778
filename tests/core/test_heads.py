"""ToP under every head that it is trained with: classes, a number, spans, and a label for each token."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    TrainingArguments,
)

from support.families import NO_DROPOUT, TEXT
from thresher import PruningTrainer, ToP, dense, prune
from thresher.training.trainer import distillation

CONFIG = TEXT | NO_DROPOUT | {"num_hidden_layers": 3, "initializer_range": 0.2}
LENGTHS = (20, 12, 16, 8)
HEADS = {
    "classes": (BertForSequenceClassification, {"num_labels": 3}, lambda n: {"labels": n % 3}),
    "number": (BertForSequenceClassification, {"num_labels": 1}, lambda n: {"labels": n / 10}),
    "spans": (BertForQuestionAnswering, {}, lambda n: {"start_positions": n % 5, "end_positions": n % 5 + 2}),
    "tokens": (BertForTokenClassification, {"num_labels": 4}, lambda n: {"labels": [i % 4 for i in range(n)]}),
}


def rows(label) -> list[dict]:
    made = []
    for i in range(16):
        n = LENGTHS[i % 4]
        ids = torch.randint(5, 97, (n,), generator=torch.Generator().manual_seed(i)).tolist()
        made.append({"input_ids": ids, **label(n)})
    return made


def collate(batch: list[dict]) -> dict:
    """Pads ids with 0 and labels of tokens with -100."""
    width = max(len(row["input_ids"]) for row in batch)
    made = {"attention_mask": [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch]}
    for name in batch[0]:
        fill = 0 if name == "input_ids" else -100
        made[name] = [
            row[name] + [fill] * (width - len(row[name])) if isinstance(row[name], list) else row[name] for row in batch
        ]
    return {name: torch.tensor(values) for name, values in made.items()}


@pytest.mark.parametrize("head", HEADS)
def test_top_trains_and_answers_at_every_place(head, tmp_path):
    kind, options, label = HEADS[head]
    torch.manual_seed(0)
    teacher, model = (kind(BertConfig(**CONFIG, **options)) for _ in range(2))
    model.load_state_dict(teacher.state_dict())
    prune(model, ToP(target_flops=0.7, bins=8))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=8, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    made = PruningTrainer(model, arguments, collate, rows(label), teacher=teacher)
    made.train()
    assert made.reached["flops_fraction"] == pytest.approx(0.7, rel=0.03)
    batch = collate(rows(label)[:4])
    with torch.no_grad():
        found, packed = model.eval()(**batch), model.token_pruner.report
        with dense(model):
            whole = model(**batch)
    for name, value in whole.items():
        assert found[name].shape == value.shape and torch.isfinite(found[name]).all()
    assert packed[-1]["tokens_kept"] < packed[0]["tokens_in"]


def test_padding_teaches_no_labels_of_tokens():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 4, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    found = distillation({"logits": student}, {"logits": teacher}, mask=mask)
    there = distillation({"logits": student[mask.bool()]}, {"logits": teacher[mask.bool()]})
    assert found.item() == pytest.approx(there.item(), rel=1e-6)
    changed = teacher.clone()
    changed[0, 3:] = 9.0
    assert distillation({"logits": student}, {"logits": changed}, mask=mask) == found
