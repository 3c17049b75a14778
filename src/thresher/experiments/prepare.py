"""Make an encoder ready to be pruned, on texts without labels: it learns its own dense states under random schedules.

Once for an encoder, before any task. The result is an encoder like any other, from which each task starts.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..api import CONFIG_KEY, dense, prune, unprune
from ..core.architecture import find_architecture
from ..core.pruner import pruner_in
from ..data.embedder import Embedder, default_prompt_of, embedder_for, is_embedder, load_embedder
from ..data.files import reading
from ..data.models import clip
from ..data.task import DataError, Task
from ..data.texts import load_texts
from ..data.tokenize import tokenize
from ..evaluation.hardware import environment, has_bf16
from ..evaluation.predict import Text
from ..evaluation.rows import folder_written_whole, row
from ..methods.parts.distillation import state_loss
from ..methods.topk import TopK
from ..search.schedules import WIDTHS, Space
from ..training.embedding import VECTOR
from ..training.preparing import Drawn, Minutes, Preparing
from ..training.trainer import Collator, states_of
from .spec import SUMMARY, PrepareSpec, job
from .stages import remembering, run_trainer, watched
from .workspace import Workspace, inputs_of

BUDGETS = (0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85)  # shares of the MACs of the schedules that are drawn
WHOLE = 5  # one batch in so many keeps all tokens
JUDGED, WIDTH = 0.5, 0.16  # the schedule by which before and after are judged
WARMUP, SAVED, MOST = 100, 200, 10**6  # steps: of the warm-up and between checkpoints, at most; where time is the end
TASKS = ("ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification")


@dataclass(frozen=True)
class Texts:
    """The texts, tokenized, and what reads them; ``cut``: how many of the training texts were too long."""

    task: Task
    train: Dataset
    held_out: Dataset
    tokenizer: Any
    max_length: int
    cut: int


@job(PrepareSpec)
def prepare(spec: PrepareSpec, *, progress: Callable[[str, int, int | None], Any] | None = None) -> list[dict]:
    """Train a copy of an encoder, or of an embedder, to have the encoder's states while tokens leave; save it dense.

    Each batch has a schedule of its own, see ``drawn``; what is learned is said by ``Preparing``.

    Args:
        spec: see ``PrepareSpec``. ``spec.out`` is the folder for the encoder: weights and tokenizer, stage.json with
            what was done, thresher.json with the recipe and the rows. It is written aside and moved into place;
            interrupted, the same call goes on where it was.
        progress: called with what is going on, steps done and all steps.

    Returns:
        Two rows, before and after: the mean cosine, in points, of the vector (of a plain encoder the first token's last
        state) to that of the encoder as it was, on held-out texts with half of the MACs and, as the dense quality, with
        all tokens.

    Raises:
        ValueError: bad input, a model that is pruned or has a task, or ``out`` holds something else.
    """
    work = Workspace(spec)
    if (known := work.finished(spec.fresh)) is not None:
        return known["rows"]
    teacher, texts = encoder_of(spec.model), read_texts(spec)
    work.begin(spec.fresh)
    folder = work.folder / "prepared"
    if not folder.exists():
        student = deepcopy(teacher)
        space = space_of(student, texts)
        method = partial(TopK, **cast("Any", space.falling(WIDTH, JUDGED) or space.falling(0.0, JUDGED) or {}))
        work.claim()
        judge = partial(nearness, student, teacher, texts.held_out, method)
        before = remembering(work.folder / "before.json", judge)
        schedules = drawn(space)
        trainer = trained(spec, work, texts, (student, teacher), schedules, progress)
        unprune(student)
        stage = stage_of(spec, texts, schedules, trainer) | {"before": before, "after": judge()}
        with folder_written_whole(folder) as aside:
            save(spec, texts, student, stage, aside)
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    rows = json.loads((folder / SUMMARY).read_text())["rows"]
    work.deliver(folder)
    return rows


def encoder_of(model: str) -> Embedder:
    """An embedder to train, in fp32, without dropout and with its embeddings as they are; a plain encoder becomes one
    whose vector is the first token's last state, which heads read."""
    if is_embedder(model):
        return embedder_for(model, dropout=0.0, freeze_embeddings=True).eval()
    config = reading(AutoConfig.from_pretrained, model)
    if getattr(config, CONFIG_KEY, None) is not None:
        raise ValueError(f"{model} is pruned already: prepare its dense model")
    head = next((name for name in config.architectures or () if name.endswith(TASKS)), None)
    if head is not None:
        raise ValueError(f"{model} has learned a task ({head}), which would be lost: prepare an encoder, then train it")
    options: dict[str, Any] = {"dtype": torch.float32}
    options |= {} if torch.cuda.is_available() else {"attn_implementation": "eager"}  # see ``models.for_task``
    net, _ = load_embedder(model, pooling="cls", **options)
    if find_architecture(net.model).causal:
        raise ValueError(f"{model} is a decoder, whose first token sees no other: prepare an encoder")
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    embeddings = [part for name, part in net.model.named_children() if "embedding" in name]
    for part in (net.model.get_input_embeddings(), *embeddings):
        part.requires_grad_(False)
    return net.eval()


