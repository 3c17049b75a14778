"""ToP: constraint-aware, ranking-distilled token pruning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..core.architecture import Architecture
from ..core.cost import LatencyTable, between, dense_macs, macs, tokens_by_layer
from ..core.pruner import Batch, Choice, Record, RunAgain, RunBatch, TokenPruner
from ..core.tokens import CLOSED
from ..core.view import View
from .parts.budget import OutOfReach
from .parts.gates import Ascend, chance, odds, rounded, sample
from .parts.rank_bins import bin_of, first_bins, kept_of_bins, nearest_mask, within
from .parts.rank_distillation import RANK_LOSSES, RANKINGS, overlap, ranking_loss, taught_by
from .parts.selection import all_but_last, check_fusing, check_schedule, fused, ranks

TARGETS = ("target_flops", "target_latency", "target_latency_ms")
OVER = 1.02  # times the target: above, a schedule is over budget
BOUND = math.log(100)  # of the parameters, their log odds
GATE, WORST = 0.98, 0.9  # the chance of a gate, and of the last bin of the first site, to be on at the start
DEEPER = 3.0  # how much lower the odds of the last site start
FAINT = 1e-6  # the least score, relative to uniform attention, whose logarithm is taken
EDGE = 0.03  # of the bins, over which the odds of a schedule go from one end to the other
STIFF = 100.0  # the multiplier of the squared excess where the training starts


class ToP(TokenPruner):
    """Keep bins of relative rank, learned under a constraint on the expected cost (Li, Zhang, Xu, Wang, Yan, Xia, Yang,
    Cao, Sun, Deng, Zhang and Yang, "Constraint-aware and Ranking-distilled Token Pruning for Efficient Transformer
    Inference", KDD 2023), after its released code.

    At a site the survivors are ranked by the attention received and fall into ``bins`` of equal relative rank. A mask
    over the bins, one per site and the same for all inputs, says which bins stay; a gate, where there is one, says
    whether the site prunes at all. In the soft stage masks and gates are random (hard concrete) and learn with the
    weights under the Lagrangian m1 (c - t) + m2 (c - t)^2: c is the expected cost, m1 and m2 ascend, and t falls to the
    target over the ``ramp``. Afterwards they are fixed: in each site as many bins are off as are expected to be, those
    with the least odds. The ranking of the teacher's last layer is distilled into the first third of the layers.

    Args:
        target_flops: MACs to be left, as a fraction of the dense model's on the same unpadded inputs. 0.4 where no
            other target is given.
        target_latency: instead, time to be left, as a fraction of the dense model's without padding.
        target_latency_ms: instead, mean milliseconds per example. Both are priced by a measured ``LatencyTable``, which
            ``PruningTrainer`` makes; a loop of one's own says ``pruner.table = latency_table(model)``.
        bins: of relative rank, per site. The paper: 20 to 100, more for long texts.
        topk: tokens of the teacher's ranking that are distilled.
        ranking: "attention", what tokens receive in the teacher's last layer (of one that finds answers, its logits),
            or "saliency", how much its answer hangs on each token, see ``parts.saliency.answer_saliency``.
        rank_loss: "arp2" (pairs of a best token and any other, weighted by the difference of their ranks), "ndcg"
            (LambdaRank's weights), "arp2-topk" (the paper's) or "none"; see ``parts.rank_distillation``.
        rank_weight: of the ranking loss.
        rank_decay: share of ``rank_weight`` that is left after the ramp.
        site_gates: whether there are gates; without, every site prunes. A site whose gate is off, or whose mask lets
            everything stay, is not scored in evaluation.
        holes: whether masks may have holes; without, a site keeps its best ranks, in as many bins as the odds of all
            its bins say, in the hard stage and in evaluation.
        floor: so many of the best tokens that may leave stay. Default 2; with a ``schedule``, which says how many, 0.
        ramp, soft_until: shares of the training.
        schedule: the odds start where these shares of a site's survivors, one for each, are expected to stay.
        fuse: as of ``LTP``; the fused token comes on top, and is counted in the expected cost.

    | paper | here | why |
    |---|---|---|
    | scores: means over all rows, with padding and what has left | over live rows alone | ranks do not depend on the batch |
    | floor of a fraction finds the bin | whole numbers, shifted by a hash of the number of tokens | short texts of many lengths would meet in few bins, which then decide for all |
    | a mask scales states in training and hides keys in inference | log(mask) on the key in both, 1e-8 for 0; masks multiply over the sites | 0 is removal and 1 presence, in training as in inference |
    | masks are fractions | rounded straight through, as gates are | products of fractions remove far more than is counted |
    | one draw for the batch | one for each text | theirs has tens of thousands of steps, ours hundreds |
    | odds start alike | fall with the rank and the depth | bins find no order in hundreds of steps |
    | masks may have holes | ``holes``: none by default | better answers, and a static graph can do it |
    | no floor | ``floor`` best tokens always stay | a short text loses all where a long one loses its worst |
    | gates, off at the start | ``site_gates``: none by default; on at the start | a gate that closes early stays closed, the other sites have to remove all |
    | m1 and m2 start at 0 | m2 starts at 100 | where theirs arrives |
    | MACs | or measured time | time is what is wanted |
    | soft to the end, the best checkpoint is kept | a hard stage; as many bins off, the least odds of all sites first, as meet the budget in counted tokens | weights settle with the masks that are used, which meet the budget |
    | scores from the second layer on | the first layer scores too, and learns the ranking | tokens leave earlier |
    | ranks the teacher's best tokens among each other, by shares of attention | compares them with all tokens, by the logarithm | which ones are best is to be learned; differences of shares have hardly a gradient |
    | weight falls to a hundredth | ``rank_decay``: it stays | rankings are learned to the end |
    | readers: attention of the last layer, into the first third | the ranking of the answer logits, at all sites | attention knows the place of the answer in the last layers alone |
    | distillation alone | the task's loss joins it | labels are there |
    """

    target_flops: float | None = None
    target_latency: float | None = None
    target_latency_ms: float | None = None
    bins: int = 32
    topk: int = 20
    rank_loss: str = "arp2"
    rank_weight: float = 1.0
    rank_decay: float = 1.0
    site_gates: bool = False
    holes: bool = False
    floor: int = cast("int", None)  # settled below
    ramp: float = 0.2
    soft_until: float = 0.4
    schedule: tuple | None = None
    ranking: str = "attention"
    fuse: bool = False

    name: ClassVar[str] = "top"
    lr: ClassVar[float] = 5e-2

    @classmethod
    def as_published(cls, depth: int = 12, **options: Any) -> ToP:
        """Make the method with the settings of the released code, for a model of ``depth`` layers.

        What is no setting stays as the other table says: how masks act, are drawn and start. Theirs is trained by
        distillation alone (``PruningTrainer(distill=1.0)``).

        | setting | default | published |
        |---|---|---|
        | ``at`` | all but last | 1 .. depth - 2: it prunes at the entry of layers 2 .. depth - 1 |
        | ``bins`` | 32 | 50, of 20 to 100 (QQP, MRPC, MNLI, QNLI); up to 512 for long texts |
        | ``topk`` | 20 | 20; 10 for CoLA, 50 to 60 for long texts |
        | ``rank_loss`` | "arp2" | "arp2-topk" |
        | ``rank_weight`` | 1.0 | 0.01, of a grid from 0.01 to 0.00001 |
        | ``rank_decay`` | 1.0 | 0.01 |
        | ``site_gates`` | False | True |
        | ``holes`` | False | True |
        | ``floor`` | 2 or 0 | 0 |
        | ``ramp`` | 0.2 | 0.25 (SST-2, QQP, MNLI, QNLI); 0.33 to 0.75 for small data |
        | ``soft_until`` | 0.4 | 1.0: masks and weights learn together to the end |
        """
        published: dict[str, Any] = {
            "at": tuple(range(1, depth - 1)),
            "bins": 50,
            "topk": 20,
            "rank_loss": "arp2-topk",
            "rank_weight": 0.01,
            "rank_decay": 0.01,
            "site_gates": True,
            "holes": True,
            "floor": 0,
            "ramp": 0.25,
            "soft_until": 1.0,
        }
        return cls(**published | options)

    def __post_init__(self) -> None:
        super().__post_init__()
        targets = self.targets
        if self.floor is None:
            self.floor = 2 if self.schedule is None else 0
        if len(targets) > 1:
            raise ValueError(f"{' and '.join(f'{k}={v}' for k, v in targets.items())}: expected one target")
        for name, value in targets.items():
            if not 0 < value < math.inf or (value > 1 and name != "target_latency_ms"):
                what = "a positive number" if name == "target_latency_ms" else "a fraction of the dense cost in (0, 1]"
                raise ValueError(f"{name}={value}: expected {what}")
        if not targets:
            self.target_flops = 0.4
        self.table: LatencyTable | None = None
        for name, known in (("rank_loss", RANK_LOSSES), ("ranking", RANKINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(known)}")
        for name, least in (("bins", 1), ("topk", 1), ("floor", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected a whole number from {least} up")
        for name, most, expected in (
            ("ramp", 1, "a share of the training in [0, 1]"),
            ("rank_decay", 1, "a share of rank_weight in [0, 1]"),
            ("rank_weight", math.inf, "a number from 0 up"),
        ):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)}: expected {expected}")

    default_at = all_but_last

    def build(self, model: Architecture) -> None:
        self.merges = self.fuse
        if self.fuse:
            check_fusing(model)
        self.lengths: tuple[Tensor, Tensor] | None = None  # of inputs that the target is meant for
        sites = len(self.sites)
        deeper = DEEPER * torch.linspace(0, 1, sites)[:, None]
        check_schedule(self.schedule, self.sites)
        rank = torch.linspace(BOUND, odds(WORST), self.bins) - deeper
        if self.schedule is not None:  # a count, of protected tokens, is of next to none of the bins
            shares = torch.tensor([share if isinstance(share, float) else 0.0 for share in self.schedule])[:, None]
            rank = odds(0.5) + (shares * self.bins - 0.5 - torch.arange(self.bins)) / (EDGE * self.bins)
            rank = rank.clamp(odds(1 - GATE), odds(GATE))
        self.rank = nn.Parameter(rank)
        self.gate = nn.Parameter(torch.full((sites,), odds(GATE))) if self.site_gates else None
        self.start = [p.detach().clone() for p in (self.rank, self.gate) if p is not None]
        self.multiplier = nn.Parameter(torch.tensor([0.0, STIFF]))
        self.mask: Tensor
        self.register_buffer("mask", torch.ones(sites, self.bins, dtype=torch.bool))
        self.agreement: list[Tensor] = []
        everywhere = model.finds_answers and self.ranking == "attention"
        taught = model.depth if everywhere else max(model.first_site + 1, model.depth // 3)
        if self.sites:
            taught = max(taught, self.sites[0] + 1)  # where tokens leave late, the first site learns
        self.early = [i for i, layer in enumerate(self.sites) if layer < taught]

    # --- the target and the cost ---------------------------------------------------------------------------------
    @property
    def targets(self) -> dict[str, float]:
        """The targets that are given."""
        return {name: getattr(self, name) for name in TARGETS if getattr(self, name) is not None}

    @property
    def needs_table(self) -> bool:
        """Whether the target is one of time."""
        return self.target_flops is None

    @property
    def times(self) -> LatencyTable | None:
        """What forwards cost in ms; None where the target is one of MACs."""
        if self.needs_table and self.table is None:
            raise RuntimeError("a target of time needs measured times: set pruner.table = latency_table(model)")
        return self.table if self.needs_table else None

    def dense_cost(self, tokens: Tensor) -> Tensor:
        """Compute (B,), the cost of the dense model on rows of ``tokens``."""
        times = self.times
        return dense_macs(self.architecture.costs, tokens) if times is None else between(tokens, times.dense)

    def target(self, tokens: Tensor) -> float:
        """Return the target as a fraction of the dense cost on rows of ``tokens``."""
        if self.target_latency_ms is None:
            share = self.target_latency if self.target_flops is None else self.target_flops
            assert share is not None, "one of the targets is set"
            return share
        return self.target_latency_ms / self.dense_cost(tokens).mean().item()

    def cost(
        self, tokens: Tensor, protected: Tensor, stay: Callable[[int, Tensor], Tensor], idle: Iterable[int] = ()
    ) -> Tensor:
        """Compute a scalar: the cost as a fraction of the dense model's on rows of ``tokens``, of which ``protected``
        cannot leave; ``stay(site, n)`` says how many of n others stay. A row keeps one. ``idle`` sites are not
        scored."""

        def left(n: Tensor, site: int) -> Tensor:
            kept = (protected + stay(site, n - protected)).clamp(min=1)
            return kept + (n - kept).clamp(0, 1) if self.fuse else kept

        after = {layer: partial(left, site=site) for site, layer in enumerate(self.sites)}
        unscored, model, times = [self.sites[site] for site in idle], self.architecture, self.times
        counts = tokens_by_layer(tokens, after, range(model.depth), inside=model.drops_inside, unscored=unscored)
        used = macs(model.costs, counts) if times is None else times.fixed(tokens) + times.time(counts)
        return used.sum() / self.dense_cost(tokens).sum()

    def reached(self, fraction: float, target: float) -> dict[str, float]:
        """Report the ``fraction`` of the dense cost that a calibration to a ``target`` came to.

        Raises:
            OutOfReach: it is over budget.
        """
        (name, value), what = next(iter(self.targets.items())), "time" if self.needs_table else "MACs"
        if fraction > OVER * target:
            raise OutOfReach(
                f"{name}={value} cannot be reached at={list(self.sites)}: with every bin off {fraction:.3f} of the "
                f"{what} are left; prune at earlier layers or choose a larger target"
            )
        return {"latency_fraction" if self.needs_table else "flops_fraction": fraction}

    # --- bins of relative rank -----------------------------------------------------------------------------------
    def bin(self, score: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        """Find (B, N) long, the bin of each token by its rank among the ``free`` ones (B, N) of its row; (B, N) bool,
        those of the ``floor`` best ranks."""
        rank, count = ranks(score, free), free.sum(1, keepdim=True).clamp(min=1)
        return bin_of(rank.clamp(max=count - 1), count, self.bins), free & (rank < self.floor)

    def choose(self, score: Tensor, view: View) -> Choice:
        mask, free = self.current[view.site], view.alive & ~view.protected
        if self.holes:
            bins, best = self.bin(score, free)
            keep = mask[bins] | best
        else:
            most = within(mask.sum(), free.sum(1, keepdim=True), self.bins).clamp(min=self.floor * self.bins)
            keep = ranks(score, free) * self.bins < most
        return fused(keep, score, view) if self.fuse else Choice(keep)

    # --- masks and gates -----------------------------------------------------------------------------------------
    def gates(self, score: Tensor, view: View) -> Tensor:
        free, rows = view.free, len(view.alive)
        if view.site == 0:
            self._bound()
            self.mask.copy_(self.hard_mask())  # what is saved in the soft stage prunes as it does now
        bins, best = self.bin(score.detach(), free)
        keep = rounded(sample(self.rank[view.site].expand(rows, -1))).gather(1, bins)
        if self.gate is not None:
            keep = 1 - (1 - keep) * rounded(sample(self.gate[view.site].expand(rows, 1)))
        return (keep + CLOSED).clamp(max=1).log().masked_fill(~free | best, 0.0)

    @torch.no_grad()
    def _bound(self) -> None:
        """Keep the log odds within +-ln 100, where their gradients live."""
        for parameter in (self.rank, self.gate):
            if parameter is not None:
                parameter.clamp_(-BOUND, BOUND)

    @property
    def current(self) -> Tensor:
        """(S, bins) bool: the masks of evaluation, now."""
        return self.mask if self.phase(self.progress) == "hard" else self.hard_mask()

    def hard_mask(self) -> Tensor:
        """Make (S, bins) bool, the masks without chance. Of each site the expected number of bins, those of least odds,
        is off. A site whose gate is more likely off than on lets everything stay."""
        rank = self.ordered()
        mask = ranks(rank, torch.ones_like(rank, dtype=torch.bool)) < chance(rank).sum(1).round()[:, None]
        return mask | self.idle

    def ordered(self) -> Tensor:
        """Return (S, bins), the log odds of the bins to stay; without holes those of a site are sorted, the largest for
        the best rank."""
        rank = self.rank.detach()
        return rank if self.holes else rank.sort(1, descending=True).values

    @property
    def idle(self) -> Tensor:
        """(S, 1) bool: the sites whose gate is off."""
        if self.gate is None:
            return torch.zeros(len(self.sites), 1, dtype=torch.bool, device=self.rank.device)
        return (chance(self.gate.detach()) < 0.5)[:, None]

    def keeps_all(self, site: int) -> bool:
        return bool(self.current[site].all())

    def width(self, slots: int, site: int) -> int | None:
        protect = self.protected_positions
        if protect is None or torch.compiler.is_compiling():  # which cannot look at masks
            return None
        mask = self.current[site : site + 1]
        free = torch.arange(max(0, slots - len(protect)) + 1.0, device=mask.device)
        stay = kept_of_bins(mask if self.holes else first_bins(mask), len(free), self.floor)
        most = len(protect) + int(stay(0, free).max()) + self.fuse
        return max(1, min(slots, most))

    # --- the Lagrangian ------------------------------------------------------------------------------------------
    def loss(self, forward: RunAgain, batch: Batch, record: Record, teacher: Any = None) -> Tensor | float:
        if self.soft:
            tokens, protected = self.lengths or rows_of(record)
            over = self.expected(tokens.float(), protected) - self.target_now(tokens.float(), protected)
            first, second = Ascend.apply(self.multiplier)
            total = first * over + second * over**2
        else:
            total = self.rest()
        if not self.ranks_teacher:
            return total
        weight = self.rank_weight * max(self.rank_decay, 1 - self.ramped)
        return total + weight * self.ranking_loss_of(record, teacher)

    def expected(self, tokens: Tensor, protected: Tensor, rank: Any = None, gate: Any = None) -> Tensor:
        """Compute a scalar, as ``cost`` does: the expected cost of the odds now, or of given ones, as a fraction."""
        rank, gate = (self.rank, self.gate) if rank is None else (rank, gate)
        share = chance(rank)
        if gate is not None:
            share = 1 - (1 - share) * chance(gate)[:, None]
        return self.cost(tokens, protected, kept_of_bins(share, int(tokens.max()), self.floor))

    @property
    def ramped(self) -> float:
        """How much of the ramp is over (0..1)."""
        return min(1.0, self.progress / max(1e-9, self.ramp))

    def target_now(self, tokens: Tensor, protected: Tensor) -> float:
        """Return the target now, on its way from the cost at the start to ``target``; shapes as in ``cost``."""
        start = self.expected(tokens, protected, *(odds.to(tokens.device) for odds in self.start)).item()
        return start + (self.target(tokens) - start) * self.ramped

    # --- the ranking ---------------------------------------------------------------------------------------------
    @property
    def ranks_teacher(self) -> bool:
        return self.rank_loss != "none"

    def ranking_loss_of(self, record: Record, teacher: Any) -> Tensor:
        """Compute a scalar: the ranking loss of the tokens that are still there, summed over the early sites."""
        if teacher is None or "ranking" not in teacher:
            raise ValueError("ToP distils its teacher's ranking: train with a teacher, or with rank_loss='none'")
        self.agreement = []
        total: Any = 0.0
        for site in (record.sites[i] for i in self.early):
            ranking = taught_by(teacher, self.ranking).gather(1, site.tokens.index)
            score = site.score if self.soft else self.score(site.view)  # tokens are chosen without gradients
            if self.rank_loss == "arp2-topk":
                score = score / site.tokens.live.clamp(min=1)[:, None]  # a share of all attention, as theirs
            else:
                score = score.clamp(min=FAINT).log()
            total = total + ranking_loss(score, ranking, site.view.free, self.topk, self.rank_loss)
            self.agreement.append(overlap(site.score.detach(), ranking, site.alive & ~site.protected, self.topk))
        return total

    # --- the budget ----------------------------------------------------------------------------------------------
    def cost_of(self, mask: Tensor, tokens: Tensor, protected: Tensor) -> float:
        """Compute the cost as a fraction of the dense one with ``mask`` (S, bins), under which what stays depends on
        lengths alone; shapes as in ``cost``."""
        mask = mask if self.holes else first_bins(mask)
        idle = mask.all(1).nonzero()[:, 0].tolist()
        return float(self.cost(tokens.float(), protected, kept_of_bins(mask, int(tokens.max()), self.floor), idle))

    def prepare(self, forward: RunBatch, batches: Iterable[Batch]) -> None:
        """Remember the lengths of inputs. The expected cost is counted on them and not on those of a batch: texts are
        batched by length, and a batch of short ones cannot be pruned as the others are."""
        self.lengths = lengths_of(forward, batches)

    @torch.no_grad()
    def calibrate(self, forward: RunBatch, batches: Iterable[Batch]) -> dict[str, float]:
        """Fix the masks: as many bins off, the least odds of all sites first, as meet the target on ``batches``.

        ``forward(batch)`` runs the model and returns the ``Record``. Raises ValueError where the target cannot be
        reached.
        """
        tokens, protected = (part.cpu() for part in lengths_of(forward, batches))
        target = self.target(tokens.float())
        cost, mask = nearest_mask(
            self.ordered(), self.idle, lambda mask: self.cost_of(mask, tokens, protected), target, OVER * target
        )
        reached = self.reached(cost, target)
        self.mask.copy_(mask)
        return reached

    # --- what to watch -------------------------------------------------------------------------------------------
    def metrics(self) -> dict[str, float]:
        """Report, while masks and gates learn, the cost that is asked for, expected and, with masks without chance,
        counted; gates and multipliers. Always how many of the teacher's best tokens the early sites rank among their
        best."""
        shown = {f"rank_overlap_{self.sites[i]}": a.item() for i, a in zip(self.early, self.agreement, strict=False)}
        if self.record is None or not self.soft:
            return shown
        tokens, protected = self.lengths or rows_of(self.record)
        shown |= {
            "cost_target": self.target_now(tokens.float(), protected),
            "cost_expected": self.expected(tokens.float(), protected).item(),
            "cost_hard": self.cost_of(self.hard_mask().cpu(), tokens.cpu(), protected.cpu()),
        }
        if self.gate is not None:
            shown["gates_on"] = float((~self.idle).sum())
        return shown | {f"multiplier_{i + 1}": value for i, value in enumerate(self.multiplier.tolist())}

    def ablations(self, judge: Callable[[], tuple[float, float]]) -> dict[str, float]:
        """Measure what holes are worth: the points that masks without them lose, and the share of MACs then left."""
        if not self.holes:
            return {}
        mask, (quality, _) = self.mask.clone(), judge()
        self.prefix()
        try:
            other, fraction = judge()
        finally:
            self.mask.copy_(mask)
        return {"prefix_drop": quality - other, "prefix_flops_fraction": fraction}

    @torch.no_grad()
    def prefix(self) -> None:
        """Let every site keep its best ranks, in as many bins as it keeps now: masks without holes are what a top-k in
        a static graph can do. Measure quality and cost: of texts with fewer tokens than bins a little more stays."""
        self.mask.copy_(first_bins(self.mask))


def rows_of(record: Record) -> tuple[Tensor, Tensor]:
    """Return (B,) tokens of each row of a forward, and how many of them are protected."""
    return record.counts[0].n_attention.detach().long(), record.sites[0].protected.sum(1)


def lengths_of(forward: RunBatch, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Return what ``rows_of`` says of all rows of ``batches``."""
    tokens, protected = zip(*(rows_of(forward(batch)) for batch in batches), strict=True)
    return torch.cat(tokens), torch.cat(protected)
