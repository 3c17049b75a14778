"""Silence: what nobody says takes few tokens."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.architecture import Architecture
from ..core.pruner import EARLY, Choice
from ..core.view import View
from .atome import AToMe

TENFOLD = math.log(10)
STEP = 4  # powers of ten of a step of Whisper's spectrogram, which holds (log10 power + 4) / 4


class Silence(AToMe):
    """Merge silent frames before the first layer, then neighbours (A-ToMe; Li, Wu, Li and Liu, 2023); for encoders of
    Whisper's kind, whose window of 30 seconds is mostly silence where people say a sentence. The first part is our own.

    A frame is silent that is ``below`` decibels under the loudest one of its window. Frames within ``margin`` of one
    that is not are left alone: quiet beginnings and ends of words, and the pause by which the decoder knows that a
    sentence is over. Each ``group`` silent frames in a row become one token, the mean of their states, and keys weigh
    by its size, so that attention sees as much silence as before. After the last layer it is put back in all their
    places: the decoder reads as many frames as ever. A window without silence, as one of steady noise, is left alone.

    Args:
        r: what ``AToMe`` merges of the rest in each layer. Default: nothing.
        below: decibels under the loudest frame.
        margin: tokens, of 20 ms, on either side of what is not silent.
        group: silent tokens that become one; None: they leave, and are put back as they were before the first layer,
            which the decoder has never seen.
        at: -1 and layers; default: with every layer where ``r`` is given.

    | paper | here | why |
    |---|---|---|
    | silence is merged as all else, half of it in a layer | before the first layer, by what can be heard | there it costs no layer; Whisper fills every sound up to 30 seconds |
    | any two neighbours | what stands for silence is not merged with sound | its size would outweigh the sound |
    """

    r: float | int | tuple = 0
    below: float = 40.0
    margin: int = 10
    group: int | None = 50

    name: ClassVar[str] = "silence"
    enters: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.below > 0:
            raise ValueError(f"below={self.below}: expected decibels above 0")
        for name, least in (("margin", 0), ("group", 2)):
            own = getattr(self, name)
            if own is None and name == "group":
                continue
            if not isinstance(own, int) or own < least:
                raise ValueError(f"{name}={own!r}: expected a number of tokens, from {least} up")

    def default_at(self, model: Architecture) -> tuple[int, ...]:
        return (EARLY,) if self.r == 0 else (EARLY, *super().default_at(model))

    def build(self, model: Architecture) -> None:
        base = model.base
        if base is not None and not (base.main_input_name == "input_features" and hasattr(base.config, "num_mel_bins")):
            raise ValueError(
                f"silence is not possible with {model.name}: it listens to the spectrogram of an encoder of Whisper's "
                "kind (input_features); choose tome or topk"
            )
        if self.sites[:1] != (EARLY,):
            raise ValueError(f"at={list(self.sites)}: silence is merged before the first layer, at={EARLY}")
        super().build(model)

    def keeps_all(self, site: int) -> bool:
        return site > 0 and super().keeps_all(site)

    def silent(self, view: View) -> Tensor:
        """Find (B, N) bool, the live tokens that are silent and not protected."""
        spectrum, count = view.spectrum.float(), view.tokens.width
        decibels = torch.logsumexp(spectrum * (STEP * TENFOLD), 1) * (10 / TENFOLD)  # (B, T), but for a constant
        loudness = decibels.unflatten(1, (count, -1)).amax(2)
        heard = loudness >= loudness.amax(1, keepdim=True) - self.below
        near = F.max_pool1d(heard[:, None].float(), 2 * self.margin + 1, 1, self.margin)[:, 0] > 0
        return ~near.gather(1, view.tokens.index) & view.alive & ~view.protected

    def free(self, view: View) -> Tensor:
        return super().free(view) & ~self.silent(view)

    def score_and_choose(self, view: View) -> tuple[Tensor, Choice]:
        if view.layer != EARLY:
            return super().score_and_choose(view)
        silent = self.silent(view)
        score = 1.0 - silent.float()
        if self.group is None:
            return score, Choice(view.alive & ~silent)
        slots = torch.arange(silent.shape[1], device=silent.device).expand_as(silent)
        begins = silent & ~F.pad(silent[:, :-1], (1, 0))
        place = (slots - torch.where(begins, slots, 0).cummax(1).values) % self.group
        holder = torch.where(silent, slots - place, slots)
        return score, Choice(view.alive & (holder == slots), into=holder)
