"""The main job from end to end: a model and labelled text in, a pruned model and its honest figures out."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments, set_seed

from ..api import prune, unprune
from ..core.architecture import find_architecture
from ..core.pruner import METHODS, TokenPruner
from ..data import qa
from ..data.load import load_task
from ..data.models import clip, for_task, load, make_method, reading
from ..data.task import DataError, Task
from ..data.tokenize import tokenize
from ..evaluation.hardware import environment, has_bf16
from ..evaluation.latency import compare
from ..evaluation.predict import Predictions, outcome, predict, quality
from ..evaluation.rows import row
from ..methods.topk import REPLAY, TopK
from ..reports import plots
from ..training.checkpoints import Order, last_checkpoint, step_of, writing
from ..training.interrupt import Interrupt
from ..training.monitor import Watch, prefix_drop
from ..training.trainer import Collator, PruningTrainer, Ranking
from . import recipes
from .evaluate import bench, evaluate, export  # noqa: F401  the other jobs of the command line

SUMMARY, PICTURE = "thresher.json", "training.png"
TIMED = 64  # texts that a target of time is measured on


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; everything that decides the result.

    Args:
        method: a pruning method, or "dense": the same extra steps and distillation with nothing pruned.
        method_options: its fields, e.g. ``{"target_flops": 0.4}``.
        epochs: of dense fine-tuning; 0: the model is fine-tuned already.
        prune_epochs: of training with the method, taught by the dense model.
        lr, prune_lr, pruner_lr: peak learning rates of the two stages (the second defaults to the first) and of the
            method's own parameters (its own default).
        distill: weight of the dense model's answers against the labels.
        max_length: longer texts are cut, in tokens.
        limit: training rows to use.
        dropout: overrides the model's own rates in both stages.
        bf16: autocast; None: where the processor has matrix instructions for it.
        freeze_embeddings: leave them as they were pretrained.
        dense_model: a folder to take the dense fine-tuned model from.
        replay: folder of a pruned model; the method keeps as many tokens of each text as that one does.
    """

    model: str
    data: str
    config: str | None = None
    text: str | tuple[str, ...] | None = None
    label: str | None = None
    metric: str | None = None
    method: str = "ltp"
    method_options: dict | None = None
    epochs: float = 3
    prune_epochs: float = 3
    lr: float = 5e-5
    prune_lr: float | None = None
    pruner_lr: float | None = None
    distill: float = 0.5
    batch_size: int = 32
    max_length: int = 256
    seed: int = 0
    limit: int | None = None
    dropout: float | None = None
    bf16: bool | None = None
    freeze_embeddings: bool = True
    dense_model: str | None = None
    replay: str | None = None


