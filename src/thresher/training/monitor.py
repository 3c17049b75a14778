"""What a training with pruning went through: quality and MACs after every epoch, and one picture of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback

from ..data import qa
from ..evaluation.predict import predict, quality
from ..evaluation.rows import whole
from .trainer import PruningTrainer

WATCHED = 512  # examples of the validation part that are looked at


class Watch(TrainerCallback):
    """Logs at the end of every epoch how good the model is as it would prune now, and what it costs: ``eval_quality``,
    ``eval_flops_fraction`` and ``eval_kept_<layer>``, the share of the tokens left after each site.

    Evaluated on 512 examples spread over ``dataset``, which is the validation part.
    """

    def __init__(self, trainer: PruningTrainer, dataset: Dataset, metric: str):
        self.trainer, self.metric = trainer, metric
        total = len(set(qa.examples(dataset)))
        count = min(total, WATCHED)
        self.rows = dataset.select(qa.rows_of(dataset, [i * total // count for i in range(count)]))

    def on_epoch_end(self, args, state, control, **kwargs):
        if state.epoch % 1 and state.global_step < state.max_steps:
            return  # interrupted
        trainer = self.trainer
        found = predict(trainer.model, self.rows, batch_size=args.eval_batch_size)
        logs = {"eval_quality": quality(found, self.rows, self.metric)}
        logs["eval_flops_fraction"] = found.macs_used / found.macs_dense
        kept = found.kept.float().mean(0) / found.tokens_mean
        logs |= {f"eval_kept_{layer}": share for layer, share in zip(trainer.pruner.sites, kept.tolist(), strict=True)}
        trainer.log({name: round(value, 4) for name, value in logs.items()})


def prefix_drop(model: PreTrainedModel, dataset: Dataset, metric: str) -> dict[str, float]:
    """Points that are lost on ``dataset`` by masks without holes (``ToP.prefix``), and the share of the dense MACs that
    is then left; the masks are left as they are."""
    pruner = model.token_pruner
    mask, own = pruner.mask.clone(), quality(predict(model, dataset), dataset, metric)
    pruner.prefix()
    try:
        found = predict(model, dataset)
    finally:
        pruner.mask.copy_(mask)
    drop = own - quality(found, dataset, metric)
    return {"prefix_drop": drop, "prefix_flops_fraction": found.macs_used / found.macs_dense}


def picture(history: Sequence[dict[str, Any]], depth: int, path: str | Path, dense: float | None = None) -> None:
    """One PNG of a training: what is left at each layer, quality against FLOPs, and the budget, from its log.

    Args:
        history: ``trainer.state.log_history`` of a training that ``Watch`` followed.
        depth: layers of the model.
        dense: quality of the dense model, for a line.

    Raises:
        ValueError: nothing was watched, or matplotlib is missing.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib import colormaps, rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("the picture needs matplotlib, which is missing: pip install 'thresher[plot]'") from None
    epochs = [line for line in history if "eval_quality" in line]
    steps = [line for line in history if "loss" in line and "flops_fraction" in line]
    if not epochs:
        raise ValueError("there is nothing to draw: no epoch was watched")
    with rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 3.8), dpi=150, layout="constrained")
        layers, path_of, budget = figure.subplots(1, 3)
        shades = colormaps["viridis"]([0.85 * (1 - i / max(1, len(epochs) - 1)) for i in range(len(epochs))])
        for line, shade in zip(epochs, shades, strict=True):
            left, shares = 1.0, []
            for layer in range(depth):
                shares.append(100 * left)  # that enter the layer
                left = line.get(f"eval_kept_{layer}", left)
            layers.plot(range(depth), shares, color=shade, marker="o", markersize=3, label=f"epoch {line['epoch']:g}")
        layers.set(title="tokens entering each layer", xlabel="layer", ylabel="% of the tokens", ylim=(0, 105))
        layers.set_xticks(range(depth))
        layers.legend(frameon=False, fontsize=8)
        flops, points = ([line[name] for line in epochs] for name in ("eval_flops_fraction", "eval_quality"))
        path_of.plot(flops, points, color="#B8B8B8", linewidth=1, zorder=1)
        path_of.scatter(flops, points, color=shades, zorder=2)
        for line, x, y in zip(epochs, flops, points, strict=True):
            path_of.annotate(f"{line['epoch']:g}", (x, y), (4, 4), textcoords="offset points", fontsize=8)
        if dense is not None:
            path_of.axhline(dense, color="#888888", linestyle="--", linewidth=1)
        path_of.set(title="quality against FLOPs, by epoch (validation)", xlabel="share of the dense MACs")
        path_of.set_ylabel("points")
        for name, label in (
            ("flops_fraction", "last batch"),
            ("cost_expected", "expected"),
            ("cost_hard", "without chance"),
            ("cost_target", "target"),
        ):
            known = [(line["epoch"], line[name]) for line in steps if name in line]
            if known:
                style = {"color": "black", "linestyle": "--"} if name == "cost_target" else {}
                budget.plot(*zip(*known, strict=True), label=label, linewidth=1.2, **style)
        budget.set(title="the budget through training", xlabel="epoch", ylabel="share of the dense cost")
        if steps:
            budget.legend(frameon=False, fontsize=8)
        with whole(path) as temporary:
            figure.savefig(temporary, format="png")
