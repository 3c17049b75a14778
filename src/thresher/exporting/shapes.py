"""Graphs of one text and one length each: how many slots go on after each site is known before the graph is made.

The width of a site follows from the length, the kept count of a text from its own tokens: what is behind these is
masked. So a text that is shorter than its graph is answered as the model answers it. Where counts depend on the data
(thresholds) the width is a quantile of what texts of that length keep, and of a text that keeps more the best tokens
go on.

Shapes: N tokens, S sites.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..api import MODULE, inner_model
from ..core.architecture import find_architecture
from ..core.pruner import TokenPruner
from ..core.view import Widths

LENGTHS = (32, 64, 128, 256, 512)
QUANTILE = 0.99  # of the texts keep no more tokens than a site has slots
ENOUGH = 20  # texts of the length of a graph; of fewer the shares of all texts are taken


def check_lengths(lengths: Sequence[int], longest: int) -> tuple[int, ...]:
    """The lengths of graphs, rising; those of ``LENGTHS`` up to ``longest``, where none are given.

    Raises:
        ValueError: one is no number of tokens, or is more than the model takes.
    """
    if not lengths:
        return tuple(sorted({*(n for n in LENGTHS if n < longest), min(longest, LENGTHS[-1])}))
    if not all(isinstance(n, int) and 0 < n <= longest for n in lengths):
        raise ValueError(f"lengths={tuple(lengths)}: expected numbers of tokens from 1 to {longest}")
    return tuple(sorted(set(lengths)))


def check_encoder(model: Any) -> None:
    """Raise ValueError where padding behind a text would be read: of a decoder."""
    inner = inner_model(model)
    if find_architecture(inner).causal:
        raise ValueError(f"{type(inner).__name__} is a decoder: of fixed lengths it would answer from the padding")


def length_for(lengths: Sequence[int], tokens: int) -> int | None:
    """The least of rising ``lengths`` that has room for so many tokens; None: none has."""
    at = bisect.bisect_left(lengths, tokens)
    return lengths[at] if at < len(lengths) else None


def filled(inputs: dict[str, Tensor], length: int, pad: int) -> dict[str, Tensor]:
    """``inputs`` (1, N) with padding behind them, (1, ``length``)."""
    rest = length - inputs["input_ids"].shape[1]
    return {name: F.pad(x, (0, rest), value=pad if name == "input_ids" else 0) for name, x in inputs.items()}


def spread(x: Tensor, tokens: int, wide: int) -> Tensor:
    """(1, ``wide``, ...): what an output (1, N, ...) has for so many tokens, 0 behind them."""
    return F.pad(x[:, :tokens], (0, 0) * (x.dim() - 2) + (0, wide - tokens))


class Answer(dict):
    """The names of the tensors that a model answers with, and whether they have a place for each token; ``kind``: the
    class of its answers."""

    kind: type[dict]


def outputs_of(model: Any, few: dict[str, Tensor], more: dict[str, Tensor]) -> Answer:
    """What a model answers with: those tensors have a place for each token that are longer for ``more`` tokens than for
    ``few``."""
    one, other = model(**few), model(**more)
    answer = Answer({name: x.shape != other[name].shape for name, x in one.items() if isinstance(x, Tensor)})
    answer.kind = type(one)
    return answer


def widths_of(
    model: Any, lengths: Sequence[int], texts: Iterable[dict[str, Tensor]] | None
) -> tuple[dict[int, Widths | None], dict[int, float]]:
    """The widths of the sites at each of rising ``lengths``; the shares of ``texts`` of which more would stay there.

    Raises:
        ValueError: the texts say how many tokens stay, and there are none.
    """
    pruner, counts = getattr(model, MODULE, None), None
    found: dict[int, Widths | None] = {}
    cut: dict[int, float] = {}
    for shorter, length in zip((0, *lengths), lengths, strict=False):
        found[length] = None if pruner is None else widths_by_length(pruner, length)
        if pruner is None or found[length] is not None:
            continue
        if not texts:
            raise ValueError(
                f"{pruner.name} keeps as many tokens as the text wants: a graph of one length needs texts to see how "
                "many that are, give calibration= (--data on the command line)"
            )
        counts = counts_of(model, texts) if counts is None else counts
        found[length], cut[length] = _measured(pruner, counts, shorter, length)
    return found, cut


def widths_by_length(pruner: TokenPruner, length: int) -> Widths | None:
    """The widths of the sites, where they follow from the length alone."""
    slots, found = length, []
    for site in range(len(pruner.sites)):
        width = slots if pruner.keeps_all(site) else pruner.width(slots, site)
        if width is None:
            return None
        slots = min(slots, max(width, min(pruner.min_keep, slots), pruner.min_tokens - 1))
        found.append(slots)
    return Widths(tuple(found), capped=False)


def _measured(pruner: TokenPruner, counts: Tensor, shorter: int, length: int) -> tuple[Widths, float]:
    """The widths of the sites at ``length``, and the share of texts longer than ``shorter`` that want more."""
    own = counts[(counts[:, 0] > shorter) & (counts[:, 0] <= length)]
    rows = own if len(own) >= ENOUGH else (counts * (length / counts[:, :1])).ceil()
    most, slots = torch.quantile(rows[:, 1:].float(), QUANTILE, dim=0, interpolation="higher"), length
    found = []
    for site in range(len(pruner.sites)):
        slots = slots if pruner.keeps_all(site) else max(1, min(slots, math.ceil(float(most[site]))))
        found.append(slots)
    own = own if len(own) else rows
    return Widths(tuple(found), capped=True), float((own[:, 1:] > torch.tensor(found)).any(1).float().mean())


@torch.no_grad()
def counts_of(model: Any, texts: Iterable[dict[str, Tensor]]) -> Tensor:
    """(T, 1 + S): the tokens of each text, and how many of them are left after each site."""
    pruner, rows = getattr(model, MODULE), []
    for inputs in texts:
        model(**inputs)
        record = pruner.last_record()
        rows.append(torch.stack([record.started, *(site.keep.sum(1) for site in record.sites)], 1).cpu())
    return torch.cat(rows)


@contextmanager
def one_shape(model: Any, widths: Widths | None) -> Iterator[None]:
    """Prune to these widths within."""
    pruner = getattr(model, MODULE, None)
    if pruner is None:
        yield
        return
    with pruner.hooks.asking(widths=widths):
        yield


def row_of(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row (1, N) of a batch (B, N), without the padding behind it."""
    mask = inputs.get("attention_mask")
    many = next(iter(inputs.values())).shape[1]
    if mask is not None:
        many = max(1, int((mask[row].bool() * torch.arange(1, many + 1, device=mask.device)).max()))
    return {name: x[row : row + 1, :many] for name, x in inputs.items()}