def train(
    model: str,
    data: str,
    out: str,
    *,
    fresh: bool = False,
    progress: bool = True,
    threads: int | None = None,
    target_flops: float | None = None,
    target_latency: float | None = None,
    target_latency_ms: float | None = None,
    keep: float | int | tuple | None = None,
    at: tuple[int, ...] | None = None,
    recipe: str | None = None,
    **options,
) -> list[dict]:
    """Fine-tune, prune and save, to a budget, in one go.

    Args:
        model: folder or hub id of a pretrained or fine-tuned model.
        data: see ``thresher.data.load_task``.
        out: the folder for the pruned model, with the dense one in ``out/dense``, the figures in ``out/thresher.json``.
            Written aside and moved into place; interrupted, the same call goes on where it was.
        fresh: forget what an earlier call left in ``out``.
        target_flops, target_latency, target_latency_ms, keep, at: the method's options, where it has them; without
            any, a method with a target leaves 40 % of the MACs.
        recipe: a method and a task, "top-mrpc" (see ``recipes``), whose settings stand where none is given.
        options: see ``Recipe``.

    Returns:
        Two rows, dense and pruned, measured on the test part.

    Raises:
        ValueError: bad input, or ``out`` holds the result of another recipe.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    method = {"target_flops": target_flops, "target_latency": target_latency, "target_latency_ms": target_latency_ms}
    method |= {"keep": keep, "at": at, **(options.pop("method_options", None) or {})}
    method = {name: value for name, value in method.items() if value is not None}
    options = {name: value for name, value in options.items() if value is not None}
    preset = {"method": "ltp", "method_options": {}} if recipe is None else recipes.recipe(recipe)
    more, options = preset.pop("method_options"), preset | options
    if not method and "target_flops" in getattr(METHODS.get(options["method"]), "__dataclass_fields__", ()):
        method = {"target_flops": 0.4}
    method = (more if options["method"] == preset["method"] else {}) | method
    return Training(Recipe(model=model, data=data, method_options=method, **options), Path(out), progress).run(fresh)


class Training:
    """One run of ``train``: its folders, its stages and what it measured."""

    def __init__(self, recipe: Recipe, out: Path, progress: bool):
        self.recipe, self.out, self.progress = recipe, out, progress
        self.work = out.with_name(f".{out.name}.training")
        self.claim = self.work / "recipe.json"

    def run(self, fresh: bool) -> list[dict]:
        recipe = self.recipe
        pruner = self._method()
        ours = (self.out / SUMMARY).exists()
        if not ours and self.out.exists() and any(self.out.iterdir()):
            raise ValueError(f"{self.out} is not empty and holds no {SUMMARY}: choose another folder for the result")
        if ours and not fresh:
            summary = json.loads((self.out / SUMMARY).read_text())
            self._same(summary.get("recipe", {}), self.out)
            return summary["rows"]
        if self.claim.exists() and not fresh:
            self._same(json.loads(self.claim.read_text()), self.work)
        started = time.time()
        task, parts, cut = self._data()
        for folder in (self.out, self.work):
            if fresh and folder.exists():
                shutil.rmtree(folder)
        # 1. the dense model
        folder = Path(recipe.dense_model) if recipe.dense_model else self.work / "dense"
        if not recipe.dense_model and not (folder / "config.json").exists():
            set_seed(recipe.seed)
            net = self._classifier(recipe.model, task)
            self._claim()
            arguments = self._arguments("dense", recipe.epochs, recipe.lr)
            if recipe.epochs:
                self._train(Trainer(net, arguments, self.collate, parts["train"]))
            self._save(net, folder)
            shutil.rmtree(arguments.output_dir, ignore_errors=True)
        # 2. the method, taught by the dense model
        net = self._classifier(str(folder), task).eval()
        self._claim()
        taught = self._taught(net, folder, pruner, parts["train"]) if recipe.prune_epochs else parts["train"]
        before = self._asked(net, folder, parts["test"], batch_size=recipe.batch_size)
        counts = None
        if recipe.replay:
            source = load(recipe.replay)[0]
            pruner = make_method(
                recipe.method, {**(recipe.method_options or {}), "keep": REPLAY, "at": source.token_pruner.sites}
            )
            kept = self._asked(source, Path(recipe.replay), parts["train"], bf16=self.bf16).kept
            taught = taught.add_column("token_counts", kept.tolist())
            counts = self._asked(source, Path(recipe.replay), parts["test"], batch_size=recipe.batch_size).kept
        prune(net, pruner or TopK(keep=1.0, at=()))
        arguments = self._arguments("prune", recipe.prune_epochs, recipe.prune_lr or recipe.lr)
        trainer = PruningTrainer(
            *(net, arguments, self.collate, taught),
            calibration_dataset=parts["validation"],
            distill=recipe.distill,
            pruner_lr=recipe.pruner_lr,
        )
        if recipe.prune_epochs:
            if not recipe.replay:  # whose counts are known on the training rows alone
                trainer.add_callback(Watch(trainer, parts["validation"], task.metric))
            set_seed(recipe.seed)
            self._train(trainer)
        if self.bf16 or not recipe.prune_epochs:
            trainer.reached.update(trainer.calibrate())  # in fp32, in which the model is measured
        if pruner is not None and pruner.needs_table:
            trainer.reached.update(self._timed(net, parts["validation"]))
        if getattr(pruner, "holes", False):
            trainer.reached.update(prefix_drop(net.eval(), parts["validation"], task.metric))
        # 3. what came of it, on the test part, which chose nothing
        untouched = recipe.method == "dense" and not recipe.prune_epochs
        after = before if untouched else predict(net.eval(), parts["test"], batch_size=recipe.batch_size, counts=counts)
        steps = {"dense": self._dense_steps(parts["train"]), "prune": trainer.state.global_step}
        rows = [
            self._row(task, parts["test"], before, before, "dense", steps["dense"]),
            self._row(task, parts["test"], after, before, recipe.method, steps["prune"]),
        ]
        if pruner is None:
            unprune(net)
        summary = {
            "recipe": asdict(recipe),
            "rows": rows,
            "steps": steps,
            "reached": {k: float(v) for k, v in trainer.reached.items()},
            "seconds": round(time.time() - started, 1),
            "texts_cut": cut,
            "removed": task.removed,
            "predictions": {
                name: _answers(p, parts["test"], task.metric) for name, p in (("dense", before), ("pruned", after))
            },
            "kept": (after.kept.float().mean(0) / after.tokens_mean).tolist(),
            "history": [line for line in trainer.state.log_history if {*line} & {"loss", "eval_quality"}],
        }
        self._finish(net, folder, summary)
        return rows

    # --- pieces --------------------------------------------------------------------------------------------------
    def _method(self) -> TokenPruner | None:
        """The method, made first so that a mistake is told before anything runs; None for "dense"."""
        if self.recipe.method == "dense":
            return None
        options = dict(self.recipe.method_options or {})
        if self.recipe.replay:
            options["keep"] = REPLAY
        return make_method(self.recipe.method, options)

    def _same(self, recipe: dict, folder: Path) -> None:
        now = json.loads(json.dumps(asdict(self.recipe)))
        other = [f"{k}: {recipe.get(k)!r} there, {v!r} asked" for k, v in now.items() if recipe.get(k) != v]
        if other:
            raise ValueError(
                f"{folder} belongs to another recipe ({'; '.join(other)}): choose another folder or start afresh"
            )

    def _claim(self) -> None:
        """Make the work folder this recipe's own, once it is known that there is something to do."""
        self.work.mkdir(parents=True, exist_ok=True)
        if not self.claim.exists():
            aside = self.claim.with_suffix(".partial")
            with writing(self.work):
                aside.write_text(json.dumps(asdict(self.recipe), indent=1))
            aside.rename(self.claim)

    def _data(self):
        r = self.recipe
        task = load_task(r.data, config=r.config, text=r.text, label=r.label, metric=r.metric, seed=0, limit=r.limit)
        if task.train is None:
            raise DataError(f"{r.data} has no training part: name a file or folder that holds train")
        self.tokenizer = reading(AutoTokenizer.from_pretrained, r.model)
        self.collate = Collator(self.tokenizer)
        self.max_length = clip(r.max_length, reading(AutoConfig.from_pretrained, r.model))
        parts, cut = {}, {}
        for name in ("train", "validation", "test"):
            parts[name], cut[name] = tokenize(getattr(task, name), task, self.tokenizer, self.max_length)
        return task, parts, cut

    @property
    def bf16(self) -> bool:
        """Whether to train under bf16 autocast."""
        return has_bf16() if self.recipe.bf16 is None else self.recipe.bf16

    def _classifier(self, model: str, task: Task) -> PreTrainedModel:
        return for_task(model, task, dropout=self.recipe.dropout, freeze_embeddings=self.recipe.freeze_embeddings)

    def _asked(self, net: PreTrainedModel, folder: Path, part, **how) -> Predictions:
        """Answers of the finished model in ``folder``, which other runs may want as well."""
        return predict(net, part, **how)

    def _taught(self, net: PreTrainedModel, folder: Path, pruner: TokenPruner | None, train):
        """The training rows with the dense model's answers, computed once, in bf16 where the training is."""
        ranks = pruner is not None and pruner.ranks_teacher
        if ranks:
            prune(net, Ranking())
        answers = self._asked(net, folder, train, batch_size=64, bf16=self.bf16, scores=ranks)
        if isinstance(answers.logits, list):
            for i, name in enumerate(("teacher_start_logits", "teacher_end_logits")):
                train = train.add_column(name, [row[i].tolist() for row in answers.logits])
        else:
            train = train.add_column("teacher_logits", answers.logits.tolist())
        if not ranks:
            return train
        unprune(net)
        return train.add_column("teacher_ranking", [score.tolist() for score in answers.scores])

    def _timed(self, net: PreTrainedModel, validation) -> dict[str, float]:
        """The asked time beside that of single texts, spread over the validation part."""
        count = min(len(validation), TIMED)
        texts = [validation[i * len(validation) // count] for i in range(count)]
        inputs = [
            {k: text[k] for k in ("input_ids", "token_type_ids", "attention_mask") if k in text} for text in texts
        ]
        dense, pruned = compare(net, ({k: torch.tensor([v]) for k, v in one.items()} for one in inputs))
        return {"latency_ms_dense": dense, "latency_ms": pruned, "latency_fraction_measured": pruned / dense}

    def _arguments(self, stage: str, epochs: float, lr: float) -> TrainingArguments:
        r = self.recipe
        on_cpu = not torch.cuda.is_available()
        return TrainingArguments(
            output_dir=str(self.work / f"{stage}-checkpoints"),
            num_train_epochs=epochs,
            learning_rate=lr,
            per_device_train_batch_size=r.batch_size,
            per_device_eval_batch_size=r.batch_size,
            lr_scheduler_type="linear",
            warmup_steps=0.06,
            train_sampling_strategy="group_by_length",
            optim="adamw_torch_fused",
            bf16=self.bf16,
            use_cpu=on_cpu,
            seed=r.seed,
            save_strategy="epoch",
            save_total_limit=1,
            logging_steps=20,
            report_to=[],
            disable_tqdm=not self.progress,
            dataloader_pin_memory=not on_cpu,
        )

    def _train(self, trainer: Trainer) -> None:
        """Train from the last checkpoint, if there is one; Ctrl-C leaves a new one and raises KeyboardInterrupt."""
        interrupt, checkpoint = Interrupt(), last_checkpoint(Path(trainer.args.output_dir))
        trainer.add_callback(interrupt)
        trainer.add_callback(Order())
        if checkpoint and self.progress:
            print(f"resumed: {checkpoint.parent.name.split('-')[0]} training goes on after step {step_of(checkpoint)}")
        with interrupt, writing(self.work):
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if interrupt.asked:
            raise KeyboardInterrupt
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # ends autocast, which would stay

    def _dense_steps(self, train) -> int:
        r = self.recipe
        return 0 if r.dense_model else math.ceil(r.epochs * math.ceil(len(train) / r.batch_size))

    def _row(self, task: Task, test, result: Predictions, before: Predictions, method: str, steps: int) -> dict:
        options = self.recipe.method_options or {}
        return row(
            task=task.name,
            model=Path(self.recipe.model).name,
            method=method,
            target_flops=None if method == "dense" else options.get("target_flops"),
            seed=self.recipe.seed,
            runtime="torch",
            precision="fp32",
            mode="dense-unpadded" if method == "dense" else "pruned",
            threads=torch.get_num_threads(),
            metric=task.metric,
            quality=quality(result, test, task.metric),
            quality_dense=quality(before, test, task.metric),
            flops_ratio=result.macs_dense / result.macs_used,
            split="test",
            selected_on=task.selected_on,
            max_length=self.max_length,
            n_examples=len(set(qa.examples(test))),
            tokens_mean=result.tokens_mean,
            trained_steps=steps,
            **environment(),
        )

    def _save(self, net: PreTrainedModel, folder: Path) -> None:
        aside = folder.with_name(folder.name + ".partial")
        shutil.rmtree(aside, ignore_errors=True)
        with writing(self.work):
            net.save_pretrained(aside)
            self.tokenizer.save_pretrained(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)

    def _finish(self, net: PreTrainedModel, dense_folder: Path, summary: dict) -> None:
        """Write the result aside, then move it into place as a whole."""
        result = self.work / "result"
        self._save(net, result)
        with writing(self.work):
            if dense_folder.parent == self.work:
                shutil.copytree(dense_folder, result / "dense")
            (result / SUMMARY).write_text(json.dumps(summary, indent=1))
            if find_spec("matplotlib") and any("eval_quality" in line for line in summary["history"]):
                plots.training(summary["history"], len(find_architecture(net).costs), result / PICTURE)
        if self.out.exists():
            self.out.rmdir()
        result.rename(self.out)
        shutil.rmtree(self.work, ignore_errors=True)


def _answers(predictions: Predictions, test, metric: str) -> list:
    """Classes, values of a regression or what each question or query gained; what paired intervals need."""
    answers = torch.as_tensor(outcome(predictions, test, metric)[0])
    if answers.dim() == 2 and answers.shape[1] > 1:
        return answers.argmax(1).tolist()
    return [round(x, 5) for x in answers.flatten().tolist()]
