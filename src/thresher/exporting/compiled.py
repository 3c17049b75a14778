"""A model compiled for one text at a time: code for a few lengths, made once, so that nothing is compiled in service.

One short text is mostly spent between the operations, on Python and on many small kernels. Compiled code has neither.

Shapes: N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..core.pruner import token_pruner_of
from ..data.embedder import Embedder
from ..data.models import positions
from .export import inputs_of, padded_layout
from .shapes import check_lengths, filled, length_for, one_shape, outputs_of, widths_of

Code = tuple[Callable, tuple[str, ...]]  # a function, and the names of its inputs


class Compiled:
    """A compiled model. One text runs in the code for the least length that has room for it; a batch, or a longer text,
    runs in the model itself, pruned as ever.

    Attributes:
        model: what was compiled; the code holds weights of its own and does not follow a training.
        lengths: of the code, rising.
        cut: by length, the share of calibration texts of which tokens leave that would have stayed.
    """

    def __init__(
        self,
        model: Any,
        code: dict[int, tuple[Callable, tuple[str, ...]]],
        spans: dict[str, bool],
        cut: dict[int, float],
    ):
        self.model, self.code, self.spans, self.cut = model, code, spans, cut
        self.lengths, self.config = sorted(code), model.config
        self.pad = getattr(model.config, "pad_token_id", None) or 0

    def __call__(self, **inputs: Tensor) -> Any:
        """What the model answers to input_ids, attention_mask, ... (B, N)."""
        ids = inputs["input_ids"]
        length = length_for(self.lengths, ids.shape[1]) if len(ids) == 1 else None
        with torch.no_grad():
            if length is None:
                return self.model(**inputs)
            code, names = self.code[length]
            if {*inputs} - {*names}:
                raise ValueError(
                    f"{', '.join(sorted({*inputs} - {*names}))}: the code takes {', '.join(names)}; compile with "
                    "tokenizer= for those that it makes"
                )
            usual = {"attention_mask": torch.ones_like(ids)}  # segments are 0, as in the model
            whole = {name: inputs.get(name, usual.get(name, torch.zeros_like(ids))) for name in names}
            found = code(**filled(whole, length, self.pad))
        tokens = ids.shape[1]
        for name, spans in self.spans.items():
            if spans:
                found[name] = found[name][:, :tokens]
        return found


@torch.no_grad()
def compiled(
    model: PreTrainedModel | Embedder,
    lengths: Sequence[int] = (),
    *,
    tokenizer: Any = None,
    calibration: Iterable[dict[str, Tensor]] | None = None,
    freeze: bool = True,
    **options: Any,
) -> Compiled:
    """Compile ``model``, pruned or not, for one text at a time, of up to each of ``lengths`` tokens.

    Kept counts follow from the text, widths from the length, so that the answers are those of the model. Nothing is
    compiled later. The model is as before.

    Args:
        lengths: default: 32, 64, 128, 256 and 512 as far as the positions go. One takes half a minute for MiniLM-L6.
        tokenizer: says whether the model is given ``token_type_ids``.
        calibration: texts, for methods of which the data says how many tokens stay (thresholds): there is room for what
            99 % of texts of that length keep, and of a text that wants more its best tokens stay.
        freeze: lay the weights out for the processor, once for each length: faster, and as much memory for each.
        options: of ``torch.compile``, as in ``backend="eager"``.

    Raises:
        ValueError: a length that the model does not take; the method needs ``calibration``.

    Example:
        >>> fast = compiled(model, lengths=(32, 64, 128))
        >>> fast(**tokenizer("Wonderful acting.", return_tensors="pt")).logits
    """
    token_pruner_of(model, "compiled")
    found = check_lengths(lengths, positions(model) or 512)
    if freeze and options.get("backend", "inductor") == "inductor":
        options = {**options, "options": {"freezing": True, **options.get("options", {})}}
    with padded_layout(model):
        widths, cut = widths_of(model, found, calibration)
        spans = outputs_of(model, inputs_of(model, tokenizer, 1, 2), inputs_of(model, tokenizer, 1, 3))
        code = {}
        for length in found:
            inputs = inputs_of(model, tokenizer, 1, length)
            with one_shape(model, widths[length]):
                graph = torch.export.export(model, args=(), kwargs=inputs, strict=False).module()
            run = torch.compile(graph, dynamic=False, fullgraph=True, **options)
            run(**inputs)
            code[length] = (run, tuple(inputs))
    return Compiled(model, code, spans, cut)
