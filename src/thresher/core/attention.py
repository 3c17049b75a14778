"""The registered attention function: it shows a site what attention was given, and runs packed rows.

One attention function and one mask function are registered with transformers per base implementation, "pruned|sdpa"
for "sdpa" and so on; nothing of transformers is replaced. Shapes: B batch, N tokens, H heads, d channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import compat
from .scoring import CHUNK, Logits, Statistic, additive, attend_and_score, attend_with_dropout, joined
from .tokens import ByLength, Packed
from .view import AttentionInputs, Site

PREFIX = "pruned|"


class PrunedAttention:
    """The attention function registered for one base implementation."""

    def __init__(self, base: str):
        self.base = base

    def __call__(self, module, query, key, value, attention_mask, token_site=None, cache_site=None, **kwargs):
        function = compat.ALL_ATTENTION_FUNCTIONS.get(self.base) or compat.attention_function(module, self.base)
        scaling, dropout = kwargs.setdefault("scaling", None), kwargs.setdefault("dropout", 0.0)
        quick = self._quick(module, query, key, attention_mask, dropout, kwargs)
        function = with_dropout if quick else function
        if token_site is None and cache_site is None:
            return function(module, query, key, value, attention_mask, **kwargs)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        sinks = kwargs.get("s_aux", getattr(module, "sinks", None))
        logits = Logits(scaling, kwargs.get("softcap"), sinks)
        causal = self._causal(module, kwargs)
        given = AttentionInputs(module, query, key, value, attention_mask, causal, logits)
        if cache_site is not None:
            cache_site.inputs = given
            states = None if cache_site.attend is None else cache_site.attend(given)
            if states is not None:
                return states, None
        if token_site is None:
            return function(module, query, key, value, attention_mask, **kwargs)
        site: Site = token_site
        site.inputs = given
        whole = logits.plain and site.voters is None  # where some rows vote these alone are made, beside the attention
        statistic = site.statistic if whole and (quick or not (dropout and module.training)) else None
        if isinstance(site.tokens, Packed):
            output, site.scores = self._packed(function, given, site, statistic, kwargs)
            return output, None
        sees = None
        graph, bools = torch.compiler.is_compiling(), attention_mask is not None and attention_mask.dtype == torch.bool
        if graph and bools and attention_mask.shape[-2] > 1 and attention_mask.stride(-2):
            sees = attention_mask.any(-1)[:, 0]  # a query that sees nobody gets zeros, for which runtimes have others
        if statistic is not None and (graph or quick):
            bias = given.bias(attention_mask, query.shape[-2])
            lost = dropout if quick else 0.0
            output, site.scores = attend_and_score(query, key, value, bias, scaling, site.votes, statistic, lost)
            weights = None
        else:
            output, weights = function(module, query, key, value, attention_mask, **kwargs)
            if weights is not None and not (dropout and module.training):
                site.weights = weights
        return output if sees is None else output * sees[..., None, None], weights

    def _quick(self, module, query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, kwargs: dict) -> bool:
        """Whether dropout is drawn our way, see ``dropped``: sdpa's, of scaled products, on a CPU."""
        plain = all(kwargs.get(name) is None for name in ("softcap", "s_aux", "position_bias", "cache"))
        plain &= mask is not None or query.shape[-2] == key.shape[-2] or not self._causal(module, kwargs)
        return self.base == "sdpa" and dropout > 0 and plain and query.is_cpu and not torch.compiler.is_compiling()

    def _causal(self, module, kwargs: dict) -> bool:
        """What the base function takes the absence of a mask for; sdpa takes a module that says nothing for causal."""
        if self.base == "eager":
            return False
        causal = kwargs.get("is_causal")
        return bool(getattr(module, "is_causal", True) if causal is None else causal)

    def _packed(
        self, function, given: AttentionInputs, site: Site, statistic: Statistic | None, kwargs: dict
    ) -> tuple[Tensor, Tensor | None]:
        """Attend once per run of equally long neighbours, or once per sequence where a mask tells them apart; returns
        the states and, where a ``statistic`` is made with them, the scores (B, N)."""
        query, key, value = given.query, given.key, given.value
        tokens: Any = site.tokens
        outputs, scores, fused = [], [], statistic is not None
        each: list[Tensor | None] = [None] * len(tokens.lengths)
        if given.mask is not None:  # a part of it that lets everything through becomes None, which is not causal here
            kwargs = {**kwargs, "is_causal": False}
            each = [tokens.sequence_mask(given.mask, i) for i in range(len(each))]
        alike = tokens.log_size is None and not any(mask is not None for mask in each)  # but in length
        order = tokens.by_length if alike else ByLength(tokens.lengths)
        query, key, value = order.sort(query), order.sort(key), order.sort(value)
        for sequence, length, run in tokens.runs(query, key, value, lengths=order.lengths):
            count = len(run[0])
            masks = each[sequence : sequence + count]
            if any(mask is not None for mask in masks):
                step = 1
            else:
                step = max(1, CHUNK // (query.shape[1] * length * length)) if fused else count
            for i in range(0, count, step):
                (q, k, v), mask = (x[i : i + step] for x in run), masks[i]
                if fused or tokens.log_size is not None:
                    bias = None if mask is None and given.mask is not None else given.bias(mask, length)
                    bias = tokens.biased(bias, sequence + i, len(q), length)
                    mask = bias if tokens.log_size is not None else mask
                if statistic is not None:
                    lost = kwargs["dropout"] if function is with_dropout else 0.0
                    output, score = attend_and_score(
                        q, k, v, bias, given.logits.scaling, reduce=statistic, dropout=lost
                    )
                    scores.append(score.flatten())
                else:
                    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
                    output, _ = function(given.module, q, k, v, mask, **kwargs)
                outputs.append(output.flatten(0, 1))
        if tokens.spare:
            outputs.append(outputs[0].new_zeros(tokens.spare, *outputs[0].shape[1:]))
        states = order.restore(joined(outputs))[None].contiguous()
        return states, tokens.pad(order.restore(joined(scores))[None]) if scores else None


def with_dropout(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: Any = None, **kwargs
) -> tuple[Tensor, None]:
    """sdpa's attention function with quick dropout; a query that sees nobody gets zeros, as there."""
    scaling = query.shape[-1] ** -0.5 if kwargs["scaling"] is None else kwargs["scaling"]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    bias = additive(mask, query.shape[-2], bool(causal) and query.shape[-2] > 1, query.device)
    output = attend_with_dropout(query, key, value, bias, scaling, kwargs["dropout"])
    if mask is None:
        return output, None
    sees = (mask if mask.dtype == torch.bool else mask > -torch.inf).any(-1)  # (B or 1, H or 1, N)
    return output * sees.transpose(1, 2)[..., None], None


def register(base: str) -> str:
    """Register the pruned form of an attention implementation with its mask function; returns the new name.

    Without the mask function transformers would build no mask at all and silently attend to padding.

    Raises:
        ValueError: transformers knows no such implementation, or no mask function for it.
    """
    name, known, known_masks = PREFIX + base, compat.ALL_ATTENTION_FUNCTIONS, compat.ALL_MASK_ATTENTION_FUNCTIONS
    if name not in known:
        if base != "eager" and base not in known:
            raise ValueError(f"attention implementation {base!r} is unknown; known: {sorted(known)}")
        if base not in known_masks:
            raise ValueError(
                f"attention implementation {base!r} has no mask function; load the model with 'sdpa' or 'eager'"
            )
        masks = known_masks[base]
        known.register(name, PrunedAttention(base))
        known_masks.register(name, key_mask if masks is compat.sdpa_mask else masks)
    return name


def key_mask(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None, **kwargs
):
    """transformers' mask for sdpa. Where it hides keys alone, one row of it stands for all queries, as a view: rows
    (B, N) are cut and gathered where else (B, N, N) are. In graphs of one shape, whose runtimes may have no views, it
    is the row itself."""
    given = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask)
    plain = mask_function is compat.bidirectional_mask_function and kwargs.get("local_size") is None
    if not plain or attention_mask is None or attention_mask.shape != (batch_size, kv_length) or kv_offset:
        return compat.sdpa_mask(*given, **kwargs)
    skips = kwargs.get("allow_is_bidirectional_skip") and not compat.is_tracing(attention_mask)
    if skips and bool(attention_mask.all()):
        return None
    row = attention_mask.bool()[:, None, None]
    fixed = torch.compiler.is_exporting() and isinstance(q_length, int)
    return row if fixed else row.expand(-1, -1, q_length, -1)
