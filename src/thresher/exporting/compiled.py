"""A model compiled for one text at a time: code for a few lengths, made once, so that nothing is compiled in service.

One short text is mostly spent between the operations, on Python and on many small kernels. Compiled code has neither.

Shapes: N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..api import MODULE
from ..core.pruner import token_pruner_of
from ..data.embedder import Embedder
from ..data.models import positions
from .export import inputs_of, padded_layout
from .shapes import LENGTHS, Answer, check_encoder, check_lengths, filled, length_for, one_shape, outputs_of, widths_of

Code = Callable[..., tuple[Tensor, ...]]  # of tensors (1, N), in the order of their names


class Flat(nn.Module):
    """A model of tensors alone: its inputs by position, its outputs as a tuple."""

    def __init__(self, model: nn.Module, inputs: Iterable[str], outputs: Iterable[str]):
        super().__init__()
        self.model, self.inputs, self.outputs = model, tuple(inputs), tuple(outputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**dict(zip(self.inputs, tensors, strict=True)))
        return tuple(found[name] for name in self.outputs)


class Compiled:
    """A compiled model. One text runs in the code for the least length that has room for it. All else runs in the model
    itself: a batch, a longer text, other inputs, and what ``dense`` or ``calling`` ask for.

    Attributes:
        model: what was compiled.
        lengths: of the code, rising.
        inputs: the names of its inputs.
        cut: by length, the share of calibration texts of which tokens leave that would have stayed.
    """

    def __init__(self, flat: Flat, code: dict[int, Code], answer: Answer, cut: dict[int, float]):
        self.model: Any = flat.model
        self.lengths, self.inputs, self.cut = sorted(code), flat.inputs, cut
        self.config: Any = self.model.config
        self.device: Any = self.model.device
        self._code, self._answer = code, answer
        self._pad = getattr(self.config, "pad_token_id", None) or 0
        self._pruner, self._made_of = getattr(self.model, MODULE, None), state_of(self.model)

    @torch.no_grad()
    def __call__(self, **inputs: Tensor | None) -> Any:
        """What the model answers to input_ids, attention_mask, ... (B, N).

        Raises:
            ValueError: the model has been trained, or is pruned otherwise, since the code was made.
        """
        pruner = getattr(self.model, MODULE, None)
        if pruner is not self._pruner or state_of(self.model) != self._made_of:
            raise ValueError(
                f"{type(self.model).__name__} has other weights, another method or another mode than when it was "
                "compiled: call compiled() again"
            )
        own = {name: x for name, x in inputs.items() if x is not None}
        ids = own.get("input_ids")
        usual_call = pruner is None or pruner.hooks.options == pruner.hooks.unasked
        fits = ids is not None and len(ids) == 1 and {*own} <= {*self.inputs} and usual_call
        length = length_for(self.lengths, ids.shape[1]) if fits and ids is not None else None
        if ids is None or length is None:
            return self.model(**own)
        mask = own.get("attention_mask", torch.ones_like(ids))  # segments are 0, as in the model
        usual = {"attention_mask": mask, "pooling_mask": mask}
        given = {name: own.get(name, usual.get(name, torch.zeros_like(ids))) for name in self.inputs}
        whole = filled(given, length, self._pad)
        found = self._code[length](*(whole[name].to(self.device, torch.long) for name in self.inputs))
        tokens, names = ids.shape[1], self._answer.items()
        parts = {name: x[:, :tokens] if spans else x for (name, spans), x in zip(names, found, strict=True)}
        return self._answer.kind(**parts)


def state_of(model: nn.Module) -> tuple:
    """What code that was made of a model knows by heart: its mode and its weights, by their versions."""
    weights = sum(0 if x.is_inference() else x._version for x in (*model.parameters(), *model.buffers()))
    return model.training, weights


@torch.no_grad()
def compiled(
    model: PreTrainedModel | Embedder,
    lengths: Sequence[int] = (),
    *,
    tokenizer: Any = None,
    calibration: Iterable[dict[str, Tensor]] | None = None,
    freeze: bool = True,
    backend: str = "inductor",
) -> Compiled:
    """Compile ``model``, pruned or not, for one text at a time, of up to each of ``lengths`` tokens.

    Kept counts follow from the text, widths from the length, so that the answers are those of the model. Nothing is
    compiled later, whatever changes around it: new weights and another method need new code, and are refused. The model
    is as before.

    Args:
        lengths: default: 32, 64, 128, 256 and 512 as far as the positions go.
        tokenizer: says whether the model is given ``token_type_ids``; without one it is, where it knows segments.
        calibration: texts, for methods of which the data says how many tokens stay (thresholds): there is room for what
            99 % of texts of that length keep, and of a text that wants more its best tokens stay.
        freeze: lay the weights out for the processor, once for each length: faster, and as much memory for each.
        backend: of ``torch.compile``.

    Raises:
        ValueError: a decoder, which would answer from the padding; a model that is being trained, or whose
            configuration asks for hidden states or attentions; a length that the model does not take; the method needs
            ``calibration``.

    Example:
        >>> fast = compiled(model, lengths=(8, 16), backend="eager")
        >>> logits = fast(**tokenizer("the wheat", return_tensors="pt")).logits
    """
    token_pruner_of(model, "compiled")
    check_encoder(model)
    if model.training:
        raise ValueError(
            f"{type(model).__name__} is being trained, and compiled code has no dropout: call model.eval() first"
        )
    if model.config.output_hidden_states or model.config.output_attentions:
        raise ValueError("the configuration asks for hidden states or attentions, which compiled code does not give")
    found, code = check_lengths(lengths, positions(model) or max(lengths, default=LENGTHS[-1])), {}
    with padded_layout(model):
        widths, cut = widths_of(model, found, calibration)
        answer = outputs_of(model, inputs_of(model, tokenizer, 1, 2), inputs_of(model, tokenizer, 1, 3))
        for length in found:
            inputs = inputs_of(model, tokenizer, 1, length)
            flat = Flat(model, inputs, answer)
            with one_shape(model, widths[length]):
                graph = torch.export.export(flat, tuple(inputs.values()), strict=False).module()
            code[length] = _code(graph, backend, freeze)
            code[length](*inputs.values())  # which compiles it
    return Compiled(flat, code, answer, cut)


def _code(graph: nn.Module, backend: str, freeze: bool) -> Code:
    """Compiled code of a graph of one shape: nothing that a guard could ask of its inputs is open."""
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    if backend == "inductor" and freeze:
        options["freezing"] = True
    return torch.compile(graph, dynamic=False, fullgraph=True, backend=backend, options=options)
