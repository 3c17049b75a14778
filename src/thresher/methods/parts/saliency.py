"""What policies and predictors learn from: the task loss of each text, and how much it would miss each token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.pruner import RunAgain, TokenPruner
from ...core.view import View
from .distillation import LOGITS, NEVER


def saliency(pruner: TokenPruner, forward: RunAgain) -> list[Tensor]:
    """Measure per site (B, N) how much the task loss of the whole text changes as a token fades, to first order.

    The saliency is the absolute derivative of the loss by the logarithm of the token's gate at that site, with all
    gates open. The gate acts on the key in all later attention, and on the state where a head reads every token: this
    is gradient times input with the gate as input. N is the width of the batch, since nothing leaves. ``forward()``
    runs the model, which is in training mode, on a batch with labels.

    Raises:
        ValueError: the batch has no labels.
    """
    gates: list[Tensor] = []

    def open_all(score: Tensor, view: View) -> Tensor:
        gates.append(torch.zeros(view.alive.shape, device=view.alive.device, requires_grad=True))
        return gates[-1]

    record = pruner.record
    try:
        with torch.enable_grad(), pruner.attached().asking(gates=open_all):
            loss = forward().get("loss")
            if loss is None:
                raise ValueError(f"{pruner.name} learns from gradients of the task loss: give labels with every batch")
            gradients = torch.autograd.grad(loss, gates, allow_unused=True)
    finally:
        pruner.record = record
    return [torch.zeros_like(x) if g is None else g.abs() for x, g in zip(gates, gradients, strict=True)]


def answer_saliency(pruner: TokenPruner, forward: RunAgain, mask: Tensor | None = None) -> Tensor:
    """Measure (B, N) how much the answer of a model hangs on each token: as ``saliency``, at the first site, of the
    logit of the class that it answers, of its one number, or of the best start and end. No labels are read.

    Args:
        forward: runs the model, whose ``pruner`` has a site.
        mask: (B, N), the tokens that are there; default: all.

    Raises:
        ValueError: the model gives no logits.
    """

    def answer() -> dict[str, Tensor]:
        output, best = forward(), []
        for name in (name for name in LOGITS if name in output):
            logits = output[name].float()
            if mask is not None and name != "logits":
                logits = logits.masked_fill(mask == 0, NEVER)
            most = logits.amax(-1)
            best.append((most * mask if mask is not None and most.dim() == 2 else most).sum())
        if not best:
            raise ValueError(
                "ranking='saliency' asks what the teacher's logits hang on, and it gives none: leave it out"
            )
        return {"loss": torch.stack(best).sum()}

    return saliency(pruner, answer)[0]


def task_losses(output: Mapping[str, Any], batch: Mapping[str, Any], causal: bool = False) -> Tensor:
    """Split the task loss: (B,), that of each text, from a model's ``output`` and the labels in ``batch``.

    Raises:
        ValueError: no labels, or a head whose loss is none of these: one class, one number, classes of tokens (not in a
            ``causal`` model, whose labels may be those of the next token), the ends of an answer.
    """
    names = (("start_logits", "start_positions"), ("end_logits", "end_positions"), ("logits", "labels"))
    heads = [
        (output[logits].float(), batch[labels]) for logits, labels in names if logits in output and labels in batch
    ]
    if not heads:
        raise ValueError("the reward is the task loss of each text: give labels with every batch")
    losses = []
    for logits, labels in heads:
        classes = logits.shape[:-1] == labels.shape and not labels.is_floating_point()
        if logits.dim() == 2 and logits.shape[1] == 1:
            losses.append((logits[:, 0] - labels.view(-1).float()) ** 2)
        elif classes and not (causal and logits.dim() == 3):
            each = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view(len(labels), -1)
            losses.append(each.sum(1) / (labels.view(len(labels), -1) != -100).sum(1).clamp(min=1))
        else:
            raise ValueError(
                f"no loss of single texts is known for logits {tuple(logits.shape)} and labels {tuple(labels.shape)}"
                f"{' of a decoder' if causal else ''}: expected a class or a number per text, classes of an encoder's "
                "tokens or the ends of an answer"
            )
    return torch.stack(losses).mean(0)
