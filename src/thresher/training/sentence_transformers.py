"""The Trainers of sentence-transformers, for pruned models: their losses, the method's beside them, and its budget.

The library need not be installed: a mixin stands before the Trainer that a user has.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..api import inner_model, prune
from ..core.compat import SentenceTrainerNames, prepared_texts
from ..core.pruner import Batch, Record, pruner_of
from .trainer import Pruning, ranking_of


class PruningMixin(SentenceTrainerNames, Pruning):
    """Add a method's loss and budget to a Trainer of sentence-transformers; a base class before it.

    A step may run the model several times, on queries and on documents. The method's loss is the mean over these runs.

    Args:
        calibration_texts: texts, or pairs for a CrossEncoder, on which the budget is kept, never of a test part.
        teacher: a dense model of the same kind, whose last layer ranks the tokens for methods that distil a ranking.
        pruner_lr, soft_steps: as of ``PruningTrainer``.

    Raises:
        ValueError: the model is not pruned, there are no texts to calibrate on, or a teacher is missing or pruned; (in
            a step) the loss keeps no gradients of its forwards.

    Example:
        >>> class Trainer(PruningMixin, SentenceTransformerTrainer):
        ...     pass
        >>> prune(model, ToP(target_flops=0.5, rank_weight=0.0))
        >>> Trainer(model, args, pairs, loss=MultipleNegativesRankingLoss(model), calibration_texts=texts).train()
    """

    def __init__(
        self,
        *args: Any,
        calibration_texts: list,
        teacher: nn.Module | None = None,
        pruner_lr: float | None = None,
        soft_steps: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.begin(pruner_lr, soft_steps)
        if self.args.world_size > 1 and [*self.pruner.parameters()]:
            raise ValueError(
                f"{self.pruner.name} has parameters of its own, which this mixin trains in one process alone: take "
                "thresher train, EmbedTrainer or RerankTrainer"
            )
        if not calibration_texts:
            raise ValueError("calibration_texts is empty: the budget is kept on some texts that are not tested")
        if self.pruner.ranks_teacher and teacher is None:
            raise ValueError(f"{self.pruner.name} distils a teacher's ranking: pass teacher=, the dense model")
        if teacher is not None and pruner_of(inner_model(teacher)) is not None:
            raise ValueError("the teacher is pruned: unprune(teacher)")
        self.calibration_texts = calibration_texts
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(self.args.device)

    def calibration_batches(self, rows: int | None) -> Iterable[Batch]:
        """Arguments of the transformers model for (``rows`` of) the calibration texts."""
        total, size = len(self.calibration_texts), self.args.eval_batch_size
        count = total if rows is None else min(rows, total)
        texts = [self.calibration_texts[i * total // count] for i in range(count)]
        return [prepared_texts(self.model, texts[i : i + size]) for i in range(0, count, size)]

    def saved_model(self, folder: str) -> nn.Module:
        """The model of a checkpoint, pruned as it was."""
        return prune(type(self.model)(folder, device="cpu"))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Add the method's loss to that of the Trainer."""
        calls: list[tuple[Record, Batch]] = []
        with self.pruner.attached().asking(calls=calls):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if model.training and calls:
            loss = loss + torch.stack([torch.as_tensor(self.loss_of(*call)) for call in calls]).mean()
            self.reached["flops_fraction"] = sum(r.used.detach() for r, _ in calls) / sum(r.dense for r, _ in calls)
        return (loss, outputs) if return_outputs else loss

    def loss_of(self, record: Record, arguments: Batch) -> Any:
        """The method's loss on one run of the model."""
        net, arguments = inner_model(self.model), {k: v for k, v in arguments.items() if v is not None}
        if self.pruner.soft and not record.used.requires_grad:
            raise ValueError(
                f"this loss runs the model without gradients, in which {self.pruner.name} cannot learn what to drop: "
                "take one that does not cache them"
            )
        answers = None
        if self.pruner.ranks_teacher:
            with torch.no_grad():
                inner_model(self.teacher)(**arguments)
            answers = {"ranking": ranking_of(inner_model(self.teacher), arguments)}
        return self.pruner.loss(partial(self._again, net, arguments), arguments, record, answers)

    @staticmethod
    def _again(net: nn.Module, arguments: Batch, **override: Any) -> Any:
        return net(**{**arguments, **override})
