"""The contract of a method: which tokens stay.

    choice = choose(score(view), view)        one step, after layer i in ``at``; values in, values out

A method is a dataclass in a file of its own. Its fields are its configuration (they are what config.json gets), its
parameters ride in the model's weights, and it overrides what its paper changes of ``score``, ``choose``, ``gates``,
``loss``, ``phase`` and ``calibrate``. It never notices how tokens are removed.

Shapes: B batch, N tokens, S sites (the layers in ``at``).
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .architecture import Architecture
from .cost import LayerCost, LayerCount, dense_macs, macs
from .method import CONFIG_KEY as CONFIG_KEY
from .method import METHODS as METHODS
from .method import MODULE as MODULE
from .method import Pruner as Pruner
from .method import pruner_in as pruner_in
from .method import pruner_of as pruner_of
from .method import read_state as read_state
from .pictures import ALL, KINDS
from .scoring import Statistic, columns, first_best, full_precision
from .tokens import Tokens
from .view import Site, View, Widths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .hooks import Hooks

Batch = dict[str, Any]  # the arguments of one call of the model
RunAgain = Callable[..., Any]  # (**override): the model's output on the batch of the training step, run again
RunBatch = Callable[[Batch], "Record"]  # the record of the model's forward on another batch
PUT_BACK, SURVIVORS = POOLINGS = ("put-back", "survivors")
QUERY = "query"  # of ``protect``
PROTECTED = "protected"  # of ``votes``, besides "all"
EARLY = -1  # of ``at``: before the first layer
_LAST = threading.local()  # .records: the record of the last forward of each method, for the thread that ran it


@dataclass(frozen=True, eq=False)
class Choice:
    """What a method decides at a site.

    Attributes:
        keep: (B, N) bool, the tokens that stay. The base removes dead ones, adds protected ones, and keeps the floor.
        into: (B, N) long, the slot of the token that each one is merged into; None: what does not stay is dropped.
        weight: (B, N) fp32, what states are multiplied by before they are summed; None: means by size.
        longest: whether a sum gets the length of its longest term.
        macs: MACs of each row, a number or (B,), that the method's own score took.
    """

    keep: Tensor
    into: Tensor | None = None
    weight: Tensor | None = None
    longest: bool = False
    macs: Tensor | int = 0


@dataclass(eq=False)
class Record:
    """What happened in one forward: the sites, and the tokens of every layer."""

    sites: list[Site]
    counts: list[LayerCount]
    costs: tuple[LayerCost, ...]
    token_mask: Tensor | None = None  # (B, N0), 1 for the tokens that are left at the end, where these are pooled
    answers: Any = None  # the model's output, where a trainer looks at a calibration set
    left: Tokens | None = None  # the tokens that are left at the end
    entered: Tensor | None = None  # (B,) tokens that entered, where some left before the first layer
    pictures: Tensor | None = None  # (B, N0) long, the picture of each token, see ``View.pictures``

    @property
    def started(self) -> Tensor:
        """(B,) tokens that the dense model would run on."""
        return self.counts[0].n_attention if self.entered is None else self.entered

    @property
    def used(self) -> Tensor:
        """Scalar: MACs of the forward, expected ones in a soft stage (differentiable)."""
        return macs(self.costs, self.counts).sum()

    @property
    def dense(self) -> Tensor:
        """Scalar: MACs of the dense model on the same tokens without padding."""
        return dense_macs(self.costs, self.started).sum()

    def flops_fraction(self) -> Tensor:
        """Scalar: ``used / dense``."""
        return self.used / self.dense

    def entering(self, layer: int) -> Tokens:
        """The tokens that entered a layer, or that are left where there is none of this number any more."""
        later = [site.tokens for site in self.sites if site.layer >= layer]
        tokens = later[0] if later else self.left
        assert tokens is not None, "a forward says what is left"
        return tokens

    def kept(self) -> list[Tensor]:
        """(B,) tokens that go on after each layer."""
        return [*(count.n_attention for count in self.counts[1:]), self.counts[-1].n_ffn]


@dataclass(frozen=True, eq=False)
class Options:
    """What one thread asks of its forwards for a while; read once, when a forward begins.

    Attributes:
        mode: "pruned"; "unpadded": the layout at work with nothing leaving; "dense": the model as it is.
        protect: (B, N) bool, tokens of this batch that never leave, in place of the method's own.
        counts: (B, S) long, how many tokens each row keeps, for ``keep="replay"``.
        gates: in place of the method's own soft gates, see ``TokenPruner.gates``.
        calls: gets the record and the arguments of each forward, where one step of a training has several.
        widths: of the sites of a graph under construction that has one shape.
    """

    mode: str = "pruned"
    protect: Tensor | None = None
    counts: Tensor | None = None
    gates: Callable[[Tensor, View], Tensor] | None = None
    calls: list[tuple[Record, Batch]] | None = None
    widths: Widths | None = None


class TokenPruner(Pruner):
    """Base class of the methods; each subclass is a dataclass.

    Args:
        at: 0-based layers after whose attention tokens leave; the score of layer i decides what goes on from i.
            Default: a quarter, a half and three quarters of the depth. -1 is before the first layer, of a language
            model that reads pictures or sounds or of an encoder of these.
        protect: tokens that never leave: positions among the live tokens (negative ones from the end);
            ``{"ids": [...]}`` for token ids; ``{"until": [...]}`` for all up to the first of these ids behind the first
            token, the query of a pair; "query" for that with the separator of the model's configuration, or of a
            CrossEncoder's tokenizer. Default: the first token of text encoders, the last of decoders, class,
            distillation and register tokens of vision models; the query of a CrossEncoder. See also ``calling``.
        votes: whose attention makes the score: that of "all" tokens, or of the "protected" ones alone. Default: all;
            where an encoder's query is protected the protected ones, so that a text keeps what that looks at.
        min_tokens: rows with fewer tokens are left alone.
        modality: what may leave of the prompt of a model that reads pictures or sounds: "image", "video", "audio" or
            "all" of them, which is the default. The text never leaves.
        pooling: what pools the states of an embedder: "put-back", all tokens, those that left with their last states;
            "survivors", those in ``output.token_mask`` (B, N) alone, as a SentenceTransformer pruned as a whole does.
    """

    at: tuple[int, ...] | None = field(default=None, kw_only=True)
    votes: str | None = field(default=None, kw_only=True)
    protect: Any = field(default=None, kw_only=True)
    min_tokens: int = field(default=0, kw_only=True)
    pooling: str = field(default=PUT_BACK, kw_only=True)
    modality: str | None = field(default=None, kw_only=True)

    layouts: ClassVar[tuple[str, ...]] = ("mask", "padded", "packed")
    lr: ClassVar[float] = 2e-2  # learning rate of its own parameters, where no other is given
    # Not annotated is what a method may make a field, or set for itself.
    min_keep = 1  # tokens that a row keeps at least
    ranking = "attention"  # what the teacher ranks tokens by: the attention received in its last layer, or "saliency"
    soft_until = 0.0  # share of the training that is soft; a field where a method has a soft stage
    needs_attention: ClassVar[bool] = True
    needs_values: ClassVar[bool] = False  # whether the score takes the keys or values of the layer
    scores_all: ClassVar[bool] = True  # whether the score takes all attention probabilities, which are then charged
    scores_row: ClassVar[bool] = False  # whether it takes one row of them, which is charged instead
    merges = False  # whether tokens are merged into others
    at_entry: ClassVar[bool] = False  # whether tokens leave before the first layer of a language model, at -1, alone
    enters: ClassVar[bool] = False  # whether what it does before the first layer asks for no attention, unlike the rest
    sized: ClassVar[bool] = False  # whether keys then weigh by the number of tokens that they stand for
    needs_rotary: ClassVar[bool] = False  # whether the score takes the turns of rotary positions
    needs_tower: ClassVar[bool] = False  # whether the score takes what the tower of pictures attends to
    predictor_macs = 0  # of a predictor, for each token at a site

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.soft_until <= 1:
            raise ValueError(f"soft_until={self.soft_until}: expected a share of the training in [0, 1]")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling={self.pooling!r}: expected {' or '.join(POOLINGS)}")
        if not isinstance(self.min_tokens, int) or isinstance(self.min_tokens, bool) or self.min_tokens < 0:
            raise ValueError(f"min_tokens={self.min_tokens!r}: expected a number of tokens, from 0 up")
        if self.votes not in (None, ALL, PROTECTED if self.votable else ALL):
            what = f"{ALL} or {PROTECTED}" if self.votable else f"nothing: {self.name} takes no score of all rows"
            raise ValueError(f"votes={self.votes!r}: expected {what}")
        if self.modality not in (None, *KINDS, ALL):
            raise ValueError(f"modality={self.modality!r}: expected {', '.join(KINDS)} or {ALL}")
        check_protect(self.protect)
        self.cache: Pruner | None = None  # what prunes the cache of the tokens that are left, where something does
        self.at = None if self.at is None else tuple(int(i) for i in self.at)
        self.progress = 1.0

    @property
    def statistic(self) -> Statistic:
        """What the score takes of the attention probabilities: it is made with the attention where that is possible.
        Default: the attention received."""
        return columns

    @property
    def votable(self) -> bool:
        """Whether tokens vote in the score: it is a sum over the rows of the attention probabilities."""
        return self.needs_attention and self.scores_all

    @property
    def ranks_teacher(self) -> bool:
        """Whether ``loss`` wants the teacher's ranking."""
        return False

    @property
    def needs_table(self) -> bool:
        """Whether the budget is one of time, priced by ``table``, a LatencyTable."""
        return False

    def attachment(self, model: PreTrainedModel, layout: str, original: str | None = None) -> Hooks:
        """The hooks that run this method in ``model``."""
        from .hooks import Hooks  # which runs what stands here

        return Hooks(model, self, layout, original)

    def to_dict(self) -> dict:
        """What config.json gets; ``from_dict`` takes it back."""
        entry = {**super().to_dict(), "at": list(self.sites) if hasattr(self, "sites") else self.at}
        return entry if self.cache is None else {**entry, "cache": self.cache.to_dict()}

    @classmethod
    def completed(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """As of every method: an entry that does not know of votes has those of all tokens."""
        return {"votes": ALL} | fields

    # --- what a method overrides ---------------------------------------------------------------------------------
    def score(self, view: View) -> Tensor:
        """(B, N): the importance score of each token. Default: the attention received, relative to uniform."""
        return view.attention_received()

    def choose(self, score: Tensor, view: View) -> Choice:
        """Which tokens stay, by their score."""
        raise NotImplementedError(f"{type(self).__name__} does not say which tokens to keep")

    def score_and_choose(self, view: View) -> tuple[Tensor, Choice]:
        """Score and choose; for methods that find both in one look."""
        score = self.score(view)
        return score, self.choose(score, view)

    def gates(self, score: Tensor, view: View) -> Tensor:
        """(B, N) log of the gate of each token, while ``soft``. The base leaves protected tokens and the floor open."""
        raise NotImplementedError(f"{type(self).__name__} has no soft stage")

    def build(self, model: Architecture) -> None:
        """Create the parameters, once the model is known and ``at`` is settled."""

    def default_at(self, model: Architecture) -> tuple[int, ...]:
        """The layers to prune at when none were named."""
        quarters = (-(-model.depth * q // 4) - 1 for q in (1, 2, 3))
        return tuple(sorted({min(max(i, model.first_site), model.last_site) for i in quarters}))

    def width(self, slots: int, site: int) -> int | None:
        """An upper bound on the tokens a row keeps of ``slots`` at a site, where it follows from the shape alone."""
        return None

    def keeps_all(self, site: int) -> bool:
        """Whether nothing leaves at a site, whatever the input: evaluation then passes it by, without a score; not so
        under torch.compile."""
        return False

    def phase(self, progress: float) -> str:
        """Name the training stage at ``progress`` (0..1)."""
        return "soft" if progress < self.soft_until else "hard"

    def loss(self, forward: RunAgain, batch: Batch, record: Record, teacher: Any = None) -> Tensor | float:
        """What the method adds to the task loss. ``forward(**override)`` runs the model again on the batch and returns
        its output; ``teacher``: the answers of the teacher, a mapping of tensors. Parameters that have no part in it
        take part all the same, with weight 0 (see ``rest``)."""
        return self.rest()

    def prepare(self, forward: RunBatch, batches: Iterable[Batch]) -> None:
        """Look at a calibration set before a training begins or goes on; arguments as in ``calibrate``."""

    def calibrate(self, forward: RunBatch, batches: Iterable[Batch]) -> dict[str, float]:
        """Bring the method onto its budget on a calibration set; returns what was reached (empty: it has none).

        ``forward(batch)`` runs the model and returns the ``Record``.
        """
        return {}

    def ablations(self, judge: Callable[[], tuple[float, float]]) -> dict[str, float]:
        """Measure, once training is over, what a part of the method is worth; the method is then as before.

        judge: gives quality in points, and the share of the dense MACs, on the validation part as the method is now.
        """
        return {}

    def metrics(self) -> dict[str, float]:
        """What to watch while training; ``PruningTrainer`` logs it."""
        return {}

    # --- what is the same for all --------------------------------------------------------------------------------
    @property
    def soft(self) -> bool:
        """Whether tokens fade (gates) instead of leaving: only in training, in a soft phase."""
        return self.training and self.phase(self.progress) == "soft"

    def rest(self) -> Tensor | float:
        """0, of all parameters: they take part in every backward, as DDP expects."""
        return sum((0.0 * parameter.sum() for parameter in self.parameters()), 0.0)

    def bind(self, model: Architecture) -> None:
        """Settle ``at`` for a model and create the parameters.

        Raises:
            ValueError: a layer in ``at`` does not exist or can save nothing.
        """
        super().bind(model)
        at = self.at
        if at is None:
            at = (EARLY,) if self.at_entry else self.default_at(model)
        self.check_modality(model, at)
        for layer in at:
            entry = layer == EARLY and model.enterable
            if not entry and not model.first_site <= layer <= model.last_site:
                raise ValueError(
                    f"at={list(at)}: layer {layer} is not possible in {model.name}; its {model.depth} layers can be "
                    f"pruned at {model.first_site}..{model.last_site} (0-based)"
                )
        if list(at) != sorted(set(at)):
            raise ValueError(f"at={list(at)}: expected rising layers without repetition")
        if self.protect == QUERY:
            self.protect = {"until": [separator_of(model)]}
        self.settle_votes(model)
        self.sites = tuple(at)
        self.build(model)

    def check_modality(self, model: Architecture, at: tuple[int, ...]) -> None:
        """Raise ValueError where a model reads nothing that may leave, or the method cannot act before its layers."""
        known = model.placeholders
        if model.base is None:
            return
        if self.modality not in (None, ALL, *known):
            reads = f"reads {', '.join(known)} and text" if known else "reads text alone, or is a tower"
            raise ValueError(f"modality={self.modality!r}: {model.name} {reads}")
        if self.at_entry and (not known or at != (EARLY,)):
            what = "the layers of a language model that reads pictures or sounds"
            raise ValueError(f"{self.name} acts before {what}, at={EARLY}; got at={list(at)} in {model.name}")
        if EARLY not in at or not model.enterable:
            return
        if self.soft_until > 0:
            raise ValueError(f"at={list(at)}: tokens fade within the layers and not before them; give soft_until=0")
        if (self.needs_attention or self.needs_values) and not self.enters:
            others = "divprune, cdpruner, visionzip, grid or random" if known else "random"
            raise ValueError(
                f"at={list(at)}: before layer 0 there is no attention to go by, which {self.name} needs; choose "
                f"at=(1,), or {others}"
            )

    def settle_votes(self, model: Architecture) -> None:
        """Decide whose attention makes the score, where nobody has."""
        queried = isinstance(self.protect, dict) and "until" in self.protect
        if self.votes is None:
            self.votes = PROTECTED if queried and self.votable and not model.causal else ALL
        elif self.votes == PROTECTED and queried and model.causal:
            raise ValueError(f"votes='{PROTECTED}': in a decoder such as {model.name} a query sees no token behind it")

    @property
    def protected_positions(self) -> tuple[int, ...] | None:
        """Positions among the live tokens that never leave; None where the tokens of a batch say so."""
        return None if self.architecture.reader is not None else self._positions

    @property
    def _positions(self) -> tuple[int, ...] | None:
        protect = self.architecture.protected if self.protect is None else self.protect
        return tuple(protect) if isinstance(protect, (tuple, list)) else None

    @property
    def protects_some(self) -> bool:
        """Whether a token of each row is protected, whatever the batch."""
        queried = isinstance(self.protect, Mapping) and "until" in self.protect
        return queried or bool({0, -1} & {*(self.protected_positions or ())})

    @property
    def protects_one(self) -> bool:
        """Whether that is one token."""
        return self.protected_positions in ((0,), (-1,)) and self.min_tokens < 2

    def protection(self, alive: Tensor, ids: Tensor | None, protect: Tensor | None = None) -> Tensor:
        """(B, N) bool: the protected tokens among those ``alive`` (B, N); ``protect`` (B, N): this batch's own."""
        if protect is not None and protect.shape != alive.shape:
            raise ValueError(f"protect has shape {tuple(protect.shape)}, the batch has {tuple(alive.shape)}")
        rank, live = alive.cumsum(1) - 1, alive.sum(1, keepdim=True)
        positions = self._positions
        if protect is not None:
            protected = protect.to(alive.device).bool()
        elif positions is None:
            protected = self.protected_tokens(alive, ids, rank)
        else:
            protected = torch.zeros_like(alive)
            for position in positions:
                protected = protected | (rank == (position if position >= 0 else live + position))
        if self.min_tokens > 1:
            protected = protected | (live < self.min_tokens)
        return protected & alive

    def protected_tokens(self, alive: Tensor, ids: Tensor | None, rank: Tensor) -> Tensor:
        """(B, N) bool: what ``protect`` says of the token ``ids`` (B, N); ``rank`` (B, N): among the live tokens."""
        if ids is None:
            raise ValueError(f"protect={self.protect!r} needs input_ids, the model was called without")
        ((what, named),) = self.protect.items()
        found = torch.isin(ids, torch.as_tensor(named, device=ids.device)) & alive
        if what == "ids":
            return found
        found = (found & (rank > 0)).long()
        query = found.cumsum(1) == found
        if not torch.compiler.is_compiling() and not bool((alive & ~query).any()) and bool((rank > 0).any()):
            warnings.warn(
                f"protect={self.protect!r} protects every token of this batch, so that nothing is pruned: it is meant "
                "for pairs of a query and a text, with a separator between them",
                stacklevel=2,
            )
        return query

    def check_readout(self, model: Architecture) -> None:
        """Raise ValueError where no token is protected whose attention a score could go by."""
        if self.protected_positions == ():
            raise ValueError(
                f"{self.name} is not possible with {model.name}, which has no class token: name one whose attention "
                "counts, as in protect=(0,)"
            )

    # --- one site ------------------------------------------------------------------------------------------------
    def best(self, score: Tensor, protected: Tensor, alive: Tensor) -> Tensor:
        """(B, N) bool: the ``min_keep`` best tokens of each row among those ``alive``, protected ones first."""
        order = score.masked_fill(protected, float("inf")).masked_fill(~alive, float("-inf"))
        return order >= order.topk(min(self.min_keep, order.shape[1])).values[:, -1:]

    def select(self, site: Site) -> None:
        """Make the score and the choice of a site: live tokens alone, protected ones always, ``min_keep`` at least."""
        view = site.view
        with full_precision(view.alive.device):
            site.score, choice = self.score_and_choose(view)
        keep = choice.keep & view.alive | view.protected
        if self.min_keep > 1:
            keep = keep | self.best(site.score, view.protected, view.alive) & view.alive
        elif not site.anchored:
            best = site.score.masked_fill(~view.alive, float("-inf")).argmax(1, keepdim=True)
            only = torch.zeros_like(keep).scatter(1, best, True) & view.alive
            keep = keep | only & ~keep.any(1, keepdim=True)
        if site.capped:
            keep = keep & first_best(site.score.masked_fill(view.protected, float("inf")), keep, site.width)
        site.choice = dataclasses.replace(choice, keep=keep)

    def reduce(self, site: Site) -> Tokens:
        """The tokens after a site: the others are dropped, or merged."""
        choice = site.choice
        assert choice is not None, "select() comes first"
        width, graph = site.width, torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        # in a graph of all shapes widths that follow from the shape make formulas of formulas: there the data says
        if width is None and graph and self.min_tokens < 2:
            width = self.width(choice.keep.shape[1], site.number)
        if choice.into is None:
            return site.tokens.drop(choice.keep, width)
        return site.tokens.merge(choice.keep, choice.into, choice.weight, width, self.sized, choice.longest)

    def soften(self, site: Site, gates: Callable[[Tensor, View], Tensor] | None = None) -> Tensor:
        """(B, N) logarithm of the gates of a site in a soft stage: open for protected tokens, for the floor and where
        nothing lives. ``gates`` stands in for the method's own."""
        view = site.view
        if gates is not None:
            return gates(site.score, view)
        with full_precision(view.alive.device):
            site.score = self.score(view)
        opened = view.protected | ~view.alive
        if self.min_keep > 1:
            opened = opened | self.best(site.score.detach(), view.protected, view.open)
        return self.gates(site.score, view).masked_fill(opened, 0.0)

    # --- the record ----------------------------------------------------------------------------------------------
    @property
    def record(self) -> Record | None:
        """The record of the last forward that this thread ran; None: there is none."""
        return _records().get(self)

    @record.setter
    def record(self, record: Record | None) -> None:
        if record is None:
            _records().pop(self, None)
        else:
            _records()[self] = record

    def last_record(self) -> Record:
        """The record of the last forward that this thread ran.

        Raises:
            RuntimeError: there is none.
        """
        if self.record is None:
            raise RuntimeError(
                "no forward has been recorded yet in this thread: call the model first (compiled models record nothing)"
            )
        return self.record

    @property
    def picture_report(self) -> dict:
        """What this thread's last forward left of pictures and sounds; empty where the model reads none.

        ``pictures``, ``kept``: for each row the tokens of each picture, and how many are left at the end. ``by_layer``:
        tokens of pictures that enter each layer, all rows together; ``mean``: their mean, which papers call the number
        of visual tokens. ``flops_fraction``: of the MACs of the language model's layers. ``cache_fraction``: of the
        entries that its cache would hold. A tower costs what it cost.
        """
        record = self.last_record()
        if record.pictures is None or record.left is None:
            return {}
        pictures, left = record.pictures, record.left.spread_votes() > 0
        many = int(pictures.max()) + 1
        whole = torch.stack([(pictures == number).sum(1) for number in range(many)], 1) if many else pictures[:, :0]
        kept = torch.stack([(left & (pictures == number)).sum(1) for number in range(many)], 1) if many else whole
        text = record.started - whole.sum(1)
        entering = [count.n_attention for count in record.counts]
        by_layer = [int((tokens - text).sum()) for tokens in entering]
        pairs = zip(kept.tolist(), whole.tolist(), strict=True)
        return {
            "pictures": [[n for n in row if n] for row in whole.tolist()],
            "kept": [[n for n, size in zip(*rows, strict=True) if size] for rows in pairs],
            "by_layer": by_layer,
            "mean": sum(by_layer) / len(by_layer),
            "flops_fraction": float(record.flops_fraction()),
            "cache_fraction": float(sum(entering).sum() / (record.started.sum() * len(entering))),  # type: ignore[union-attr]
        }

    @property
    def report(self) -> list[dict]:
        """This thread's last forward, layer by layer: tokens entering, tokens kept, MACs, and the dense MACs.

        Sums over the batch; padding is not counted.
        """
        record = self.last_record()
        start = record.started.float()
        return [
            {
                "layer": layer,
                "tokens_in": count.n_attention.sum().item(),
                "tokens_kept": after.sum().item(),
                "macs": macs([cost], [count]).sum().item(),
                "dense_macs": cost.macs(start, start).sum().item(),
            }
            for layer, (cost, count, after) in enumerate(zip(record.costs, record.counts, record.kept(), strict=True))
        ]


def token_pruner_of(model: nn.Module, verb: str) -> Any:
    """The method that prunes the tokens of ``model``; None where nothing does.

    Raises:
        ValueError: it prunes something else, which ``verb`` cannot take.
    """
    pruner = pruner_of(model)
    if pruner is None or isinstance(pruner, TokenPruner):
        return pruner
    raise ValueError(f"{type(pruner).__name__} prunes a KV cache; {verb} takes a method that prunes tokens, as TopK")


def check_protect(protect: Any) -> None:
    """Raise ValueError unless ``protect`` is something that a method takes."""
    if isinstance(protect, Tensor):
        raise ValueError("protect takes positions or ids; tokens of one batch: with calling(model, protect=mask)")
    positions = isinstance(protect, (tuple, list)) and all(isinstance(position, int) for position in protect)
    named = isinstance(protect, Mapping) and len(protect) == 1 and {*protect} <= {"ids", "until"}
    if not (protect is None or protect == QUERY or positions or named):
        raise ValueError(
            f"protect={protect!r}: expected positions as in (0, -1), {{'ids': [...]}}, {{'until': [...]}} or '{QUERY}'"
        )


def query_of(separator: int | None, protect: Any = None) -> dict[str, Any]:
    """The option of a method that keeps the query of a pair; none where ``protect`` is given, or no token ends it."""
    return {} if separator is None or protect is not None else {"protect": {"until": [separator]}}


def separator_of(model: Architecture) -> int:
    """The id of the token that ends the query of a pair, as the model's configuration has it."""
    separator = getattr(model.base.config, "sep_token_id", None)
    if separator is None:
        raise ValueError(
            f"protect='{QUERY}' needs the id of the separator, which the configuration of {model.name} does not say: "
            "give protect={'until': [tokenizer.sep_token_id]}, or prune a CrossEncoder"
        )
    return separator


def _records() -> WeakKeyDictionary[TokenPruner, Record]:
    if not hasattr(_LAST, "records"):
        _LAST.records = WeakKeyDictionary()
    return _LAST.records
