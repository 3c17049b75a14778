"""Looking into attention: the registered attention function, and the view a method has of a scored layer.

Shapes: B batch, N tokens, H heads, d channels of a head. One attention function and one mask function are registered
with transformers per base implementation, "pruned|sdpa" for "sdpa" and so on; nothing of transformers is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    bidirectional_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_tracing

from .layouts import Packed
from .tokens import CLOSED_LOG, Tokens, take

PREFIX = "pruned|"
CHUNK = 4_000_000  # attention probabilities held at once while scoring
CACHED = 300_000  # and while attending as well, so that they do not leave a core's cache


class View:
    """What a method sees of one scored layer. Everything is (B, N, ...), whatever the layout.

    Attributes:
        layer: 0-based number of the layer.
        site: position of the layer in the method's ``at``; -1 where it has none.
        idle: whether no token can leave here.
        scored: whether the method looks at the layer's attention.
        scaling: of the layer's logits.
        statistic: what the method's score takes of the attention probabilities, see ``over``.
        tokens: the tokens that entered the layer.
        protected: (B, N) bool, tokens that are never dropped.
        keep: (B, N) bool, the decision, once it was made.
        into: (B, N) long, the slot of what holds each token from now on, where a method merges.
        alike: (B, N), how similar it is to that.
        spent: MACs of each row, a number or (B,), that a method's own score took.
        score: (B, N), the method's score, once it was made; never where no token can leave.
    """

    def __init__(self, layer: int, site: int, tokens: Tokens, protected: Tensor, hidden: Tensor):
        self.layer, self.site, self.tokens, self.protected, self._hidden = layer, site, tokens, protected, hidden
        self.idle = self.scored = False
        self.scaling, self.statistic = 1.0, columns
        self.score: Tensor | None = None
        self.keep: Tensor | None = None
        self.into: Tensor | None = None
        self.alike: Tensor | None = None
        self.spent: Tensor | int = 0
        self.after: Tokens | None = None
        self._seen: tuple | None = None
        self._weights: Tensor | None = None
        self._found: Tensor | None = None

    def see(self, module, query: Tensor, key: Tensor, mask: Tensor | None, value: Tensor, scaling: float | None):
        """Called by the attention function with query (B, H, N, d), key and value, all (1, H, T, d) when packed."""
        self.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        self._seen = (module, query, key, mask, value, self.scaling)

    def see_weights(self, weights: Tensor) -> None:
        """Called with the attention probabilities (B, H, N, N) of an implementation that makes them."""
        self._weights = weights

    def see_found(self, found: Tensor) -> None:
        """Called with the ``statistic``, (1, T) in packed rows and (B, N) elsewhere, where it was at hand."""
        self._found = self.tokens.pad(found)

    def release(self) -> None:
        """Let go of the layer's tensors; the decision and the score stay."""
        self._seen = self._weights = self._hidden = self._found = None

    @property
    def ready(self) -> bool:
        """Whether the layer has shown its attention."""
        return self._seen is not None or self._weights is not None

    @property
    def alive(self) -> Tensor:
        """(B, N) bool."""
        return self.tokens.alive

    @property
    def open(self) -> Tensor:
        """(B, N) bool: the live tokens whose gate is not closed in a soft stage."""
        gate = self.tokens.log_gate
        return self.alive if gate is None else self.alive & (gate > CLOSED_LOG)

    @property
    def hidden(self) -> Tensor:
        """(B, N, C), the states that entered the layer."""
        return self.tokens.pad(self._hidden)

    @property
    def key(self) -> Tensor:
        """(B, H, N, d), the keys of the layer.

        Raises:
            RuntimeError: the layer shows its attention probabilities alone.
        """
        return self._shown(2, "keys")

    @property
    def value(self) -> Tensor:
        """(B, H, N, d), the values of the layer, H as of the keys; raises as ``key`` does."""
        return self._shown(4, "values")

    def _shown(self, place: int, what: str) -> Tensor:
        if self._seen is None:
            raise RuntimeError(
                f"layer {self.layer} shows its attention probabilities and not its {what}: choose a method that needs "
                f"no {what} for this model"
            )
        return self.tokens.pad(self._seen[place].transpose(1, 2)).transpose(1, 2)

    @property
    def readout(self) -> Tensor:
        """(B,) slot of the token whose own attention says what counts: the first protected one, else the first."""
        some = self.protected.any(1, keepdim=True)
        return (self.protected | self.alive & ~some).long().argmax(1)

    def attention_received(self) -> Tensor:
        """(B, N) fp32: the attention each token receives, relative to uniform attention (live tokens average 1).

        The mean over heads and live query rows of the attention probabilities before dropout (LTP eq. 1, "column
        mean"), times the number of live tokens, so that thresholds carry over lengths. Padding and dead tokens neither
        vote nor receive; in a soft stage each row votes with its gate.
        """
        return self.reduce_attention(columns)

    def reduce_attention(self, reduce: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(B, N) fp32: another statistic of the attention probabilities, mean over heads; 0 at dead slots.

        ``reduce(weights, votes)`` is given those of some heads before dropout (B, h, N, N) and the votes of the query
        rows (B, N), and returns (B, N), summed over these heads.
        """
        if self._found is not None and reduce is self.statistic:
            found = self._found
        elif self._weights is not None:
            with torch.autocast(self._weights.device.type, enabled=False):
                found = reduce(self._weights.float(), self.tokens.votes) / self._weights.shape[1]
        elif isinstance(self.tokens, Packed):
            found = self._over_packed(reduce)
        else:
            module, query, key, mask, _, scaling = self._seen
            found = reduce_over_heads(query, key, additive(mask, query, module), self.tokens.votes, scaling, reduce)
        return found.masked_fill(~self.alive, 0.0)

    def _over_packed(self, reduce: Callable) -> Tensor:
        module, query, key, mask, _, scaling = self._seen
        parts = []
        for sequence, row, count, length in self.tokens.runs():
            q, k = (
                x[0, :, row : row + count * length].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key)
            )
            step = 1 if mask is not None else max(1, CHUNK // max(1, length * length))
            for i in range(0, count, step):
                m = None if mask is None else self.tokens.sequence_mask(mask, sequence + i)
                votes = q.new_ones(len(q[i : i + step]), length, dtype=torch.float32)
                bias = self.tokens.biased(additive(m, q, module), sequence + i, len(votes), length)
                parts.append(
                    reduce_over_heads(q[i : i + step], k[i : i + step], bias, votes, scaling, reduce).flatten()
                )
        return self.tokens.pad(torch.cat(parts)[None])

    def rows(self, position: Tensor) -> Tensor:
        """(B, H, N) fp32 attention probabilities of one query row per sequence, at slot ``position`` (B,)."""
        if self._weights is not None:
            at = position.view(-1, 1, 1, 1).expand(-1, self._weights.shape[1], 1, self._weights.shape[-1])
            return self._weights.gather(2, at)[:, :, 0].float()
        module, query, _, mask, _, scaling = self._seen
        query, row = self.tokens.pad(query.transpose(1, 2)).transpose(1, 2), position[:, None]
        at = position.view(-1, 1, 1, 1).expand(-1, query.shape[1], 1, query.shape[-1])
        with torch.autocast(query.device.type, enabled=False):
            logits = query.gather(2, at).float() @ repeat_heads(self.key, query).float().transpose(-1, -2) * scaling
        if mask is None and getattr(module, "is_causal", False):
            mask = (torch.arange(query.shape[2], device=query.device) <= row)[:, None, None]
        elif mask is not None:
            packed = isinstance(self.tokens, Packed)  # whose masks are of original size
            if mask.shape[-2] > 1:
                mask = take(mask, self.tokens.index.gather(1, row) if packed else row, -2)
            mask = take(mask, self.tokens.index, -1) if packed else mask
        bias = additive(mask, query, module)  # with the soft gates and sizes, where there are any
        if isinstance(self.tokens, Packed) and self.tokens.log_size is not None:
            logits = logits + self.tokens.log_size[:, None, None]
        logits = logits[:, :, 0] if bias is None else (logits + bias)[:, :, 0]
        return logits.masked_fill(~self.alive[:, None], float("-inf")).softmax(-1)


def repeat_heads(key: Tensor, query: Tensor) -> Tensor:
    """Keys of grouped-query attention, one per query head."""
    return key if key.shape[1] == query.shape[1] else key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def additive(mask: Tensor | None, query: Tensor, module) -> Tensor | None:
    """An attention mask as fp32 bias; ``None`` means causal in a causal module and nothing elsewhere."""
    if mask is None:
        if not getattr(module, "is_causal", False):
            return None
        n = query.shape[-2]
        mask = torch.ones(n, n, dtype=torch.bool, device=query.device).tril()
    if mask.dtype == torch.bool:
        return torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    return mask.float().clamp(min=torch.finfo(torch.float32).min)  # a row of -inf would be NaN


def columns(weights: Tensor, votes: Tensor) -> Tensor:
    """(B, N): what each token receives; see ``View.over``. A product is quicker than a sum over rows."""
    return (votes[:, None, None].float() @ weights).sum(1)[:, 0]


def reduce_over_heads(query, key, bias: Tensor | None, votes: Tensor, scaling: float, reduce: Callable) -> Tensor:
    """(B, N): ``reduce`` of the attention probabilities, averaged over heads; see ``View.over``.

    One chunk of heads at a time: the probabilities of all heads at once cost several times as much from N = 256 up.
    """
    heads, key = query.shape[1], repeat_heads(key, query)
    step = heads  # a graph knows no sizes
    if not torch.compiler.is_compiling():
        step = max(1, CHUNK // max(1, query.shape[0] * query.shape[2] * key.shape[2]))
    total = 0
    with torch.autocast(query.device.type, enabled=False):
        for h in range(0, heads, step):
            logits = (query[:, h : h + step].float() * scaling) @ key[:, h : h + step].float().transpose(-1, -2)
            if bias is not None:
                logits = logits + (bias if bias.dim() < 4 or bias.shape[1] == 1 else bias[:, h : h + step])
            total = total + reduce(logits.softmax(-1), votes)
    return total / heads


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_and_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scaling: float,
    votes: Tensor | None = None,
    reduce: Callable = columns,
) -> tuple[Tensor, Tensor]:
    """Attention, and a statistic of its probabilities on the way: one product of queries and keys instead of two.

    Shapes: query (B, H, N, d), key and value with H or fewer heads, ``votes`` (B, N) of the query rows, None where all
    have one; ``reduce`` as in ``View.over``; returns (B, N, H, d) and (B, N) fp32.
    """
    batch, heads, length, _ = query.shape
    query, key, value = query * scaling, repeat_heads(key, query).transpose(-1, -2), repeat_heads(value, query)
    step, outputs, found = heads, [], 0  # a graph knows no sizes
    if not torch.compiler.is_compiling():
        step = max(1, CACHED // (batch * length * length))
    votes = torch.ones(batch, length, device=query.device) if votes is None else votes
    if torch.is_autocast_enabled(query.device.type):  # which would round the scores
        query, key = query.float(), key.float()
    with torch.autocast(query.device.type, enabled=False):
        for h in range(0, heads, step):
            logits = query[:, h : h + step] @ key[:, h : h + step]
            if bias is not None:
                logits = logits + (bias if bias.dim() < 4 or bias.shape[1] == 1 else bias[:, h : h + step])
            weights = logits.softmax(-1, dtype=torch.float32)
            outputs.append(weights.to(value.dtype) @ value[:, h : h + step])
            found = found + reduce(weights, votes)
    return torch.cat(outputs, 1).transpose(1, 2), found / heads


def base_function(module, name: str):
    """transformers' attention function of that name; "eager" lives in the model's own file."""
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    return sys.modules[type(module).__module__].eager_attention_forward


class PrunedAttention:
    """The attention function registered for one base implementation: shows the scored layer, runs packed rows."""

    def __init__(self, base: str):
        self.base = base

    def __call__(self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, token_view=None, **kwargs):
        function = base_function(module, self.base)
        kwargs.update(scaling=scaling, dropout=dropout)
        if token_view is None:
            return function(module, query, key, value, attention_mask, **kwargs)
        token_view.see(module, query, key, attention_mask, value, scaling)
        if isinstance(token_view.tokens, Packed):
            return self._packed(function, module, query, key, value, attention_mask, token_view, kwargs)
        tokens, sees, graph = token_view.tokens, None, torch.compiler.is_compiling()
        if graph and attention_mask is not None:  # a query that sees nobody gets zeros, for which runtimes have others
            if attention_mask.dtype == torch.bool:
                same = attention_mask.shape[-2] == 1 and tokens.blank is not None  # for all: those of blank rows do
                sees = ~tokens.blank[:, None] if same else attention_mask.any(-1)[:, 0]
            elif tokens.log_size is not None and tokens.blank is not None:
                sees = (attention_mask > float("-inf")).any(-1)[:, 0]
                attention_mask = attention_mask.clamp(min=torch.finfo(attention_mask.dtype).min)
        if graph and token_view.scored and self._plain(module, kwargs):
            bias, votes = additive(attention_mask, query, module), tokens.votes
            output, found = attend_and_score(query, key, value, bias, token_view.scaling, votes, token_view.statistic)
            token_view.see_found(found)
            weights = None
        else:
            output, weights = function(module, query, key, value, attention_mask, **kwargs)
            if weights is not None and not (dropout and module.training):
                token_view.see_weights(weights)
        return output if sees is None else output * sees[..., None, None], weights

    @staticmethod
    def _plain(module, kwargs: dict) -> bool:
        """Whether attention is a softmax of scaled products and nothing else, so that it can be had with the score."""
        own = any(kwargs.get(name) is not None for name in ("softcap", "s_aux")) or hasattr(module, "sinks")
        return not own and not (kwargs["dropout"] and module.training)

    def _packed(self, function, module, query, key, value, mask, view: View, kwargs):
        """One call per run of equally long neighbours, or per sequence where a mask tells them apart."""
        tokens, outputs, found, dtype = view.tokens, [], [], value.dtype
        fused = view.scored and self._plain(module, kwargs)
        if fused and query.is_cpu:  # products as small are no quicker in bf16, and each new shape costs a new kernel
            query, key, value = query.float(), key.float(), value.float()
        blank = [False] * len(tokens.lengths) if tokens.blank is None else tokens.blank.tolist()
        for sequence, row, count, length in tokens.runs():
            run = [
                x[0, :, row : row + count * length].unflatten(1, (count, length)).transpose(0, 1)
                for x in (query, key, value)
            ]
            masks = [None if mask is None else tokens.sequence_mask(mask, sequence + i) for i in range(count)]
            if any(m is not None for m in masks):
                step = 1
            else:
                step = max(1, CHUNK // (query.shape[1] * length * length)) if fused else count
            for i in range(0, count, step):
                qkv, m = [x[i : i + step] for x in run], masks[i]
                if tokens.log_size is not None and not blank[sequence + i]:
                    m = None if m is None and mask is not None else additive(m, qkv[0], module)
                    m = tokens.biased(m, sequence + i, len(qkv[0]), length)
                if fused and blank[sequence + i]:  # what a query that sees nobody gets is the implementation's own
                    output, _ = function(module, *qkv, m, **self._free(module, mask, kwargs))
                    found.append(output.new_zeros(length, dtype=torch.float32))
                elif fused:
                    bias = None if m is None and mask is not None else additive(m, qkv[0], module)
                    output, scores = attend_and_score(*qkv, bias, view.scaling, reduce=view.statistic)
                    found.append(scores.flatten())
                else:
                    m = m if m is None or m.dtype == torch.bool else m.to(qkv[0].dtype)
                    output, _ = function(module, *qkv, m, **self._free(module, mask, kwargs))
                outputs.append(output.flatten(0, 1))
        if found:
            view.see_found(_joined(found)[None])
        output = _joined(outputs).to(dtype)
        return F.pad(output, (0, 0, 0, 0, 0, tokens.spare))[None], None

    @staticmethod
    def _free(module, mask, kwargs):
        """With a mask that says everything, the absence of one must not be read as causal."""
        return kwargs if mask is None or not getattr(module, "is_causal", False) else {**kwargs, "is_causal": False}


def register(base: str) -> str:
    """Register the pruned form of an attention implementation with its mask function; returns the new name.

    Without the mask function transformers would build no mask at all and silently attend to padding.
    """
    name = PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS:
        if base != "eager" and base not in ALL_ATTENTION_FUNCTIONS:
            raise ValueError(f"attention implementation {base!r} is unknown; known: {sorted(ALL_ATTENTION_FUNCTIONS)}")
        if base not in ALL_MASK_ATTENTION_FUNCTIONS:
            raise ValueError(
                f"attention implementation {base!r} has no mask function; load the model with 'sdpa' or 'eager'"
            )
        masks = ALL_MASK_ATTENTION_FUNCTIONS[base]
        AttentionInterface.register(name, PrunedAttention(base))
        AttentionMaskInterface.register(name, key_mask if masks is sdpa_mask else masks)
    return name


def key_mask(
    batch_size, q_length, kv_length, q_offset=0, kv_offset=0, mask_function=None, attention_mask=None, **kwargs
):
    """transformers' mask for sdpa. Where it hides keys alone, one row of it stands for all queries, as a view: rows
    (B, N) are cut and gathered where else (B, N, N) are."""
    given = (batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask)
    plain = mask_function is bidirectional_mask_function and kwargs.get("local_size") is None
    if not plain or attention_mask is None or attention_mask.shape != (batch_size, kv_length) or kv_offset:
        return sdpa_mask(*given, **kwargs)
    if kwargs.get("allow_is_bidirectional_skip") and not is_tracing(attention_mask) and bool(attention_mask.all()):
        return None
    return attention_mask.bool()[:, None, None].expand(-1, -1, q_length, -1)
