"""A model as one ExecuTorch program for phones: one text at a time, a method for each length, the weights once.

``forward_64`` takes tensors (1, 64); a text of fewer tokens is padded. An int8 program has int8 weights in its linear
layers, per channel, and in its embedding of words, per row; the rest computes in fp32.

Shapes: B batch, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig

from ..api import inner_model
from ..core.compat import executorch_methods, executorch_program
from ..core.view import Widths
from .shapes import filled, length_for, one_shape, row_of, spread

FILE = "model.pte"


def method_name(length: int) -> str:
    """Of the method for texts of up to so many tokens."""
    return f"forward_{length}"


class Int8Embedding(nn.Module):
    """An embedding with int8 weights, each row with a scale of its own."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        weight = embedding.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).to(self.scale.dtype) * F.embedding(ids, self.scale)


@contextmanager
def int8_embeddings(model: nn.Module) -> Iterator[None]:
    """Exchange the embedding of words within."""
    words = inner_model(model).get_input_embeddings()
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if child is words and type(child) is nn.Embedding  # a class of its own may scale
    ]
    try:
        for module, name, child in found:
            setattr(module, name, Int8Embedding(child))
        yield
    finally:
        for module, name, child in found:
            setattr(module, name, child)


class Written:
    """A program that was made and not yet saved."""

    def __init__(self, program: Any, config: Any):
        self.program, self.config = program, config

    def save_pretrained(self, folder: Path) -> None:
        """Write the program and the model's configuration."""
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / FILE, "wb") as file:
            self.program.write_to_file(file)
        self.config.save_pretrained(folder)


def lowered(model: Any, inputs: dict[int, dict[str, Tensor]], widths: dict[int, Widths | None], int8: bool) -> Written:
    """Make the program of ``model`` with a method for each of ``inputs``, (1, N) by N, whose sites have these
    ``widths``."""

    def methods() -> Iterator[tuple[str, dict[str, Tensor]]]:
        for length, given in inputs.items():
            with one_shape(model, widths[length]):
                yield method_name(length), given

    with int8_embeddings(model) if int8 else nullcontext():
        return Written(executorch_program(model, methods(), int8), model.config)


class Program:
    """An exported program, called as a model is: each row by itself, in the method that has room for it.

    Attributes:
        config: the model's configuration.
        lengths: of its methods, rising.
    """

    def __init__(self, folder: Path, spec: dict[str, Any], threads: int):
        self.config = AutoConfig.from_pretrained(folder)
        self.program = executorch_methods(str(folder / FILE), threads)
        self.lengths, self.inputs, self.outputs = list(spec["lengths"]), spec["inputs"], spec["outputs"]
        self.pad = getattr(self.config, "pad_token_id", None) or 0

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The outputs of inputs (B, N), by their names.

        Raises:
            ValueError: a row is longer than the longest method.
        """
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        wide, rows = inputs["input_ids"].shape[1], []
        for i in range(len(inputs["input_ids"])):
            rows.append(self._row(row_of(inputs, i), wide))
        return {name: torch.cat([row[name] for row in rows]) for name in self.outputs}

    def _row(self, inputs: dict[str, Tensor], wide: int) -> dict[str, Tensor]:
        tokens = inputs["input_ids"].shape[1]
        length = length_for(self.lengths, tokens)
        if length is None:
            raise ValueError(f"a text of {tokens} tokens: this program takes {self.lengths[-1]} at most")
        given = filled(inputs, length, self.pad)
        found = self.program.load_method(method_name(length)).execute([given[name] for name in self.inputs])
        outputs = dict(zip(self.outputs, found, strict=True))
        return {name: spread(x, tokens, wide) if self.outputs[name] else x for name, x in outputs.items()}
