"""TR-BERT: policy networks at a few layers learn by reinforcement which tokens stay."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.architecture import Architecture
from ..core.cost import dense_macs, macs
from ..core.pruner import Batch, Choice, Record, RunAgain
from ..core.tokens import take
from ..core.view import Site, View
from .parts.budget import PENALTY
from .parts.predictor import perceptron, perceptron_macs
from .parts.saliency import saliency, task_losses
from .parts.selection import top_k
from .parts.thresholds import Thresholded


class TRBERT(Thresholded):
    """Keep the tokens that a policy, learned by reinforcement, lets stay (Ye, Lin, Huang and Sun, "TR-BERT: Dynamic
    Token Reduction for Accelerating BERT Inference", NAACL 2021).

    At each site a perceptron reads the state of each token and gives the chance that it stays. In the sampled stage
    choices are drawn, afterwards they are rounded. The policies learn by REINFORCE: the reward of a run is -(task loss)
    - alpha * (share of the MACs left), its baseline the mean reward of the ``rollouts`` runs of the same text. In the
    ``guided`` share of the sampled stage one more run follows a guide: the most salient tokens stay, as many as the
    policy expects to. The policy imitates it, by the likelihood of those choices. The last stage of the budget is the
    shift of ``LTP``.

    Args:
        rollouts: K runs of each text for the reward; the paper: 8.
        guided: share of the sampled stage that is guided.
        guidance: weight of the imitation.
        start: the logit of staying at the start.
        temperature: of the chance to stay.
        init: the logit from which on a token stays, at the start.
        soft_until: share of the training that is sampled.

    The rest is as in ``LTP``; nothing is soft, so that ``straight_through`` says nothing.

    | paper | here | why |
    |---|---|---|
    | policies first, weights frozen, then both | both from the start; the weights learn by one more run that is drawn | one training |
    | both learn to the end | policies rest in the hard stage | weights settle with what is used |
    | alpha is a number | the slope of the penalty at the MACs of these runs | grows while more is left than is asked for; without a target alpha is ``weight`` |
    | counts tokens kept | counts MACs | the budget is one of MACs |
    | guide: gradients times the change of states, of the fine-tuned model | saliency (``parts.saliency``) of the model in training | no stage before the training |
    | enters neither layer 1 nor L/2 | leaves before the FFN of layers 0 and L/2 - 1 | as with all methods here |
    | keeps as many of all texts of a batch as of the one that keeps most | texts do not meet | answers do not depend on the batch |
    | no floor | ``min_keep`` best tokens stay | as in ``LTP`` |
    | any task | classes, numbers, labelled tokens, answers | a reward needs the loss of each text |
    """

    temperature: float = 1.0
    init: float = 0.0
    soft_until: float = 0.4
    rollouts: int = 4
    guided: float = 0.5
    guidance: float = 1.0
    start: float = 2.0

    name: ClassVar[str] = "trbert"
    lr: ClassVar[float] = 5e-3
    needs_attention: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollouts < 2:
            raise ValueError(f"rollouts={self.rollouts}: expected 2 at least, one is compared with the others")
        if not 0 <= self.guided <= 1:
            raise ValueError(f"guided={self.guided}: expected a share of the sampled stage in [0, 1]")
        self.playing = False  # while runs are made for the reward
        self.guide: list[Tensor] | None = None  # per site (B, N0), while one follows it
        self.watched: dict[str, float] = {}

    def default_at(self, model: Architecture) -> tuple[int, ...]:
        """Name the first layer and the last one of the first half."""
        return tuple(sorted({min(max(i, model.first_site), model.last_site) for i in (0, model.depth // 2 - 1)}))

    def build(self, model: Architecture) -> None:
        super().build(model)
        draw = torch.Generator().manual_seed(0)
        self.policies = nn.ModuleList(perceptron(model.hidden, draw, self.start) for _ in self.sites)
        self.predictor_macs = perceptron_macs(model.hidden)

    @property
    def sampled(self) -> bool:
        """Whether choices are drawn."""
        return self.training and self.phase(self.progress) == "sampled"

    def phase(self, progress: float) -> str:
        return "sampled" if progress < self.soft_until else "hard"

    def score(self, view: View) -> Tensor:
        policy: Any = self.policies[view.site]
        with torch.set_grad_enabled(self.playing):  # of the policy alone, and not within a checkpointed layer
            return policy(view.hidden.detach().to(policy[0].weight.dtype)).float()[..., 0]

    def opening(self, score: Tensor, view: View | Site) -> Tensor:
        """Compute (B, N), the log odds of staying."""
        return (score - self.threshold[self.sites.index(view.layer)].detach()) / self.temperature

    def choose(self, score: Tensor, view: View) -> Choice:
        if not self.sampled:
            return super().choose(score, view)
        chance = self.opening(score, view).sigmoid()
        if self.guide is None:
            return Choice(torch.rand_like(chance) < chance)
        salient = take(self.guide[view.site], view.tokens.index, 1).masked_fill(view.protected, float("inf"))
        return Choice(top_k(salient, (chance * view.alive).sum(1).round(), view.alive))

    def loss(self, forward: RunAgain, batch: Batch, record: Record, teacher: Any = None) -> Tensor | float:
        if not self.sampled:
            return self.rest()
        runs = [self._run(forward, batch) for _ in range(self.rollouts)]
        task, used, dense, likely = (torch.stack(x) for x in zip(*runs, strict=True))  # (K, B)
        fraction = float(used.sum() / dense.sum())
        alpha = self.slope(fraction)
        reward = -task - alpha * used / dense
        self.watched = {
            "reward": float(reward.mean()),
            "task_loss": float(task.mean()),
            "left": fraction,
            "alpha": alpha,
        }
        loss = self.rest() - ((reward - reward.mean(0)) * likely).mean()
        if self.progress < self.guided * self.soft_until:
            self.guide = saliency(self, forward)
            try:
                self._run(forward, batch)
            finally:
                self.guide = None
            likely = torch.stack([self.likelihood(site, True) for site in self.last_record().sites])
            loss = loss - self.guidance * likely.mean()
        self.record = record
        return loss

    def slope(self, fraction: float) -> float:
        """Compute alpha, the price of MACs while this ``fraction`` of them is left."""
        if self.target_flops is None:
            return 0.1 if self.weight is None else self.weight
        return 2 * (PENALTY if self.weight is None else self.weight) * (fraction - self.target_now)

    def _run(self, forward: RunAgain, batch: Batch) -> tuple[Tensor, ...]:
        """Run once; (B,) each: task loss, MACs, dense MACs, and the log likelihood of the choices that were made."""
        self.playing = True
        try:
            with torch.no_grad():
                task = task_losses(forward(), batch, self.architecture.causal)
        finally:
            self.playing = False
        last = self.last_record()
        costs, counts = last.costs, last.counts
        likely: Any = sum(map(self.likelihood, last.sites))
        return task, macs(costs, counts), dense_macs(costs, counts[0].n_attention), likely

    def likelihood(self, site: Site, mean: bool = False) -> Tensor:
        """Compute (B,), the log likelihood of the choices at a site, summed over the tokens that were free to leave; or
        a scalar, its mean over all of these tokens of the batch."""
        floor = self.best(site.score.detach(), site.protected, site.alive)
        free, odds = site.alive & ~site.protected & ~floor, self.opening(site.score, site)
        each = -F.binary_cross_entropy_with_logits(odds, site.keep.float(), reduction="none") * free
        return each.sum() / free.sum().clamp(min=1) if mean else each.sum(1)

    def metrics(self) -> dict[str, float]:
        return self.watched if self.sampled else {}
