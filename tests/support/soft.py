"""A tiny model in a soft stage."""

from __future__ import annotations

import torch

from support.families import FAMILIES
from thresher import prune

BERT = FAMILIES["bert"]


def batch(lengths=(9, 6, 7)) -> dict:
    return BERT.batch(lengths) | {"labels": torch.tensor([0, 2, 1])}


def learning(method, model=None, progress: float = 0.1):
    """(model, method) in the first stage of a training."""
    model = prune(model or BERT.build(), method).train()
    method.progress = progress
    return model, method


def loss_of(model, method, inputs: dict):
    """The method's loss after a forward of the model."""
    model(**inputs)
    return method.loss(lambda **new: model(**{**inputs, **new}), inputs, method.record)
