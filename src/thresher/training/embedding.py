"""Train a pruned embedder: its teacher's vectors, and what is known of pairs.

Shapes: B texts of a batch, C components of a vector.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.task import PAIRED
from ..methods.parts.distillation import embedding_loss
from .batches import QueryBatches
from .trainer import TAUGHT, PruningTrainer

VECTOR = "sentence_embedding"  # of an embedder's output
SCALE = 20.0  # of cosines, the usual one of these losses


class EmbedTrainer(PruningTrainer):
    """Train a pruned ``Embedder``, as ``PruningTrainer`` does; it learns its teacher's vectors by ``embedding_loss``.

    The teacher is another ``Embedder``, or a column ``teacher_sentence_embedding`` of its vectors. A data set with the
    columns of ``PAIRED`` (``load_texts(pairs=True)``) has pairs: a batch then holds whole ones, and ``pair_loss`` has
    the weight 1 - ``distill``. Without a teacher it is all there is. Other labels are not read.
    """

    pairs: dict[str, Tensor] | None = None  # of the batch that is learned from

    def extra_columns(self) -> set[str]:
        return {*super().extra_columns(), *PAIRED}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        known = {name: value for name, value in inputs.items() if name not in {*self.labels, *PAIRED}}
        self.pairs = {name: inputs[name] for name in PAIRED} if PAIRED[0] in inputs and model.training else None
        return super().compute_loss(model, known, return_outputs, num_items_in_batch)

    def taught_columns(self) -> dict[str, str]:
        return {**TAUGHT, f"teacher_{VECTOR}": VECTOR}

    def taught_loss(self, task: Any, outputs: Any, answers: Any, inputs: dict) -> Any:
        taught = embedding_loss(outputs[VECTOR], answers[VECTOR]) if VECTOR in answers else None
        if self.pairs is None:
            return taught
        ids = inputs["input_ids"]
        same = (ids[:, None] == ids[None]).all(-1)
        own = pair_loss(outputs[VECTOR], **self.pairs, same=same)
        return own if taught is None else (1 - self.distill.answers) * own + self.distill.answers * taught

    def get_train_dataloader(self) -> DataLoader:
        """Make batches of whole pairs where there are any."""
        data: Any = self.train_dataset
        if PAIRED[0] not in getattr(data, "column_names", ()):
            return super().get_train_dataloader()
        lengths = [len(ids) for ids in data["input_ids"]]
        batches = QueryBatches([*data[PAIRED[0]]], lengths, self.args.train_batch_size, seed=self.args.seed)
        used: Any = self.used_columns(data)
        return self.accelerator.prepare(DataLoader(used, batch_sampler=batches, collate_fn=self.data_collator))


def pair_loss(vectors: Tensor, group: Tensor, place: Tensor, similarity: Tensor, same: Tensor) -> Tensor:
    """Compute how far vectors (B, C) are from what is known of pairs, a scalar: the sum of two losses, each 0 where the
    batch has nothing for it.

    * Pairs of a known similarity: log(1 + sum of exp(scale * (cosine of j - cosine of i))) over the pairs i that are
      more similar than the pairs j (CoSENT, Su 2022). Only the order of the similarities counts.
    * Pairs that are near: the cross entropy of each first text's own second text among all second and further ones of
      the batch, softmax(scale * cosine), as in MultipleNegativesRankingLoss (after Henderson et al., 2017).

    Args:
        group, place, similarity: (B,) as ``load_texts`` has them.
        same: (B, B) which texts are equal: a copy of a text is nothing that the text should be away from.
    """
    vectors = F.normalize(vectors.float(), dim=-1)
    first, second = (place == 0).nonzero()[:, 0], (place == 1).nonzero()[:, 0]
    match = group[first][:, None] == group[second][None]
    whole, place_of = match.any(1), match.nonzero()[:, 1]
    first, second = first[whole], second[place_of]
    cosines = (vectors[first] * vectors[second]).sum(-1)
    known = ~similarity[first].isnan()
    value, near = similarity[first][known], SCALE * cosines[known]
    wrong = (near[None] - near[:, None])[value[:, None] > value[None]]
    loss = torch.logsumexp(torch.cat([wrong.new_zeros(1), wrong]), 0) if len(wrong) else 0.0 * vectors.sum()
    anchors, targets = first[~known], second[~known]
    others = ((place > 0) & similarity.isnan()).nonzero()[:, 0]
    if len(anchors) == 0 or len(others) < 2:
        return loss
    logits = SCALE * vectors[anchors] @ vectors[others].T
    own = others[None] == targets[:, None]
    copies = (same[targets][:, others] | same[anchors][:, others]) & ~own
    return loss + F.cross_entropy(logits.masked_fill(copies, -torch.inf), own.int().argmax(1))
