"""Choose so that gradients can pass: hard concrete variables, rounding straight through, and ascent by reversal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.tokens import CLOSED

LOW, HIGH, BETA = -0.1, 1.1, 2 / 3  # the hard concrete distribution: its stretch and its temperature


def odds(chance: float) -> float:
    """Compute the parameter of a hard concrete variable that is above 0 with this ``chance``."""
    return math.log(chance / (1 - chance)) + BETA * math.log(-LOW / HIGH)


def chance(odds: Tensor) -> Tensor:
    """Compute the chance of a hard concrete variable to be above 0, of its log odds."""
    return (odds - BETA * math.log(-LOW / HIGH)).sigmoid()


def sample(odds: Tensor) -> Tensor:
    """Draw hard concrete variables in [0, 1] of the shape of their log ``odds`` (Louizos et al., 2018, eq. 10-11)."""
    noise = torch.rand_like(odds).clamp(1e-6, 1 - 1e-6)
    return (((noise.logit() + odds) / BETA).sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def rounded(soft: Tensor) -> Tensor:
    """Round up: 1 where ``soft`` is above 0, else 0; its gradient is that of ``soft`` (straight through)."""
    return (soft > 0).float() + soft - soft.detach()


def log_gate(open_by: Tensor) -> Tensor:
    """Compute the logarithm of gates that are open where their log odds ``open_by`` are not below 0, else closed
    (CLOSED). The gradient of a gate is that of the sigmoid (straight through)."""
    gate = open_by.sigmoid()
    return (gate + (open_by >= 0).float() - gate.detach() + CLOSED).log()


def gumbel(odds: Tensor) -> Tensor:
    """Add to log ``odds`` the difference of two Gumbel variables: above 0 with the chance that they say."""
    return odds + torch.rand_like(odds).clamp(1e-6, 1 - 1e-6).logit()


class Ascend(torch.autograd.Function):
    """Pass a value on and reverse its gradient, so that an optimiser that descends makes it ascend."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return -gradient
