"""Train a pruned reranker: the order that its teacher gives a query's candidates."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from ..methods.parts.distillation import margin_loss, order_loss, scores_of
from .batches import QueryBatches
from .trainer import PruningTrainer

ROW = "row"  # the column with the number of a row's query
LOSSES = {"margin": margin_loss, "order": order_loss}


class RerankTrainer(PruningTrainer):
    """Train a pruned model that scores pairs of a query and a candidate, as ``PruningTrainer`` does; it learns how its
    teacher orders the candidates of each query, and keeps them in one batch.

    The data set has a column ``row``, the number of the query. The model gives one logit, or two, of which the second
    means relevant.

    Args:
        teaching: "margin", the differences between candidates (``margin_loss``), or "order", their shares
            (``order_loss``).
        tokens: padded tokens of a batch, at most; default: any.

    Raises:
        ValueError: no such loss, or rows without the number of their query.
    """

    def __init__(self, *args, teaching: str = "margin", tokens: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if teaching not in LOSSES:
            raise ValueError(f"there is no loss {teaching!r}: expected {' or '.join(LOSSES)}")
        self.teaching, self.tokens = teaching, tokens
        for data in filter(None, (self.train_dataset, self.eval_dataset)):
            if ROW not in data.column_names:
                raise ValueError(f"rows have the columns {', '.join(data.column_names)}: expected {ROW!r}, the query's")

    def extra_columns(self) -> set[str]:
        return {*super().extra_columns(), ROW}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        self.queries = inputs.pop(ROW)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def distilled(self, outputs: Any, answers: Any, mask: Any) -> torch.Tensor:
        student, teacher = (scores_of(said["logits"]) for said in (outputs, answers))
        return LOSSES[self.teaching](student, teacher, self.queries)

    def get_train_dataloader(self) -> DataLoader:
        """Make the batches of ``QueryBatches``."""
        return self._batched(self.train_dataset, self.args.train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Make such batches in a fixed order: a loss says nothing of candidates whose rivals lie elsewhere."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._batched(data, self.args.eval_batch_size, drawn=False)

    def _batched(self, data: Any, size: int, drawn: bool = True) -> DataLoader:
        args, data = self.args, cast("Any", self.used_columns(data))
        lengths = [len(ids) for ids in data["input_ids"]]
        batches = QueryBatches([*data[ROW]], lengths, size, self.tokens, args.seed, drawn)
        workers: Any = {"num_workers": args.dataloader_num_workers, "pin_memory": args.dataloader_pin_memory}
        return self.accelerator.prepare(
            DataLoader(data, batch_sampler=batches, collate_fn=self.data_collator, **workers)
        )
