"""Every private name of transformers, accelerate and torch that Thresher relies on, with the version it was seen in.

One test per name (tests/core/test_compat.py) says that it is still there and still means this, so that a release that
moves one is a single red line with the name of the thing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


# --- the Trainer: transformers 5.17 and 5.23 --------------------------------------------------------------------------
class TrainerNames:
    """Give names of our own to what a Trainer keeps private; a base class before ``Trainer``."""

    loss_is_scaled_for_ga = False  # 5.23: the loss is a mean over a batch, not over the batches that are accumulated

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # 5.17: the same

    def extra_columns(self) -> set[str]:
        """The columns of a data set that are kept, beside those that the model's forward takes."""
        return set()

    def may_be_best(self) -> bool:
        """Whether the model as it is may be the best one."""
        return True

    def used_columns(self, data: Any) -> Any:
        """The data set without the columns that nothing reads."""
        return self._remove_unused_columns(data)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list({*self._signature_columns, *self.extra_columns()})

    def _determine_best_metric(self, metrics: dict, trial: Any) -> bool:
        return self.may_be_best() and super()._determine_best_metric(metrics, trial)


TRAINER_STATE = "trainer_state.json"  # transformers.trainer.TRAINER_STATE_NAME: the last file of a checkpoint


# --- accelerate 1.15: what it puts away, and where it runs ------------------------------------------------------------
def load_offloaded(module: nn.Module) -> None:
    """Load the weights that accelerate has put away; it does so itself before a forward alone."""
    for part in module.modules():
        if any(tensor.is_meta for tensor in (*part.parameters(False), *part.buffers(False))):
            part._hf_hook.pre_forward(part)


def execution_device(model: nn.Module) -> torch.device | str | int:
    """The device that ``model`` runs on; where its weights are put away, accelerate's hooks say so."""
    for parameter in model.parameters():
        if not parameter.is_meta:
            return parameter.device
    devices = (getattr(getattr(part, "_hf_hook", None), "execution_device", None) for part in model.modules())
    return next((device for device in devices if device is not None), "cpu")


# --- torch 2.13: what a processor can do ------------------------------------------------------------------------------
def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """(n, m) int32: the product of int8 matrices (n, k) and (k, m). Raises RuntimeError where there is no kernel."""
    return torch._int_mm(x, weight)


def has_amx() -> bool:
    """Whether the processor has matrix instructions (AMX); False where torch does not say."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
