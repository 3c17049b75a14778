"""Classify a text that arrives in pieces: what survived pruning is the memory."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..api import inner_model
from ..core.attachment import at_rest
from ..core.pruner import TokenPruner, token_pruner_of
from ..core.view import departures

WORD = "a"  # any text: around its tokens a tokenizer puts the special ones


@dataclass(frozen=True)
class Answer:
    """What a stream says after a piece.

    Attributes:
        label: the name of the likeliest class.
        margin: its probability less that of the next one.
        probabilities: of every class, in the model's order.
        read: tokens of the stream so far.
        held: tokens in the memory.
        macs: MACs that this piece took.
        final: whether the margin has reached ``sure``, in this piece or before.
    """

    label: str
    margin: float
    probabilities: tuple[float, ...]
    read: int
    held: int
    macs: float
    final: bool


class Stream:
    """Classify a text that never ends with work and memory that do not grow.

    Each piece is read together with the memory, in one forward of the pruned model. The memory then holds the
    ``memory`` tokens that stayed longest: first those that survived, then by the layer at which they left, then by
    score. They stay in their order, and are read again with the next piece, at positions without gaps.

    Args:
        model: a pruned classifier (``prune(model, TopK(...))``) of two classes or more. It is put into evaluation mode.
        tokenizer: its tokenizer.
        memory: tokens that are remembered.
        sure: a margin from which on the answer is final: later pieces are not read and repeat it. None: never.
        longest: tokens of one forward, special ones included. Default: what the tokenizer and the model take.

    Raises:
        TypeError: no transformers model.
        ValueError: a dense model, a method that merges, a model of one number, or a memory that leaves no room.

    Example:
        >>> stream = Stream(model, tokenizer, memory=128)
        >>> for piece in pieces:
        ...     answer = stream(piece)

    Source: restart-incremental processing, Madureira and Schlangen, "Incremental Processing in the Age of
    Non-Incremental Encoders" (EMNLP 2020); there the whole prefix is read again.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, memory: int = 128, sure: float | None = None, longest: int | None = None
    ):
        self.model, self.tokenizer, self.memory, self.sure = model.eval(), tokenizer, memory, sure
        self.pruner = _remembering(model)
        ids = tokenizer(WORD, return_special_tokens_mask=True)
        inner = ids["special_tokens_mask"].index(0)
        count = len(ids["special_tokens_mask"]) - sum(ids["special_tokens_mask"])
        self.before, self.behind = ids["input_ids"][:inner], ids["input_ids"][inner + count :]
        limits = (longest, tokenizer.model_max_length, self.pruner.architecture.max_tokens)
        self.longest = min(limit for limit in limits if limit)
        self.room = self.longest - len(self.before) - len(self.behind) - memory
        if memory < 0 or self.room < 1:
            raise ValueError(f"memory={memory} leaves {self.room} of {self.longest} tokens for new ones: take less")
        if sure is not None and not 0 < sure <= 1:
            raise ValueError(f"sure={sure}: expected a margin between two probabilities, above 0 and at most 1")
        self.labels: Any = inner_model(model).config.id2label
        self._accepted = inspect.signature(inner_model(model).forward).parameters
        self.reset()

    def reset(self) -> None:
        """Begin a new text."""
        self.held: list[int] = []
        self.read = 0
        self.last: Answer | None = None

    def __call__(self, piece: str) -> Answer:
        """Read a piece, which is tokenized on its own: cut texts between words.

        Raises:
            TypeError: ``piece`` is no string.
            ValueError: the first piece has no tokens.
        """
        if not isinstance(piece, str):
            raise TypeError(f"a piece is a string, got {type(piece).__name__}")
        last = self.last
        if last is not None and last.final:
            self.last = replace(last, macs=0.0)
            return self.last
        ids = self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            if last is None:
                raise ValueError("the first piece has no tokens: there is nothing to answer from")
            self.last = replace(last, macs=0.0)
            return self.last
        macs, logits = 0.0, torch.empty(0)
        for start in range(0, len(ids), self.room):
            logits, spent = self._forward(ids[start : start + self.room])
            macs += spent
        self.read += len(ids)
        probabilities = tuple(logits.float().softmax(-1).tolist())
        self.last = self._answer(probabilities, macs)
        return self.last

    def _answer(self, probabilities: tuple[float, ...], macs: float) -> Answer:
        order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
        margin = probabilities[order[0]] - probabilities[order[1]]
        final = self.sure is not None and margin >= self.sure
        label = self.labels[order[0]]
        return Answer(label, margin, probabilities, self.read, len(self.held), macs, final)

    def _forward(self, new: Sequence[int]) -> tuple[torch.Tensor, float]:
        """The logits (classes,) of the memory with new tokens behind it, and MACs; what survives is the new memory."""
        ids = [*self.before, *self.held, *new, *self.behind]
        inputs = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        device = inner_model(self.model).device
        given = {name: torch.tensor([row], device=device) for name, row in inputs.items() if name in self._accepted}
        if token_pruner_of(inner_model(self.model), "Stream") is not self.pruner:
            raise ValueError("the model is dense or pruned otherwise since this Stream was made: make another one")
        self.pruner.record = None  # of another forward
        with torch.no_grad(), at_rest(self.model):
            logits = self.model(**given).logits[0]
        record: Any = self.pruner.record
        if record is None:
            raise ValueError("nothing was pruned, so nothing says what is remembered: call it outside of dense(model)")
        inner = range(len(self.before), len(ids) - len(self.behind))
        layers, scores = departures(record.sites, len(ids))
        after = len(record.costs)  # a layer behind the last one
        ranked = sorted(inner, key=lambda i: (after if layers[i] is None else layers[i], scores[i] or 0.0, i))
        self.held = [ids[i] for i in sorted(ranked[len(ranked) - min(self.memory, len(ranked)) :])]
        return logits, float(record.used)


def _remembering(model: nn.Module) -> TokenPruner:
    """The method whose survivors are remembered.

    Raises:
        ValueError: there is none, it merges, or the model does not choose between classes.
    """
    inner: Any = inner_model(model)
    pruner = token_pruner_of(inner, "Stream")
    if pruner is None:
        raise ValueError(
            f"this {type(inner).__name__} is dense, so nothing says what is remembered: prune it, as in "
            "prune(model, TopK(keep=0.5))"
        )
    if pruner.merges:
        raise ValueError(f"{pruner.name} merges tokens, which cannot be read again: take a method that drops them")
    if inner.config.num_labels < 2 or not type(inner).__name__.endswith("ForSequenceClassification"):
        raise ValueError(f"this {type(inner).__name__} does not choose between classes: Stream takes a classifier")
    return pruner
