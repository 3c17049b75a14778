"""GemFilter: early layers of a decoder find the tokens of a prompt that its end asks for.

Shapes: N tokens of a prompt, H query heads, KV key heads, d channels of a head.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..api import dense, inner_model
from ..core import compat
from ..core.architecture import Architecture, find_architecture
from ..core.attachment import at_rest
from ..core.attention import PREFIX, register
from ..core.method import pruner_of
from ..core.scoring import full_precision, repeat_heads
from ..core.view import AttentionInputs
from .words import Prompt, Shortener, fitting

ONE = threading.RLock()  # one prompt at a time is looked at: the hooks lie on a model that threads share
DEPTH = 13 / 32  # where the layer lies that chooses: the paper's of Llama 3.1


@dataclass(frozen=True)
class GemFilter(Shortener):
    """Choose the tokens of a prompt whose keys point where its last query does, in an early layer (Shi et al.,
    "Discovering the Gems in Early Layers: Accelerating Long-Context LLMs with 1000x Input Token Reduction", 2024, arXiv
    2409.17422).

    A token scores the sum over all heads of the product of its key and the last query, averaged over its neighbours.
    Layers behind the one that chooses are not run.

    Args:
        keep: a share of the prompt in (0, 1], or a number of tokens; protected ones are counted.
        at: 0-based layer that chooses; default: 13 of 32, or the next one that sees all of a prompt.
        kernel: neighbours that are averaged, an odd number.
        sinks, recent: first and last tokens of a prompt that stay: what opens it, and the question with what follows.
        words: keep words of a text as a whole; False: tokens.

    | paper | here | why |
    |---|---|---|
    | a number of tokens | also a share | prompts differ in length |
    | all tokens compete | special, first and last ones stay | a chat template has to stay whole |
    | tokens | words, where a text is given | a number is not cut in two, and the text is read by any engine |
    | the same model answers | any | ``compress`` gives back a text |
    """

    keep: float | int = 0.25
    at: int | None = field(default=None, kw_only=True)
    kernel: int = field(default=5, kw_only=True)
    sinks: int = field(default=4, kw_only=True)
    recent: int = field(default=32, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        keep = self.keep
        if self.sinks < 0 or self.recent < 1:
            raise ValueError(f"sinks={self.sinks}, recent={self.recent}: expected 0 or more, and 1 or more, tokens")
        if isinstance(keep, int) and keep < self.sinks + self.recent:
            raise ValueError(
                f"keep={keep} is below the {self.sinks} first and {self.recent} last tokens that stay: give "
                f"{self.sinks + self.recent} or more, or smaller sinks and recent"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: expected an odd number of tokens")

    def layer(self, model: Architecture) -> int:
        """The number of the layer that chooses.

        Raises:
            ValueError: the model has no such layer, or none whose queries and keys are shown.
        """
        if not (model.causal and model.text and model.shows_inputs and model.passes_arguments):
            raise ValueError(
                f"GemFilter is not possible with {model.name}: it asks the last query of a decoder of text, whose "
                "layers hand their arguments to transformers' attention interface"
            )
        if self.at is not None:
            if not 0 <= self.at < model.depth:
                raise ValueError(f"at={self.at}: {model.name} has layers 0 to {model.depth - 1}")
            return self.at
        kinds = DynamicCache(config=model.base.config).layers
        first = min(int(DEPTH * model.depth), model.depth - 1)
        whole = [n for n, kind in enumerate(kinds) if not isinstance(kind, DynamicSlidingWindowLayer)]
        return next((n for n in whole if n >= first), whole[-1] if whole else first)

    def check(self, info: Architecture, model: PreTrainedModel) -> None:
        self.layer(info)

    def choose(self, model: PreTrainedModel, prompt: Prompt, count: int, tokenizer: Any) -> tuple[list[int], int]:
        stays = torch.tensor(prompt.special)
        stays[: self.sinks] = stays[-self.recent :] = True
        scores = self.scores(model, torch.tensor([prompt.ids]))
        return chosen(scores, stays, prompt.units, count), self.layer(find_architecture(inner_model(model))) + 1

    def scores(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """(N,) fp32 scores of the tokens ``ids`` (1, N)."""
        info = find_architecture(inner_model(model))
        if info.max_tokens is not None and ids.shape[1] > info.max_tokens:
            raise ValueError(
                f"the prompt has {ids.shape[1]} tokens, and {info.name} takes {info.max_tokens}: compress it in parts"
            )
        given = shown(model, ids, self.layer(info))
        query = given.query[0, :, -1:].float()
        with full_precision(query.device):
            products = query @ repeat_heads(given.key, given.query)[0].float().transpose(-1, -2)
        return F.avg_pool1d(products.sum(0), self.kernel, 1, self.kernel // 2, count_include_pad=False)[0].cpu()


def chosen(scores: Tensor, stays: Tensor, units: Sequence[int], count: int) -> list[int]:
    """The places of the tokens that are kept, rising: those of the units that score best, as many as fit into ``count``
    tokens; and those of units with a token that ``stays`` (N,) bool, in any case. A unit scores as its best token."""
    of = torch.tensor(units) - units[0]
    sizes = of.bincount()
    best = torch.full((len(sizes),), -torch.inf).scatter_reduce(0, of, scores, "amax")
    fixed = torch.zeros(len(sizes)).scatter_reduce(0, of, stays.float(), "amax") > 0
    return fitting(best, sizes, fixed, count)[of].nonzero()[:, 0].tolist()


class Seen(Exception):
    """End a forward: what it was run for has been seen."""


class Glance:
    """A site at which a forward ends once its layer shows what attention is given."""

    given: AttentionInputs

    @property
    def inputs(self) -> AttentionInputs:
        """What the layer showed."""
        return self.given

    @inputs.setter
    def inputs(self, given: AttentionInputs) -> None:
        self.given = given
        raise Seen


@torch.no_grad()
def shown(model: PreTrainedModel, ids: Tensor, number: int) -> AttentionInputs:
    """What the attention of layer ``number`` is given for ``ids`` (1, N). The forward ends there.

    The model is in evaluation mode meanwhile. One thread at a time does this; forwards of others go on as they are.
    """
    inner = inner_model(model)
    info, glance = find_architecture(inner), Glance()
    calls: list[Any] = []
    here = threading.get_ident()

    def before(layer: Any, args: tuple, kwargs: dict) -> tuple | None:
        if threading.get_ident() != here:
            return None
        calls.append(layer)
        return args, kwargs | ({"cache_site": glance} if len(calls) == number + 1 else {})

    pruned = nullcontext() if pruner_of(inner) is None else dense(inner)
    with ONE:
        handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in info.layers]
        try:
            with at_rest(inner), pruned, _showing(info.base):
                info.base(input_ids=ids.to(info.base.device), use_cache=False)
        except Seen:
            return glance.given
        finally:
            for handle in handles:
                handle.remove()
    raise RuntimeError(f"layer {number} of {info.name} delivered no attention: load it with 'sdpa' or 'eager'")


@contextmanager
def _showing(base: PreTrainedModel) -> Iterator[None]:
    """Within the context the attention of a model shows sites what it is given."""
    original = compat.attention_implementation(base)
    if original.startswith(PREFIX):
        yield
        return
    base.set_attn_implementation(register(original))
    try:
        yield
    finally:
        base.set_attn_implementation(original)
