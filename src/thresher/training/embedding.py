"""Train a pruned embedder: the vectors that its teacher gives, and how near they are to each other."""

from __future__ import annotations

from typing import Any

from ..methods.parts.distillation import embedding_loss
from .trainer import TAUGHT, PruningTrainer

VECTOR = "sentence_embedding"  # of an embedder's output


class EmbedTrainer(PruningTrainer):
    """Train a pruned ``Embedder``, as ``PruningTrainer`` does; it learns its teacher's vectors by ``embedding_loss``.

    The teacher is another ``Embedder``, or a column ``teacher_sentence_embedding`` of its vectors. No label is read.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        known = {name: value for name, value in inputs.items() if name not in self.labels}
        return super().compute_loss(model, known, return_outputs, num_items_in_batch)

    def taught_columns(self) -> dict[str, str]:
        return {**TAUGHT, f"teacher_{VECTOR}": VECTOR}

    def taught_loss(self, task: Any, outputs: Any, answers: Any, inputs: dict) -> Any:
        return embedding_loss(outputs[VECTOR], answers[VECTOR]) if VECTOR in answers else None
