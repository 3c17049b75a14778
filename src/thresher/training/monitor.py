"""What a training with pruning went through: quality and MACs after every epoch."""

from __future__ import annotations

from datasets import Dataset
from transformers import TrainerCallback

from ..data import qa
from ..evaluation.predict import predict, quality
from .trainer import PruningTrainer

WATCHED = 512  # examples of the validation part that are looked at


class Watch(TrainerCallback):
    """Log how good the model is as it would prune now, and what it costs: ``eval_quality``, ``eval_flops_fraction`` and
    ``eval_kept_<layer>``, the share of the tokens left after each site. At the end of every epoch, or whenever the
    Trainer evaluates.

    Evaluated on 512 examples spread over ``dataset``, which is the validation part.
    """

    def __init__(self, trainer: PruningTrainer, dataset: Dataset, metric: str):
        self.trainer, self.metric = trainer, metric
        total = len(set(qa.examples(dataset)))
        count = min(total, WATCHED)
        self.rows = dataset.select(qa.rows_of(dataset, [i * total // count for i in range(count)]))

    def on_epoch_end(self, args, state, control, **kwargs):
        interrupted = state.epoch % 1 and state.global_step < state.max_steps
        if args.eval_strategy == "no" and not interrupted:
            self.look(args)

    def on_evaluate(self, args, state, control, **kwargs):
        self.look(args)

    def look(self, args) -> None:
        """Take the measurements now."""
        trainer = self.trainer
        found = predict(trainer.model, self.rows, batch_size=args.eval_batch_size)
        logs = {"eval_quality": quality(found, self.rows, self.metric)}
        logs["eval_flops_fraction"] = found.macs_used / found.macs_dense
        kept = found.kept.float().mean(0) / found.tokens_mean
        logs |= {f"eval_kept_{layer}": share for layer, share in zip(trainer.pruner.sites, kept.tolist(), strict=True)}
        trainer.log({name: round(value, 4) for name, value in logs.items()})
