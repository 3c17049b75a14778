"""ToP: constraint-aware, ranking-distilled token pruning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.architecture import Architecture
from ..core.cost import LatencyTable, LayerCount, between, dense_macs, macs, tokens_by_layer
from ..core.pruner import Choice, Record, TokenPruner
from ..core.tokens import CLOSED
from ..core.view import View
from .parts.gates import Ascend, chance, odds, rounded, sample
from .parts.rank_bins import bin_of, first, places, within
from .parts.rank_distillation import RANK_LOSSES, overlap, ranking_loss, taught_by
from .parts.selection import ranks

BOUND = math.log(100)  # of the parameters, their log odds
GATE, WORST = 0.98, 0.9  # the chance of a gate, and of the last bin of the first site, to be on at the start
DEEPER = 3.0  # how much lower the odds of the last site start
FAINT = 1e-6  # the least score, relative to uniform attention, whose logarithm is taken
STIFF = 100.0  # the multiplier of the squared excess where the training starts
TARGETS = ("target_flops", "target_latency", "target_latency_ms")


class ToP(TokenPruner):
    """Ranking-distilled, constraint-aware token pruning (Li et al., "Constraint-aware and Ranking-distilled Token
    Pruning for Efficient Transformer Inference", KDD 2023), after its released code.

    At each site the survivors are ranked by the attention they receive and fall into ``bins`` of equal relative rank.
    A mask over the bins, one per site and the same for all inputs, says which stay; where there are gates, one per site
    says whether the site prunes at all. Masks and gates are random in the soft stage (hard concrete, rounded straight
    through) and learn with the weights under a Lagrangian L = m1 (c - target) + m2 (c - target)^2 on the expected cost
    c, in MACs or in measured time, whose multipliers ascend; the target falls over the first ``ramp`` of the training.
    In evaluation and in the hard stage they are fixed: in each site the expected number of bins, those with the least
    odds, are off. The ranking of the teacher's last layer is distilled into the first third of the layers.

    Departures. Scores are means over live rows alone (theirs include padding and what has left). A mask enters the
    attention as log(mask) on the key, so that 0 (1e-8) is removal and 1 presence in training as in inference (theirs
    scales the hidden state in training and masks keys in inference); masks multiply over the sites. Theirs needs tens
    of thousands of steps, ours hundreds: masks are rounded as gates are (else products of fractions over the sites
    remove far more than is counted), and drawn for each text by itself, not for the batch; bins start with odds that
    fall with the rank and the depth, and not alike, the best tokens always stay, and m2 at 100, where theirs arrives. A
    gate that closes early stays closed, and the other sites have to remove all: there are none unless asked for. Bins
    are found in integers. A hard stage follows, in which the weights settle with the masks that are used: as many bins
    off, the least odds of all sites first, as put the cost, counted in tokens, onto the budget. The first layer scores
    too, and is among those that learn the ranking, to the end. Their ranking loss compares the teacher's best tokens
    with each other, by the attention they receive: which ones are best is not learned, and differences of shares of
    attention hardly have a gradient. Ours compares them with all tokens, by its logarithm. Where the head finds an
    answer in the text, the ranking is that of its logits, and all sites learn it: attention knows the place in the last
    layers alone. The task's loss joins the distillation.

    Args:
        target_flops: MACs to be left, as a fraction of the dense model's on the same unpadded inputs. 0.4 where no
            other target is given.
        target_latency: instead, time to be left, as a fraction of the dense model's without padding.
        target_latency_ms: instead, mean milliseconds per example. Both are priced by a measured ``LatencyTable``, which
            ``PruningTrainer`` makes; a loop of one's own says ``pruner.table = latency_table(model)``.
        bins: of relative rank, per site. The paper: 20 to 100, more for long texts.
        topk: tokens of the teacher's ranking that are distilled.
        rank_loss: "arp2" (pairs of a best token and any other, weighted by the difference of their ranks), "ndcg"
            (LambdaRank's weights), "arp2-topk" (the paper's) or "none"; see ``parts.rank_distillation``.
        rank_weight: of the ranking loss. The paper: 0.01 to 0.00001, falling to a hundredth of it over the ramp.
        site_gates: whether there are gates, as in the paper; without, every site prunes. A site whose gate is off, or
            whose
            mask lets everything stay, is not scored in evaluation.
        holes: whether masks may have holes, as the paper's; without, a site keeps its best ranks, in as many bins as
            the odds of all its bins say, in the hard stage and in evaluation.
        floor: so many of the best tokens that may leave stay; the paper has none.
        ramp, soft_until: shares of the training.
    """

    target_flops: float | None = None
    target_latency: float | None = None
    target_latency_ms: float | None = None
    bins: int = 32
    topk: int = 20
    rank_loss: str = "arp2"
    rank_weight: float = 1.0
    site_gates: bool = False
    holes: bool = False
    floor: int = 2
    ramp: float = 0.2
    soft_until: float = 0.4

    name: ClassVar[str] = "top"
    lr: ClassVar[float] = 5e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = {name: getattr(self, name) for name in TARGETS if getattr(self, name) is not None}
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(f'{k}={v}' for k, v in asked.items())}: expected one target")
        for name, value in asked.items():
            if not 0 < value < math.inf or (value > 1 and name != "target_latency_ms"):
                what = "a positive number" if name == "target_latency_ms" else "a fraction of the dense cost in (0, 1]"
                raise ValueError(f"{name}={value}: expected {what}")
        if self.rank_loss not in RANK_LOSSES:
            raise ValueError(f"rank_loss={self.rank_loss!r}: expected one of {', '.join(RANK_LOSSES)}")
        for name, least in (("bins", 1), ("topk", 1), ("floor", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: expected a whole number from {least} up")
        for name, most in (("ramp", 1), ("soft_until", 1), ("rank_weight", math.inf)):
            if not 0 <= getattr(self, name) <= most:
                expected = "a number from 0 up" if most > 1 else "a share of the training in [0, 1]"
                raise ValueError(f"{name}={getattr(self, name)}: expected {expected}")
        if not asked:
            self.target_flops = 0.4
        self.table: LatencyTable | None = None

    @property
    def ranks_teacher(self) -> bool:
        """Whether ``loss`` wants the teacher's ranking."""
        return self.rank_loss != "none"

    def default_at(self, model: Architecture) -> tuple[int, ...]:
        """Every layer but the last."""
        return tuple(range(model.first_site, max(model.first_site, model.depth - 2) + 1))

    def build(self, model: Architecture) -> None:
        sites = len(self.sites)
        deeper = DEEPER * torch.linspace(0, 1, sites)[:, None]
        self.rank = nn.Parameter(torch.linspace(BOUND, odds(WORST), self.bins) - deeper)
        self.gate = nn.Parameter(torch.full((sites,), odds(GATE))) if self.site_gates else None
        self.begin = [p.detach().clone() for p in (self.rank, self.gate) if p is not None]
        self.multiplier = nn.Parameter(torch.tensor([0.0, STIFF]))
        self.register_buffer("mask", torch.ones(sites, self.bins, dtype=torch.bool))
        self.agreement: list[Tensor] = []
        self.lengths: tuple[Tensor, Tensor] | None = None  # of inputs that the budget is meant for
        taught = model.depth if model.finds_answers else max(model.first_site + 1, model.depth // 3)
        self.early = [i for i, layer in enumerate(self.sites) if layer < taught]

    # --- what stays ----------------------------------------------------------------------------------------------
    def choose(self, score: Tensor, view: View) -> Choice:
        mask, free = self.current[view.site], view.alive & ~view.protected
        if self.holes:
            bins, best = self.bin(score, free)
            return Choice(mask[bins] | best)
        most = within(mask.sum(), free.sum(1, keepdim=True), self.bins).clamp(min=self.floor * self.bins)
        return Choice(ranks(score, free) * self.bins < most)

    def keeps_all(self, site: int) -> bool:
        return bool(self.current[site].all())

    @property
    def current(self) -> Tensor:
        """(S, bins) bool: the masks of evaluation, now."""
        return self.mask if self.phase(self.progress) == "hard" else self.hard_mask()

    def bin(self, score: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N) long: the bin of each token by its rank among the ``free`` ones (B, N) of its row; (B, N) bool: those
        of the ``floor`` best ranks."""
        rank, count = ranks(score, free), free.sum(1, keepdim=True).clamp(min=1)
        return bin_of(rank.clamp(max=count - 1), count, self.bins), free & (rank < self.floor)

    def hard_mask(self) -> Tensor:
        """(S, bins) bool: the masks without chance. Of each site the expected number of bins, those of least odds, is
        off; so is the whole site where its gate is more likely off than on."""
        rank = self.ordered()
        mask = ranks(rank, torch.ones_like(rank, dtype=torch.bool)) < chance(rank).sum(1).round()[:, None]
        return mask | self.idle

    def ordered(self) -> Tensor:
        """(S, bins): the log odds of the bins to stay; without holes those of a site, the largest for the best rank."""
        rank = self.rank.detach()
        return rank if self.holes else rank.sort(1, descending=True).values

    @property
    def idle(self) -> Tensor:
        """(S, 1) bool: the sites whose gate is off."""
        if self.gate is None:
            return torch.zeros(len(self.sites), 1, dtype=torch.bool, device=self.rank.device)
        return (chance(self.gate.detach()) < 0.5)[:, None]

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

    # --- training ------------------------------------------------------------------------------------------------
    def phase(self, progress: float) -> str:
        return "soft" if progress < self.soft_until else "hard"

    @property
    def ramped(self) -> float:
        """How much of the ramp is over (0..1)."""
        return min(1.0, self.progress / max(1e-9, self.ramp))

    @property
    def needs_table(self) -> bool:
        """Whether the budget is one of time."""
        return self.target_flops is None

    def cost(
        self, tokens: Tensor, protected: Tensor, stay: Callable[[int, Tensor], Tensor], idle: Iterable[int] = ()
    ) -> Tensor:
        """Scalar: the cost as a fraction of the dense model's, in MACs or in time, on rows of ``tokens`` (B,) tokens of
        which ``protected`` (B,) cannot leave; ``stay(site, n)`` says how many of n others stay. A row keeps one.
        ``idle`` sites are not scored."""
        after = {
            layer: lambda n, site=site: (protected + stay(site, n - protected)).clamp(min=1)
            for site, layer in enumerate(self.sites)
        }
        unscored = [self.sites[site] for site in idle]
        layers = range(self.architecture.depth)
        counts = tokens_by_layer(tokens, after, layers, inside=self.architecture.drops_inside, unscored=unscored)
        return self.price(counts).sum() / self.dense(tokens).sum()

    def price(self, counts: list[LayerCount]) -> Tensor:
        """(B,) the cost of a forward: MACs, or ms where the budget is one of time."""
        if not self.needs_table:
            return macs(self.architecture.costs, counts)
        return self.measured.fixed(counts[0].n_attention) + self.measured.time(counts)

    def dense(self, tokens: Tensor) -> Tensor:
        """(B,) the cost of the dense model, without any hook, on rows of ``tokens`` (B,) tokens."""
        return between(tokens, self.measured.dense) if self.needs_table else dense_macs(self.architecture.costs, tokens)

    @property
    def measured(self) -> LatencyTable:
        if self.table is None:
            raise RuntimeError("a target of time needs measured times: set pruner.table = latency_table(model)")
        return self.table

    def target(self, tokens: Tensor) -> float:
        """The target as a fraction of the dense cost on rows of ``tokens`` (B,) tokens."""
        if self.target_latency_ms is None:
            return self.target_latency if self.target_flops is None else self.target_flops
        return self.target_latency_ms / self.dense(tokens).mean().item()

    def target_now(self, tokens: Tensor, protected: Tensor) -> float:
        """The target now: on its way from the cost where the training starts to ``target``; shapes as in ``cost``."""
        start = self.expected(tokens, protected, *(begin.to(tokens.device) for begin in self.begin)).item()
        return start + (self.target(tokens) - start) * self.ramped

    def expected(self, tokens: Tensor, protected: Tensor, rank: Any = None, gate: Any = None) -> Tensor:
        """Scalar: the expected cost as a fraction of the dense one; shapes as in ``cost``. Of the odds now, or of given
        ones."""
        rank, gate = (self.rank, self.gate) if rank is None else (rank, gate)
        share = chance(rank)
        if gate is not None:
            share = 1 - (1 - share) * chance(gate)[:, None]
        return self.cost(tokens, protected, self.stays(share, int(tokens.max())))

    def stays(self, share: Tensor, longest: int) -> Callable[[int, Tensor], Tensor]:
        """How many of n (B,) tokens, ``longest`` at most, stay at a site of whose bins a ``share`` (S, bins) stays.
        Between whole numbers, as expected counts are, on the line from one to the next."""
        longest = 64 * (longest // 64 + 1)  # few tables for many lengths
        table = share.float() @ places(self.bins, longest, self.floor).to(share.device).T
        table = table + torch.arange(longest + 1, device=share.device).clamp(max=self.floor)

        def stay(site: int, n: Tensor) -> Tensor:
            n = n.clamp(min=0)
            low = n.detach().long().clamp(max=longest - 1)
            return torch.lerp(table[site][low], table[site][low + 1], n - low)

        return stay

    def loss(self, forward: Callable, batch: dict, record: Record, teacher: Any = None) -> Tensor | float:
        if self.soft:
            tokens, protected = self.lengths or rows_of(record)
            over = self.expected(tokens.float(), protected) - self.target_now(tokens.float(), protected)
            first, second = Ascend.apply(self.multiplier)
            total = first * over + second * over**2
        else:
            total = self.rest()
        return total + self.rank_weight * self.ranking_loss_of(record, teacher) if self.ranks_teacher else total

    def ranking_loss_of(self, record: Record, teacher: Any) -> Tensor:
        """Scalar: the ranking loss, summed over the early sites; of the tokens that are still there."""
        if teacher is None or "ranking" not in teacher:
            raise ValueError("ToP distils its teacher's ranking: train with a teacher, or with rank_loss='none'")
        if not self.early:
            raise ValueError(
                f"ToP distils the ranking into the first third of the layers, at={list(self.sites)} has none of "
                "them: name an earlier layer, or train with rank_loss='none'"
            )
        self.agreement, total = [], 0.0
        for site in (record.sites[i] for i in self.early):
            ranking = taught_by(teacher).gather(1, site.tokens.index)
            score = site.score if self.soft else self.score(site.view)  # tokens are chosen without gradients
            if self.rank_loss == "arp2-topk":
                score = score / site.tokens.live.clamp(min=1)[:, None]  # a share of all attention, as theirs
            else:
                score = score.clamp(min=FAINT).log()
            total = total + ranking_loss(score, ranking, site.view.free, self.topk, self.rank_loss)
            self.agreement.append(overlap(site.score.detach(), ranking, site.alive & ~site.protected, self.topk))
        return total

    def metrics(self) -> dict[str, float]:
        """While masks and gates learn, the cost that is asked for, expected and, with masks without chance, counted;
        gates and multipliers. Always how many of the teacher's best tokens the early sites rank among their best."""
        found = {f"rank_overlap_{self.sites[i]}": a.item() for i, a in zip(self.early, self.agreement, strict=False)}
        if self.record is None or not self.soft:
            return found
        tokens, protected = self.lengths or rows_of(self.record)
        found |= {
            "cost_target": self.target_now(tokens.float(), protected),
            "cost_expected": self.expected(tokens.float(), protected).item(),
            "cost_hard": self.cost_of(self.hard_mask().cpu(), tokens.cpu(), protected.cpu()),
        }
        if self.gate is not None:
            found["gates_on"] = float((~self.idle).sum())
        return found | {f"multiplier_{i + 1}": value for i, value in enumerate(self.multiplier.tolist())}

    # --- the budget ----------------------------------------------------------------------------------------------
    def cost_of(self, mask: Tensor, tokens: Tensor, protected: Tensor) -> float:
        """The cost as a fraction of the dense one with ``mask`` (S, bins), under which what stays depends on lengths
        alone; shapes as in ``cost``."""
        mask = mask if self.holes else first(mask)
        idle = mask.all(1).nonzero()[:, 0].tolist()
        return float(self.cost(tokens.float(), protected, self.stays(mask, int(tokens.max())), idle))

    def prepare(self, forward: Callable, batches: Iterable[dict]) -> None:
        """Remember the lengths of inputs. The expected cost is counted on them and not on those of a batch: texts are
        batched by length, and a batch of short ones cannot be pruned as the others are."""
        found = [rows_of(forward(batch)) for batch in batches]
        tokens, protected = (torch.cat(part) for part in zip(*found, strict=True))
        self.lengths = (tokens, protected)

    @torch.no_grad()
    def calibrate(self, forward: Callable, batches: Iterable[dict]) -> dict[str, float]:
        """Fix the masks: as many bins off, the least odds of all sites first, as meet the target on ``batches``.

        ``forward(batch)`` runs the model and returns the ``Record``. Raises ValueError where the target cannot be
        reached.
        """
        found = [rows_of(forward(batch)) for batch in batches]
        tokens, protected = (torch.cat(part).cpu() for part in zip(*found, strict=True))
        target = self.target(tokens.float())
        odds = self.ordered() + 1000 * self.idle  # of sites that do not prune only where nothing else is left
        order = odds.cpu().T.flip(0, 1).flatten().argsort(stable=True)  # ties: worse ranks first, deeper sites first

        def without(off: Tensor) -> tuple[float, Tensor]:
            mask = torch.ones(len(order), dtype=torch.bool)
            mask[off] = False
            mask = mask.view(self.bins, -1).flip(0, 1).T
            return self.cost_of(mask, tokens, protected), mask

        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if without(order[:middle])[0] > target else (low, middle)
        begun, rest = order[: max(0, low - 1)], order[max(0, low - 1) :]
        prunes = (~self.idle[:, 0]).nonzero()[:, 0].tolist()
        last = [rest[:1], *(rest[rest % len(odds) == site][:1] for site in prunes)]
        # bins are coarse, and the first one off costs the scoring of its site: of these the one that comes closest
        near = [without(off) for off in (order[:0], begun, *(torch.cat([begun, one]) for one in last))]
        reached, mask = min(near, key=lambda found: (found[0] > 1.02 * target, abs(found[0] - target)))
        if reached > 1.02 * target:
            asked = next(f"{name}={getattr(self, name)}" for name in TARGETS if getattr(self, name) is not None)
            raise ValueError(
                f"{asked} cannot be reached at={list(self.sites)}: with every bin off {reached:.3f} of the "
                f"{'time' if self.needs_table else 'MACs'} are left; prune at earlier layers or choose a larger target"
            )
        self.mask.copy_(mask)
        return {"latency_fraction" if self.needs_table else "flops_fraction": reached}

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
        self.mask.copy_(first(self.mask))


def rows_of(record: Record) -> tuple[Tensor, Tensor]:
    """(B,) tokens of each row of a forward, and how many of them are protected."""
    return record.counts[0].n_attention.detach().long(), record.sites[0].protected.sum(1)
