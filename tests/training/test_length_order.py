"""Rows in batches of near lengths, which come in no order of lengths."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.stats import spearmanr
from transformers import TrainingArguments

from support.families import FAMILIES
from support.training import collate, rows
from thresher import TopK, prune
from thresher.training.batches import LengthOrder
from thresher.training.trainer import FineTuner, PruningTrainer

LENGTHS = torch.randint(5, 200, (1003,), generator=torch.Generator().manual_seed(0)).tolist()


def batches(order: LengthOrder, size: int) -> list[list[int]]:
    drawn = [*order]
    return [drawn[i : i + size] for i in range(0, len(drawn), size)]


def test_each_row_comes_once_and_the_smaller_batch_last():
    found = batches(LengthOrder(LENGTHS, 16), 16)
    assert sorted(row for batch in found for row in batch) == [*range(1003)]
    assert [len(batch) for batch in found] == [16] * 62 + [11]


@pytest.mark.parametrize("window, most", [(50, 1.04), (8, 1.15), (1, 2.2)])
def test_batches_are_of_near_lengths(window, most):
    found = batches(LengthOrder(LENGTHS, 16, window), 16)
    padded = sum(max(LENGTHS[row] for row in batch) * len(batch) for batch in found)
    assert padded <= most * sum(LENGTHS)


def test_lengths_do_not_rise_or_fall():
    """One batch says nothing of the length of the next."""
    torch.manual_seed(0)
    order = LengthOrder(LENGTHS, 16)
    for _ in range(3):
        means = [sum(LENGTHS[row] for row in batch) / len(batch) for batch in batches(order, 16)[:-1]]
        assert abs(spearmanr(means[:-1], means[1:]).statistic) < 0.35
        assert abs(spearmanr(means, range(len(means))).statistic) < 0.35


def test_the_order_is_drawn_again_and_anew():
    order = LengthOrder(LENGTHS, 16)
    torch.manual_seed(3)
    first, second = [*order], [*order]
    torch.manual_seed(3)
    assert first == [*order] != second


@pytest.mark.parametrize("lengths, size, window", [([], 1, 1), ([3], 0, 1), ([3], 1, 0)])
def test_nothing_to_order(lengths, size, window):
    with pytest.raises(ValueError, match="expected rows, and 1 or more of both"):
        LengthOrder(lengths, size, window)


@pytest.mark.parametrize("kind", [FineTuner, PruningTrainer])
def test_trainers_use_it_where_they_are_asked_to(kind, tmp_path):
    model, padded = FAMILIES["bert"].build(), {}
    if kind is PruningTrainer:
        prune(model, TopK(keep=0.5))
    for strategy in ("group_by_length", "random"):
        args = TrainingArguments(
            str(tmp_path),
            train_sampling_strategy=strategy,
            per_device_train_batch_size=8,
            use_cpu=True,
            report_to=[],
            dataloader_pin_memory=False,
        )
        seen = [batch["input_ids"] for batch in kind(model, args, collate, rows(64)).get_train_dataloader()]
        assert len(seen) == 8
        padded[strategy] = sum(batch.numel() for batch in seen)
    assert padded["group_by_length"] < 0.9 * padded["random"]


def test_a_resumed_training_goes_on_with_the_rows_that_are_left(tmp_path):
    seen: list[list[int]] = []

    def noting(batch: list[dict]) -> dict:
        seen.append([row["number"] for row in batch])
        return collate([{name: value for name, value in row.items() if name != "number"} for row in batch])

    def trainer(**options) -> PruningTrainer:
        args = TrainingArguments(
            str(tmp_path),
            train_sampling_strategy="group_by_length",
            per_device_train_batch_size=8,
            max_steps=8,
            save_steps=4,
            save_strategy="steps",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        data = rows(64).add_column("number", [*range(64)])
        return PruningTrainer(prune(FAMILIES["bert"].build(), TopK(keep=0.5)), args, noting, data)

    trainer().train()
    whole = seen[-8:]
    seen.clear()
    trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert seen[-4:] == whole[4:] and sorted(itertools.chain(*whole)) == [*range(64)]
