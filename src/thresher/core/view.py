"""What a method sees of one layer at which tokens leave. Everything is (B, N, ...), whatever the layout.

Shapes: B batch, N tokens, H heads, d channels of a head, C channels of a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .compat import check
from .scoring import CHUNK, Logits, Statistic, additive, columns, of_heads, reduce_over_heads, repeat_heads
from .tokens import CLOSED_LOG, Packed, Tokens, most, slots_of, take

if TYPE_CHECKING:
    from .pruner import Choice


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """What a layer's attention function was given: query (B, H, N, d), key and value, all (1, H, T, d) when packed."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool  # what the absence of a mask means
    logits: Logits

    def bias(self, mask: Tensor | None, length: int) -> Tensor | None:
        """``mask`` as fp32 bias of ``length`` queries."""
        return additive(mask, length, self.causal, self.query.device)


@dataclass(frozen=True, eq=False)
class Panel:
    """The query rows that make a score where some tokens alone vote: as many of each sequence as the one with the most
    voters has, so that others have rows without a vote behind theirs."""

    count: Any  # m; in a graph a symbol
    share: Tensor  # (B, m) fp32, of each row in the votes of its sequence

    @classmethod
    def of(cls, voters: Tensor, count: int | None = None) -> Panel:
        """The panel of ``voters`` (B, N) bool, at least one in each row; ``count``: the most, where it is known."""
        most_votes = most(voters) if count is None else count
        voting = voters.sum(1, keepdim=True)
        return cls(most_votes, (torch.arange(most_votes, device=voters.device) < voting) / voting)

    def slots(self, voters: Tensor) -> Tensor:
        """(B, m) slots of the ``voters`` (B, N) at one site, then any."""
        if torch.compiler.is_compiling():
            check(self.count <= voters.shape[1])
        return slots_of(voters, self.count)


@dataclass(frozen=True)
class Widths:
    """How many slots go on after each site of a graph of one shape."""

    slots: tuple[int, ...]
    capped: bool  # whether a row may want to keep more: then its best go on


@dataclass(eq=False, repr=False)
class Site:
    """One layer of one forward at which tokens may leave: what the layer shows, and what is decided."""

    layer: int  # 0-based number of the layer call
    number: int  # position of the layer in the method's ``at``; -1 where it has none
    tokens: Tokens  # those that entered the layer
    protected: Tensor  # (B, N) bool, tokens that never leave
    hidden: Tensor | None  # the states that entered the layer, in the layout of ``tokens``
    statistic: Statistic | None = None  # of the attention probabilities, where the score is made with the attention
    inputs: AttentionInputs | None = None  # what the layer showed: what its attention function was given,
    weights: Tensor | None = None  # its attention probabilities (B, H, N, N),
    scores: Tensor | None = None  # or the ``statistic`` of them (B, N)
    score: Tensor = None  # type: ignore[assignment]  # (B, N), the importance score, once it was made
    choice: Choice | None = None  # the method's, once it was made
    after: Tokens | None = None  # the tokens that go on, once they are known
    previous: Site | None = None  # the site before this one
    passed: bool = False  # whether nothing can leave here, so that the layer need show nothing
    counts: Tensor | None = None  # (B, S), how many tokens each row keeps, where the caller says so
    anchored: bool = False  # whether a token of each row is known to be protected
    states: Tensor | None = None  # of which some go on or are merged, in the layout of ``tokens``
    voters: Tensor | None = None  # (B, N) bool, the tokens whose attention makes the scores; None: all
    pictures: Tensor | None = None  # (B, N) long, see ``View.pictures``
    places: Tensor | None = None  # (3, B, N), see ``View.places``
    tower: Tensor | None = None  # (B, N), see ``View.tower``
    rotary: tuple[Tensor, Tensor] | None = None  # see ``View.rotary``
    spectrum: Tensor | None = None  # (B, F, T), see ``View.spectrum``
    panel: Panel | None = None  # the rows that these are
    width: int | None = None  # slots that go on, where a graph under construction has one shape
    capped: bool = False  # whether more may be kept than that, of which the best go on

    @property
    def acts(self) -> bool:
        """Whether tokens may leave here."""
        return self.number >= 0 and not self.passed

    @property
    def alive(self) -> Tensor:
        """(B, N) bool, the live tokens."""
        return self.tokens.alive

    @property
    def keep(self) -> Tensor:
        """(B, N) bool, the tokens that stay; all live ones where nothing was decided."""
        return self.tokens.alive if self.choice is None else self.choice.keep

    @property
    def votes(self) -> Tensor:
        """(B, N) fp32: what the attention of each token counts in a score; a row's sum is that of its live tokens, also
        where some ``voters`` alone have a vote."""
        votes = self.tokens.votes
        if self.voters is None:
            return votes
        some = votes * self.voters
        return some * (votes.sum(1, keepdim=True) / some.sum(1, keepdim=True))

    @property
    def view(self) -> View:
        """What a method may see."""
        return View(self.layer, self.number, self.tokens, self.protected, self)

    def release(self) -> None:
        """Let go of the layer's tensors; the decision and the score stay."""
        self.inputs = self.weights = self.hidden = self.states = self.scores = self.previous = None
        self.rotary = self.spectrum = None


