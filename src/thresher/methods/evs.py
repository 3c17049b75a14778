"""EVS: keep the tokens of a clip that differ from the frame before."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.view import View
from .parts.pictures import Pictures
from .parts.visual import Visual, directions

FIRST = 3.0  # above any distance: of the first frame all tokens come first


class EVS(Visual):
    """Keep the tokens of a clip that differ most from the same place of the frame before (Bagrov et al., "Efficient
    Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference", 2025); needs no training.

    The score is 1 minus the cosine of a token with the one at its place in the frame before. All tokens of the first
    frame come first, and no fewer than these are kept. Frames, rows and columns are told by the positions that a model
    of the Qwen-VL kind gives its tokens; a model whose positions say nothing of frames is refused.

    Args:
        keep: of each clip, a share of its tokens or a count.
        modality: default: "video".

    | paper | here | why |
    |---|---|---|
    | tokens keep their positions or are renumbered | positions stay | renumbered ones move what is in the picture |
    | a share of the pixels' or the states' differences | of the states' | they are what is there |
    """

    keep: float | int | str | tuple = 0.5

    name: ClassVar[str] = "evs"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.modality = "video" if self.modality is None else self.modality

    def order(self, pictures: Pictures, view: View, counts: Tensor, protected: Tensor) -> Tensor:
        places = view.places
        if places is None:
            raise ValueError(
                f"{self.name} compares the frames of a clip, and {self.architecture.name} does not say which token is "
                "of which frame; divprune and grid ask for no frames"
            )
        x, order = directions(pictures, view), torch.zeros_like(pictures.real, dtype=torch.float32)
        frames = pictures.take(places[0])
        for row, length in enumerate(pictures.lengths.tolist()):
            first = int((frames[row, :length] == frames[row, 0]).sum())
            order[row, :first] = FIRST
            if length == first:
                raise ValueError(f"{self.name} compares the frames of a clip, and one of this prompt has but one")
            if length % first:
                raise ValueError(f"{self.name} compares frames of one size, and those of a clip have several")
            clip = x[row, :length].view(-1, first, x.shape[-1])
            order[row, first:length] = 1 - F.cosine_similarity(clip[1:], clip[:-1], dim=-1).flatten()
            counts[row] = torch.maximum(counts[row], counts.new_tensor(first))
        return order
