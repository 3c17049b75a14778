"""LTP: learned token pruning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.architecture import Architecture
from ..core.pruner import Batch, Choice, RunBatch
from ..core.view import View
from .parts.selection import check_fusing, check_schedule, fused, threshold_of
from .parts.thresholds import Thresholded


class LTP(Thresholded):
    """Keep the tokens that receive attention above a learned threshold (Kim, Shen, Thorsley, Gholami, Kwon, Hassoun and
    Keutzer, "Learned Token Pruning for Transformers", KDD 2022).

    The importance score is the attention received. A token leaves at a site if its score s is below the threshold of
    the site. In the soft stage the thresholds learn with the weights, by the gradient of the gate
    sigmoid((s - threshold) / temperature) (eq. 6). In the hard stage the thresholds are fixed and the weights go on.
    The budget is ``target_flops``: a penalty in the soft stage, then one shift of all thresholds on held-out inputs,
    whenever the hard stage begins, is evaluated or ends.

    Args:
        target_flops: MACs to be left, as a fraction of the dense model's on the same unpadded inputs. None: no target,
            the L1 penalty ``weight`` * mean gate of eq. 7.
        weight: of the penalty. Default 10 with a target, 0.1 without.
        temperature: of the gates, in units of uniform attention. The paper's 1e-4..2e-3 at length 128 are 0.013..0.26.
        init: layer i of L starts at ``init`` * i / L (1.28 is the paper's 0.01 at length 128).
        schedule: instead, the thresholds start where these shares of a site's survivors, one for each, stay on held-out
            inputs. Tokens leave from the first step on, and the target does not fall but is there.
        soft_until: share of the training that is soft.
        straight_through: whether gates are 0 or 1 in the soft stage; False leaves them half open, as the paper does.
        min_keep: tokens that a row keeps at least, protected ones included. Default 3; with a ``schedule``, which says
            how many, 1.
        fuse: whether what leaves at a site becomes one token more, the mean of its states by the attention received
            (after EViT). It is a token like others from then on; there is none in the soft stage.

    | paper | here | why |
    |---|---|---|
    | score divided by the padded length | times the live tokens, over live rows alone | a threshold carries over lengths |
    | gate scales the layer's output | log(gate) on the key in the following layers | 0 is removal and 1 is presence; in pre-LN models the next LayerNorm undoes a scale |
    | each layer scales its own output | gates multiply over layers | what has left does not come back |
    | gates half open | rounded, straight through | half-open gates carry what hard removal then takes away |
    | [CLS] may leave | [CLS] never leaves | only masking would survive it |
    | no floor | without a schedule ``min_keep`` best tokens stay | in four words no attention is far below uniform |
    | a weight to search for (eq. 7) | quadratic penalty on the expected MACs; the target falls from 1 over half of the soft stage | one number to name (the penalty of LTMP, Bonnaerens and Dambre, TMLR 2023) |
    | nothing holds the counts later | one shift on held-out inputs | hard counts are not sums of soft gates, and drift as the weights learn |
    """

    schedule: tuple | None = None
    fuse: bool = False

    name: ClassVar[str] = "ltp"

    @classmethod
    def as_published(cls, depth: int = 12, **options: Any) -> LTP:
        """Make the method with the settings of the released code, for a model of ``depth`` layers.

        What is no setting stays as the other table says: scores, how gates act and multiply, what never leaves. A
        ``target_flops`` brings the penalty and the shift of this library along.

        | setting | default | published |
        |---|---|---|
        | ``at`` | every layer | 1 .. depth - 1: the first one has a threshold of 0 |
        | ``weight`` | 0.1 | 0.1 of the sum over the layers, where here it is of the mean; 0.01 to 0.2 |
        | ``temperature`` | 0.1 | 0.128, 1e-3 at length 128; 0.013 to 0.26 |
        | ``init`` | 1.0 | 1.28, 0.01 at length 128 |
        | ``soft_until`` | 0.3 | 0.5: 10 of 20 epochs; of large data sets 1 of 6 |
        | ``straight_through`` | True | False |
        | ``min_keep`` | 3 or 1 | 1 |
        """
        published: dict[str, Any] = {
            "at": tuple(range(1, depth)),
            "weight": 0.1 * (depth - 1),
            "temperature": 0.128,
            "init": 1.28,
            "soft_until": 0.5,
            "straight_through": False,
            "min_keep": 1,
        }
        if options.get("target_flops") is not None:  # whose penalty is another one
            del published["weight"]
        return cls(**published | options)

    def build(self, model: Architecture) -> None:
        self.merges = self.fuse
        if self.fuse:
            check_fusing(model)
        rising = [self.init * layer / max(1, model.depth) for layer in self.sites]
        self.threshold = nn.Parameter(torch.tensor(rising, dtype=torch.float32))
        check_schedule(self.schedule, self.sites)

    def choose(self, score: Tensor, view: View) -> Choice:
        choice = super().choose(score, view)
        if not self.fuse:
            return choice
        floor = self.best(score, view.protected, view.alive) if self.min_keep > 1 else view.protected
        return fused(choice.keep | floor, score, view)

    @property
    def target_now(self) -> float:
        return super().target_now if self.schedule is None else self.target_flops or 1.0

    def prepare(self, forward: RunBatch, batches: Iterable[Batch]) -> None:
        """Set the thresholds to what ``schedule`` says, site by site, at the beginning of a training."""
        if self.schedule is None or self.progress > 0:
            return
        batches = list(batches)
        with torch.no_grad():
            self.threshold.fill_(-torch.inf)
            for site, share in enumerate(self.schedule):
                records = [forward(batch) for batch in batches]
                self.threshold[site] = threshold_of([record.sites[site] for record in records], share)