@dataclass(frozen=True, eq=False)
class View:
    """What a method sees of one layer; read only.

    Attributes:
        layer: 0-based number of the layer call.
        site: position of the layer in the method's ``at``.
        tokens: the tokens that entered the layer.
        protected: (B, N) bool, tokens that never leave.
    """

    layer: int
    site: int
    tokens: Tokens
    protected: Tensor
    _shown: Site

    @property
    def alive(self) -> Tensor:
        """(B, N) bool, the live tokens."""
        return self.tokens.alive

    @property
    def open(self) -> Tensor:
        """(B, N) bool: the live tokens whose gate is not closed in a soft stage."""
        gate = self.tokens.log_gate
        return self.alive if gate is None else self.alive & (gate > CLOSED_LOG)

    @property
    def free(self) -> Tensor:
        """(B, N) bool: the open tokens that may leave."""
        return self.open & ~self.protected

    @property
    def counts(self) -> Tensor | None:
        """(B, S), how many tokens each row keeps, where the caller says so (``calling(model, counts=...)``)."""
        return self._shown.counts

    @property
    def pictures(self) -> Tensor | None:
        """(B, N) long: the number, within its row, of the picture, clip or sound that each token belongs to; -1: to
        none that may leave. None: the model reads none."""
        return self._shown.pictures

    @property
    def places(self) -> Tensor | None:
        """(3, B, N) long: frame, row and column of each token, counted from wherever its picture begins, by the
        positions that the model gives them (M-RoPE). None: these do not say."""
        return self._shown.places

    @property
    def tower(self) -> Tensor:
        """(B, N) fp32: the attention that the patches behind each token receive in the last but one layer of the tower,
        from its class token or, where it has none, from all patches; 0 for text."""
        tower = self._shown.tower
        assert tower is not None, "a method that asks for it says needs_tower"
        return tower

    @property
    def rotary(self) -> tuple[Tensor, Tensor] | None:
        """(1 or B, N, d) each: the cosines and sines by which the layer turns its queries and keys, shown where a
        method ``needs_rotary``; None: the model hands its layers none."""
        return self._shown.rotary

    @property
    def heads(self) -> int:
        """H of the queries; raises as ``key`` does."""
        return self._inputs("queries").query.shape[1]

    @property
    def spectrum(self) -> Tensor:
        """(B, F, T): the spectrogram that an encoder of sounds was given, F bands of T frames.

        Raises:
            RuntimeError: the model was not given one.
        """
        if self._shown.spectrum is None:
            raise RuntimeError("the model was called without input_features (B, F, T), a spectrogram")
        return self._shown.spectrum

    @property
    def previous(self) -> Site | None:
        """The site before this one in the same forward, with its tokens and its score; None at the first."""
        return self._shown.previous

    @property
    def hidden(self) -> Tensor:
        """(B, N, C), the states that entered the layer."""
        hidden = self._shown.hidden
        assert hidden is not None, "a site shows its states until its forward is over"
        return self.tokens.pad(hidden)

    @property
    def states(self) -> Tensor:
        """(B, N, C), the states of which some go on or are merged: behind the attention block where tokens leave inside
        the layer, as in BERT, else behind the layer."""
        states = self._shown.states
        assert states is not None, "states are shown where tokens leave, and not in a soft stage"
        return self.tokens.pad(states)

    @property
    def key(self) -> Tensor:
        """(B, H, N, d), the keys of the layer.

        Raises:
            RuntimeError: the layer shows its attention probabilities alone.
        """
        return self._padded(self._inputs("keys").key)

    @property
    def value(self) -> Tensor:
        """(B, H, N, d), the values of the layer, H as of the keys; raises as ``key`` does."""
        return self._padded(self._inputs("values").value)

    def _inputs(self, what: str) -> AttentionInputs:
        if self._shown.inputs is None:
            raise RuntimeError(
                f"layer {self.layer} shows its attention probabilities and not its {what}: choose a method that needs "
                f"no {what} for this model"
            )
        return self._shown.inputs

    def _padded(self, x: Tensor) -> Tensor:
        return self.tokens.pad(x.transpose(1, 2)).transpose(1, 2)

    @property
    def readout(self) -> Tensor:
        """(B,) slot of the token that the head reads: the first protected one, else the first live one; of a model that
        reads pictures, the last live one."""
        if self.pictures is not None:
            return (self.alive * torch.arange(1, self.alive.shape[1] + 1, device=self.alive.device)).argmax(1)
        some = self.protected.any(1, keepdim=True)
        return (self.protected | self.alive & ~some).long().argmax(1)

    def attention_received(self) -> Tensor:
        """(B, N) fp32: the attention each token receives, relative to uniform attention (live tokens average 1).

        The mean over heads and live query rows of the attention probabilities before dropout (LTP eq. 1, "column
        mean"), times the number of live tokens, so that thresholds carry over lengths. Padding and dead tokens neither
        vote nor receive; in a soft stage each row votes with its gate. With ``votes="protected"`` the rows of protected
        tokens alone vote.
        """
        return self.reduce_attention(columns)

    def reduce_attention(self, reduce: Statistic) -> Tensor:
        """(B, N) fp32: a statistic of the attention probabilities (see ``scoring``), mean over heads; 0 where dead."""
        shown = self._shown
        if shown.scores is not None and reduce is shown.statistic:
            scores = shown.scores
        elif shown.weights is not None:
            with torch.autocast(shown.weights.device.type, enabled=False):
                scores = reduce(shown.weights.float(), shown.votes, None) / shown.weights.shape[1]
        elif shown.panel is not None:
            scores = self._reduce_voters(shown.panel, reduce)
        elif isinstance(self.tokens, Packed):
            scores = self._reduce_packed(self.tokens, reduce)
        else:
            given = self._inputs("queries")
            bias = given.bias(given.mask, given.query.shape[-2])
            scores = reduce_over_heads(given.query, given.key, bias, shown.votes, given.logits, reduce)
        return scores.masked_fill(~self.alive, 0.0)

    def _reduce_packed(self, tokens: Packed, reduce: Statistic) -> Tensor:
        given, parts = self._inputs("queries"), []
        for sequence, length, (q, k, votes) in tokens.runs(given.query, given.key, tokens.as_state(self._shown.votes)):
            step = 1 if given.mask is not None else max(1, CHUNK // max(1, length * length))
            for i in range(0, len(q), step):
                mask = None if given.mask is None else tokens.sequence_mask(given.mask, sequence + i)
                some = q[i : i + step]
                causal = given.mask is None and given.causal  # a part without a mask lets everything through
                bias = additive(mask, length, causal, q.device)
                bias = tokens.biased(bias, sequence + i, len(some), length)
                vote = votes[i : i + step, 0, :, 0]
                parts.append(reduce_over_heads(some, k[i : i + step], bias, vote, given.logits, reduce).flatten())
        return tokens.pad(torch.cat(parts)[None])

    def _reduce_voters(self, panel: Panel, reduce: Statistic) -> Tensor:
        """``reduce_attention`` of the voters' rows alone."""
        assert self._shown.voters is not None, "a panel is made of voters"
        slots, given = panel.slots(self._shown.voters), self._inputs("queries")
        query, bias, votes = (
            self._queries(slots),
            self._bias(slots),
            panel.share * self.tokens.votes.sum(1, keepdim=True),
        )
        return reduce_over_heads(query, self.key, bias, votes, given.logits, reduce, slots)

    def _queries(self, slots: Tensor) -> Tensor:
        """(B, H, m, d): the queries at ``slots`` (B, m)."""
        return self.tokens.at(self._inputs("queries").query.transpose(1, 2), slots).transpose(1, 2)

    def _bias(self, slots: Tensor) -> Tensor | None:
        """(B, 1 or H, m or 1, N) fp32 or None: what hides keys from the rows at ``slots`` (B, m), with the soft gates
        and sizes, where there are any."""
        given, tokens, packed = self._inputs("queries"), self.tokens, isinstance(self.tokens, Packed)
        mask = given.mask
        if mask is None and given.causal:
            mask = (torch.arange(self.alive.shape[1], device=slots.device) <= slots[..., None])[:, None]
        elif mask is not None:  # in packed rows of original size
            if mask.shape[-2] == 1 or mask.stride(-2) == 0:  # the same for every query
                mask = mask[..., :1, :]
            else:
                mask = take(mask, tokens.index.gather(1, slots) if packed else slots, -2)
            mask = take(mask, tokens.index, -1) if packed else mask
        bias = additive(mask, 1, False, slots.device)
        if not packed:
            return bias
        own = torch.zeros_like(tokens.alive, dtype=torch.float32) if tokens.log_size is None else tokens.log_size
        own = own.masked_fill(~tokens.alive, float("-inf"))[:, None, None]
        return own if bias is None else bias + own

    def attention_from(self, slot: Tensor) -> Tensor:
        """(B, H, N) fp32: attention probabilities of one query row per sequence, at ``slot`` (B,)."""
        weights = self._shown.weights
        if weights is not None:
            at = slot.view(-1, 1, 1, 1).expand(-1, weights.shape[1], 1, weights.shape[-1])
            return weights.gather(2, at)[:, :, 0].float()
        return self.attention_rows(slot[:, None])[:, :, 0]

    def attention_rows(self, slots: Tensor, heads: slice = slice(None), decay: Tensor | None = None) -> Tensor:
        """(B, h, m, N) fp32: attention probabilities of the query rows at ``slots`` (B, m), of some ``heads``; their
        logits are first divided by ``decay`` (B, m, N), where it is given. Raises as ``key`` does."""
        given, query = self._inputs("queries"), self._queries(slots)
        with torch.autocast(query.device.type, enabled=False):
            key = repeat_heads(self.key, query)[:, heads].float().transpose(-1, -2)
            logits = given.logits.cap(query[:, heads].float() @ key * given.logits.scaling)
            logits, bias = logits if decay is None else logits / decay[:, None], self._bias(slots)
            logits = logits if bias is None else logits + of_heads(bias, heads)
        return given.logits.softmax(logits.masked_fill(~self.alive[:, None, None], float("-inf")), heads)


def departures(sites: Sequence[Site], count: int) -> tuple[list[int | None], list[float | None]]:
    """Of the first row of a forward, of ``count`` tokens: the layer at which each left, None where it stayed to the
    end; and its score there, or at the last site where any could leave."""
    layers: list[int | None] = [None] * count
    scores: list[float | None] = [None] * count
    for site in sites:
        if site.score is None:  # nothing leaves there, whatever the input
            continue
        columns = (site.tokens.index, site.alive, site.keep, site.score.float())
        for position, alive, keep, score in zip(*(column[0].tolist() for column in columns), strict=True):
            if alive:
                layers[position], scores[position] = None if keep else site.layer, score
    return layers, scores
