"""How fast a pruned encoder is trained, in its soft and in its hard stage.

    python benchmarks/training_speed.py speed [SHAPE ...]    tokens per second; rows in results/training
    python benchmarks/training_speed.py curve                the loss on MRPC, MiniLM-L6, one epoch

Random weights of the shapes of ``floor.py`` and random texts as long as MRPC's, 32 in a batch, LTP, bf16 autocast: all
as ``PruningTrainer`` does it. ``--label`` names the code: with PYTHONPATH on an older checkout the same script measures
that, and the last rows of each label stay in the file. ``--threads N``; ``THRESHER_DATA`` names the data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from floor import DATA, minilm, network  # noqa: E402

RESULTS = HERE / "results" / "training"
SHAPES, ROWS = ("minilm-l6", "bert-base"), 32
STEPS, SKIPPED = {"minilm-l6": 12, "bert-base": 6}, 2  # of each stage, and of these the first


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.taken.append(perf_counter() - self.start)


def texts(count: int) -> Dataset:
    """Random texts of 40 to 66 tokens, as long as MRPC's."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(40, 67, (count,), generator=draw).tolist()
    ids = [torch.randint(1000, 30_000, (n,), generator=draw).tolist() for n in lengths]
    labels = torch.randint(0, 2, (count,), generator=draw).tolist()
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels})


def trainer_of(net: Any, tokenizer: Any, data: Dataset, steps: int, soft: int, folder: str) -> Any:
    """A trainer of a pruned model as the recipes make it."""
    from transformers import DataCollatorWithPadding

    from thresher.training.trainer import PruningTrainer

    how = {"max_steps": steps, "per_device_train_batch_size": ROWS, "optim": "adamw_torch_fused", "bf16": True}
    how |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    how |= {"train_sampling_strategy": "group_by_length", "dataloader_pin_memory": False, "seed": 0}
    arguments = TrainingArguments(output_dir=folder, **how)
    collate = DataCollatorWithPadding(tokenizer)
    return PruningTrainer(model=net, args=arguments, train_dataset=data, data_collator=collate, soft_steps=soft)


def speed(shape: str, label: str) -> list[dict]:
    """Tokens per second in both stages."""
    from thresher import LTP, prune
    from thresher.evaluation.hardware import environment
    from thresher.evaluation.rows import row

    tokenizer, steps = minilm()[1], STEPS[shape]
    data = texts(ROWS * 2 * steps)
    net = prune(network(shape), LTP(target_flops=0.4))
    clock, rows = Clock(), []
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(net, tokenizer, data, 2 * steps, steps, folder)
        trainer.add_callback(clock)
        trainer.train()
    tokens = sum(map(len, data["input_ids"])) / len(data)
    for stage, taken in (("soft", clock.taken[SKIPPED:steps]), ("hard", clock.taken[steps + SKIPPED :])):
        low, middle, high = statistics.quantiles(taken, n=4)
        common = {"task": "synthetic", "model": shape, "method": "ltp", "runtime": "torch", "precision": "bf16"}
        common |= {"mode": f"training, {stage}", "batch_size": ROWS, "threads": torch.get_num_threads()}
        common |= {"split": "train", "tokens_mean": tokens, "recipe": label, "repeats": len(taken)}
        common |= {"latency_ms_p50": 1000 * middle, "spread": (high - low) / middle}
        told = f"{ROWS * tokens / middle:.0f} tokens per second"
        rows.append(row(**common, samples_per_second=ROWS / middle, note=told, **environment()))
    return rows


def curve(label: str, seed: int) -> list[dict]:
    """The loss of an epoch on MRPC, by fifths."""
    from thresher import LTP, prune
    from thresher.data.load import load_task
    from thresher.data.tokenize import tokenize
    from thresher.evaluation.hardware import environment
    from thresher.evaluation.rows import row

    net, tokenizer = minilm()
    task = load_task(str(DATA / "glue" / "mrpc"))
    data = tokenize(task.train, task, tokenizer, 128)[0]
    torch.manual_seed(seed)
    steps = len(data) // ROWS
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(prune(net, LTP(target_flops=0.5)), tokenizer, data, steps, steps // 2, folder)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    fifths = [statistics.mean(losses[i * steps // 5 : (i + 1) * steps // 5]) for i in range(5)]
    common = {"task": "mrpc", "model": "minilm-l6", "method": "ltp", "runtime": "torch", "precision": "bf16"}
    common |= {"mode": "training", "batch_size": ROWS, "threads": torch.get_num_threads(), "split": "train"}
    told = "loss by fifths of an epoch: " + ", ".join(f"{loss:.3f}" for loss in fifths)
    return [row(**common, seed=seed, recipe=label, note=told, **environment())]


def written(name: str, label: str, rows: list[dict]) -> None:
    """Write the rows of a label beside those of others."""
    from thresher.evaluation.rows import write_rows

    file = RESULTS / f"{name}-{torch.get_num_threads()}-threads.json"
    known = json.loads(file.read_text())["rows"] if file.exists() else []
    write_rows(file, [*(one for one in known if one["recipe"] != label), *rows])
    for one in rows:
        print(one["model"], one["mode"], label, one["note"])


def main() -> None:
    """Run a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("speed", "curve"))
    parser.add_argument("shapes", nargs="*")
    parser.add_argument("--label", default="now")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.step == "curve":
        written(f"curve-s{given.seed}", given.label, curve(given.label, given.seed))
        return
    for shape in given.shapes or SHAPES:
        written(f"speed-{shape}", given.label, speed(shape, given.label))


if __name__ == "__main__":
    main()
