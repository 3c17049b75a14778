"""Rows of known lengths and a pruned model to time on them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset

from support.families import FAMILIES
from thresher import TopK, prune

LENGTHS = (5, 19, 3, 24, 11, 7, 16, 9, 24, 4, 13, 21, 6, 2, 18, 10)


def rows(lengths=LENGTHS, labels: str | None = "classes", columns=("input_ids", "attention_mask", "token_type_ids")):
    generator = np.random.default_rng(0)
    made = {
        "input_ids": [generator.integers(5, 97, n).tolist() for n in lengths],
        "attention_mask": [[1] * n for n in lengths],
        "token_type_ids": [[0] * n for n in lengths],
    }
    made = {name: made[name] for name in columns}
    if labels:
        made["labels"] = [i % 3 for i in range(len(lengths))] if labels == "classes" else [n / 7 for n in lengths]
    return Dataset.from_dict(made)


def task():
    return SimpleNamespace(name="synthetic", metric="accuracy", selected_on="nothing")  # what measure() asks of a Task


def pruned(family="bert", method=None, layout="auto", **options):
    return prune(FAMILIES[family].build(**options), method or TopK(keep=0.5, at=(0, 2)), layout=layout)


def one_by_one(model, data):
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits for ids in data["input_ids"]])


def hooks_of(net) -> int:
    """Hooks on the modules of a model, and attention functions of ours."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    hooks = sum(len(getattr(module, kind)) for module in net.modules() for kind in kinds)
    return hooks + (net.config._attn_implementation != FAMILIES["bert"].build().config._attn_implementation)
