"""Measure how far the answers of a model are from those of its teacher. Needs torch only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS = ("logits", "start_logits", "end_logits")
NEVER = -1e4  # the logit of a token that is not there


def distillation(student: Any, teacher: Any, temperature: float = 2.0, mask: Tensor | None = None) -> Tensor:
    """Compute a scalar: how far the student's answers are from the teacher's; both are model outputs or dictionaries of
    logits.

    T^2 KL(teacher || student) at temperature T (Hinton et al., 2015), the mean over the batch and over the heads; the
    squared difference for a regression head of one number. ``mask`` (B, N): the tokens that are there, among which a
    head that points at a token chooses, and of which one that labels tokens is asked.
    """
    losses = []
    for name in LOGITS:
        if name not in student or name not in teacher:
            continue
        s, t = student[name].float(), teacher[name].float()
        if mask is not None and name != "logits":
            s, t = (x.masked_fill(mask == 0, NEVER) for x in (s, t))
        elif mask is not None and s.dim() == 3:
            s, t = s[mask != 0], t[mask != 0]
        if s.shape[-1] == 1:
            losses.append(F.mse_loss(s, t))
        else:
            s, t = (x.flatten(0, -2) / temperature for x in (s, t))
            losses.append(temperature**2 * F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean"))
    if not losses:
        raise ValueError(f"nothing to distil: the outputs hold none of {', '.join(LOGITS)}")
    return torch.stack(losses).mean()
