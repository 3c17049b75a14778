"""CDPruner: keep tokens that are relevant to the question, and not alike."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.view import View
from .parts.pictures import Pictures
from .parts.visual import Visual, cosines, directions

LEAST = 1e-12  # of what a token adds to the determinant


class CDPruner(Visual):
    """Keep the tokens of a picture that a determinantal point process, conditioned on the question, finds likeliest
    (Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
    2025); needs no training.

    The kernel is L = diag(r) S diag(r) of the cosines S of the states and the relevance r of each token, from 0 to 1
    within its picture. Tokens are taken greedily, each the one that makes det(L) of those taken largest, with one row
    of the Cholesky factor a step, O(n k^2).

    Args:
        keep: of each picture, a share of its tokens or a count.
        relevance: whether the text has a say; without it r is 1, and the tokens are the most diverse.
        at: default: before the first layer of the language model.

    | paper | here | why |
    |---|---|---|
    | relevance by CLIP's text tower | the mean cosine of a token and the text's input embeddings | checkpoints of language models hold no text tower |
    | minus the cosine | plus the cosine | CLIP's patches point away from its text; those of a language model do not |
    | smallest and largest relevance of the batch | of the picture | a picture answers in a batch as alone |
    | positions 0..k | positions stay | renumbered ones move what is in the picture |
    """

    keep: float | int | str | tuple = 0.1
    relevance: bool = True

    name: ClassVar[str] = "cdpruner"

    def order(self, pictures: Pictures, view: View, counts: Tensor, protected: Tensor) -> Tensor:
        x, free = directions(pictures, view), pictures.real.clone()
        r = self.relevances(x, pictures, view) if self.relevance else free.float()
        gain, taken, steps = r.square(), torch.zeros_like(r), int(counts.max())
        factor = x.new_zeros(steps, *r.shape)  # rows of the Cholesky factor
        for step in range(steps):
            best = gain.masked_fill(protected, float("inf")).masked_fill(~free, float("-inf")).argmax(1, keepdim=True)
            taken.scatter_(1, best, float(r.shape[1] - step))
            free.scatter_(1, best, False)
            before = factor[:step]
            at = before.gather(2, best.expand(step, -1, -1))
            row = r * r.gather(1, best) * cosines(x, best[:, 0]) - (before * at).sum(0)
            factor[step] = row / gain.gather(1, best).clamp(min=LEAST).sqrt()
            gain = (gain - factor[step].square()).clamp(min=0.0)
        return taken

    def relevances(self, x: Tensor, pictures: Pictures, view: View) -> Tensor:
        """(P, M), from 0 to 1: the mean cosine of each token with the text of its row; ``x`` (P, M, C) the
        directions of the tokens."""
        text = view.alive & ~pictures.visual
        words = F.normalize(view.hidden.float(), dim=-1) * text[..., None]
        mean = words.sum(1) / text.sum(1, keepdim=True).clamp(min=1)
        r = (x @ mean[pictures.rows][..., None])[..., 0]
        least = r.masked_fill(~pictures.real, float("inf")).amin(1, keepdim=True)
        most = r.masked_fill(~pictures.real, float("-inf")).amax(1, keepdim=True)
        return ((r - least) / (most - least).clamp(min=LEAST)) * pictures.real

    def macs(self, pictures: Pictures, counts: Tensor, width: int) -> Tensor:
        return pictures.lengths * counts * (width + counts) + pictures.lengths * width