def read_texts(spec: PrepareSpec) -> Texts:
    """The texts, cut and tokenized; a part of them is held out, and judges."""
    task = load_texts(spec, seed=0)
    tokenizer = reading(AutoTokenizer.from_pretrained, spec.model)
    length = clip(spec.max_length or 256, reading(AutoConfig.from_pretrained, spec.model))
    assert task.train is not None, "load_texts holds some out of it"
    prompt = default_prompt_of(spec.model, tokenizer, length)
    train, cut = tokenize(task.train, task, tokenizer, length, prompt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it was said of the others
        held_out, _ = tokenize(task.validation, task, tokenizer, length, prompt)
    if not len(train):
        raise DataError(f"{spec.data} leaves no text to train on: give more")
    return Texts(task, train, watched(held_out), tokenizer, length, cut)


# --- schedules --------------------------------------------------------------------------------------------------------
def space_of(net: Embedder, texts: Texts) -> Space:
    """The schedules of a model, on the lengths of held-out texts."""
    lengths = torch.tensor([len(ids) for ids in texts.held_out["input_ids"]])
    return Space(find_architecture(net.model), lengths)


def drawn(space: Space) -> Drawn:
    """The method of the training: schedules of the family ``Space.falling``, from rectangular to geometric and from a
    quarter of the MACs up, and one batch in ``WHOLE`` with all tokens."""
    layers = tuple(space.layers)
    found = [space.falling(width, budget) for width in WIDTHS for budget in BUDGETS]
    shares = [dict(zip(one["at"], one["keep"], strict=True)) for one in found if one is not None and one["at"]]
    some = [tuple(share.get(layer, 1.0) for layer in layers) for share in shares]
    if not some:
        raise DataError("the texts are too short for any token to leave: give longer ones")
    whole = [(1.0,) * len(layers)] * max(1, round(len(some) / (WHOLE - 1)))
    return Drawn(1.0, at=layers, schedules=(*some, *whole))


# --- the training -----------------------------------------------------------------------------------------------------
def trained(
    spec: PrepareSpec,
    work: Workspace,
    texts: Texts,
    models: tuple[Embedder, Embedder],
    method: Drawn,
    tell: Callable | None,
) -> Preparing:
    """The trainer, once its training is over.

    Args:
        models: the encoder to train, and its teacher.
        tell: as ``progress`` of ``prepare``.
    """
    student, teacher = models
    on_cpu, every = not torch.cuda.is_available(), spec.steps or MOST
    arguments = TrainingArguments(
        output_dir=str(work.folder / "prepare-checkpoints"),
        max_steps=every,
        learning_rate=spec.lr,
        lr_scheduler_type="linear" if spec.steps else "constant_with_warmup",
        warmup_steps=min(WARMUP, max(1, every // 10)),
        per_device_train_batch_size=spec.batch_size,
        per_device_eval_batch_size=spec.batch_size,
        train_sampling_strategy="group_by_length",
        optim="adamw_torch_fused",
        bf16=has_bf16() if spec.bf16 is None else spec.bf16,
        use_cpu=on_cpu,
        seed=spec.seed,
        save_strategy="steps",
        save_steps=SAVED,
        save_total_limit=1,
        logging_steps=20,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
    )
    set_seed(spec.seed)
    prune(student, method)
    trainer = Preparing(
        *(student, arguments, Collator(texts.tokenizer), texts.train),
        teacher=teacher,
        calibration_dataset=texts.held_out,
    )
    trainer.remove_callback(PrinterCallback)
    limit = None if spec.minutes is None else Minutes(spec.minutes)
    shown = None if tell is None else Progress(tell, spec.steps, limit)
    for callback in filter(None, (limit, shown)):
        trainer.add_callback(callback)
    run_trainer(trainer, work.folder, progress=tell is not None)
    return trainer


class Progress(TrainerCallback):
    """Tell how far a training is, by its steps or, where time ends it, by an estimate of them."""

    def __init__(self, tell: Callable[[str, int, int | None], Any], steps: int | None, limit: Minutes | None):
        self.tell, self.steps, self.limit = tell, steps, limit

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ends = [] if self.steps is None else [self.steps]
        if self.limit is not None and self.limit.share > 0:
            ends.append(round(state.global_step / self.limit.share))
        self.tell("preparing", state.global_step, min(ends, default=None))


# --- before and after -------------------------------------------------------------------------------------------------
@torch.no_grad()
def nearness(student: Embedder, teacher: Embedder, rows: Dataset, method: Callable[[], TopK]) -> dict[str, float]:
    """How near a model that is not pruned comes to its teacher, with a method and with all tokens.

    Returns mean cosines: "states", the mean over layers, of what is left in each and after the last of all tokens;
    "vector", and "vector_dense", with all tokens; "flops_fraction" and "tokens_mean".
    """
    text, found = Text(cast("Any", student), rows, None), []
    pruner, depth = pruner_in(prune(student.eval(), method())), find_architecture(student.model).depth
    for some in text.batches(range(len(rows)), 32):
        inputs = text.batch(some, None, student.device)
        known, wanted = answer(teacher, inputs)
        with dense(student):
            _, whole = answer(student, inputs)
        states, vector = answer(student, inputs)
        record = pruner.last_record()
        weights = [record.entering(layer).spread_votes().float() for layer in range(1, depth)]
        near = 1 - state_loss(states[1:], known[1:], [*weights, inputs["attention_mask"].float()]).item() / depth
        cosines = [F.cosine_similarity(wanted, one, dim=-1).mean().item() for one in (vector, whole)]
        found.append([*(figure * len(some) for figure in (near, *cosines)), float(record.used), float(record.dense)])
    unprune(student)
    *sums, used, dense_macs = (sum(column) for column in zip(*found, strict=True))
    means = {name: total / len(rows) for name, total in zip(("states", "vector", "vector_dense"), sums, strict=True)}
    return means | {"flops_fraction": used / dense_macs, "tokens_mean": float(text.lengths.double().mean())}


def answer(net: Embedder, inputs: dict) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The hidden states of a batch, embeddings first, and (B, C) its vectors."""
    with states_of(find_architecture(net.model).base) as states:
        vectors = net(**inputs, output_hidden_states=True)[VECTOR]
    return [*states], vectors


# --- the folder -------------------------------------------------------------------------------------------------------
def stage_of(spec: PrepareSpec, texts: Texts, method: Drawn, trainer: Preparing) -> dict[str, Any]:
    """What was done, for stage.json."""
    return {
        "stage": "prepare",
        "model": spec.model,
        "steps": trainer.state.global_step,
        "rate": spec.lr,
        "texts": len(texts.train),
        "texts_cut": texts.cut,
        "max_length": texts.max_length,
        "at": list(method.sites),
        "schedules": [list(schedule) for schedule in method.schedules],
        "history": [line for line in trainer.state.log_history if "loss" in line],
    }


def save(spec: PrepareSpec, texts: Texts, net: Embedder, stage: dict[str, Any], folder: Path) -> None:
    """Write the encoder, of its kind, and its tokenizer, what was done, and the rows of before and after."""
    if is_embedder(spec.model):
        net.save_pretrained(folder, texts.tokenizer)
    else:
        net.model.save_pretrained(folder)
        texts.tokenizer.save_pretrained(folder)
    rows = [measured_row(spec, texts, *done) for done in ((0, stage["before"]), (stage["steps"], stage["after"]))]
    (folder / "stage.json").write_text(json.dumps(stage, indent=1))
    (folder / SUMMARY).write_text(
        json.dumps({"recipe": spec.saved(), "inputs": inputs_of(spec), "rows": rows}, indent=1)
    )


def measured_row(spec: PrepareSpec, texts: Texts, steps: int, said: dict[str, float]) -> dict:
    """The row of the encoder after so many steps, by what ``nearness`` said of it."""
    return row(
        task=texts.task.name,
        model=Path(spec.model).name,
        method="topk",
        target_flops=JUDGED,
        seed=spec.seed,
        runtime="torch",
        precision="fp32",
        mode="pruned",
        threads=torch.get_num_threads(),
        metric=texts.task.metric,
        quality=100 * said["vector"],
        quality_dense=100 * said["vector_dense"],
        flops_ratio=1 / said["flops_fraction"],
        split="validation",
        selected_on="nothing",
        max_length=texts.max_length,
        n_examples=len(texts.held_out),
        tokens_mean=said["tokens_mean"],
        trained_steps=steps,
        note="before" if not steps else "prepared",
        **environment(),
    )
