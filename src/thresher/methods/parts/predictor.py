"""The perceptron by which AdapLeR and TR-BERT judge a token's state, and its price."""

from __future__ import annotations

import torch
from torch import nn

HIDDEN = 32  # channels between the two layers, in both papers


def perceptron(size: int, draw: torch.Generator, start: float = 0.0) -> nn.Sequential:
    """Make a map of states (..., ``size``) to one number each, (..., 1), near ``start`` at the start."""
    first, last = nn.Linear(size, HIDDEN), nn.Linear(HIDDEN, 1)
    for linear in (first, last):
        nn.init.normal_(linear.weight, std=0.02, generator=draw)
        nn.init.zeros_(linear.bias)
    nn.init.constant_(last.bias, start)
    return nn.Sequential(first, nn.GELU(), last)


def perceptron_macs(size: int) -> int:
    """Count the MACs of a perceptron for each token."""
    return size * HIDDEN + HIDDEN
