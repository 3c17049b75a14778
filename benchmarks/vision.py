"""A small ViT that looks for scikit-learn's digits in noise: accuracy against tokens and time, trained or not.

Shapes: B pictures of 1 x 16 x 16, 64 patches of 2 x 2, 65 tokens with the class token.
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from pathlib import Path

SIZE, DIGIT, PATCH = 16, 8, 2  # pixels
NOISE = 0.3  # the brightest of the background, of a stroke's 1
TEST, VALIDATION, PLACES = 597, 100, 8  # digits; how often each digit of the training part is put somewhere
FEW = 2  # pictures: a share of 65 tokens is as many in every one
MODEL = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 96}
MODEL |= {"image_size": SIZE, "patch_size": PATCH, "num_channels": 1, "num_labels": 10, "initializer_range": 0.1}
MODEL |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TRAINING = {
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 100,
    "weight_decay": 0.05,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
}
REPEATS = 5  # of every timed call
ALONE = ("topk", "random", "evit", "tome", "tofu")  # untrained
TUNED = ("topk", "random", "evit", "tome", "dynamicvit")
ABOUT = """\
A ViT of 4 layers, 48 channels and 3 heads, trained from scratch. Its pictures: scikit-learn's 1,797 digits, 8 x 8, each
in a quarter of a canvas of 16 x 16, drawn at random; the canvas is uniform noise up to 0.3 of the brightest stroke, and
a pixel is the brighter of digit and noise. In patches of 2 x 2 these are 64 tokens and the class token, and three
quarters of the patches are noise alone. 1,100 digits train, each in 8 canvases, for 3 epochs; 100 are the validation
part, 597, in one canvas each, the test part. Untrained: the method on this ViT. The others are fine-tuned from it with
their pruning on, and dense-continued without any, for 0.6 epochs, with the dense model's answers distilled. The number
behind a method is the share of the dense MACs that it was to meet on the validation part. One seed. ATS is
not here: it leaps over both budgets, from all tokens to a quarter of them."""


def pictures(seed: int) -> dict[str, list[dict]]:
    """The parts train, validation and test, as rows of pixel_values (1, 16, 16) in [-1, 1] and labels.

    A digit of 8 x 8 lies in one of the four quarters, drawn at random, in uniform noise: each pixel is the brighter of
    the two. The parts have the same shares of each class, and no digit is in two parts.
    """
    import numpy as np
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits, classes = load_digits(return_X_y=True)
    digits, draw = digits.reshape(-1, DIGIT, DIGIT) / 16, np.random.default_rng(seed)
    rest, test = train_test_split(range(len(classes)), test_size=TEST, stratify=classes, random_state=seed)
    train, validation = train_test_split(rest, test_size=VALIDATION, stratify=classes[rest], random_state=seed)
    parts = {}
    for name, part in (("train", np.repeat(train, PLACES)), ("validation", validation), ("test", test)):
        canvas = draw.uniform(0, NOISE, (len(part), SIZE, SIZE))
        places = DIGIT * draw.integers(0, SIZE // DIGIT, (len(part), 2))
        for picture, i, (y, x) in zip(canvas, part, places, strict=True):
            window = picture[y : y + DIGIT, x : x + DIGIT]
            np.maximum(window, digits[i], out=window)
        pixels = torch.tensor(2 * canvas[:, None] - 1, dtype=torch.float32)
        parts[name] = [{"pixel_values": p, "labels": int(classes[i])} for p, i in zip(pixels, part, strict=True)]
    return parts


def batches(part: list[dict], size: int) -> list:
    """Pixels (B, 1, 16, 16) of a part, ``size`` pictures in each."""
    import torch

    return [torch.stack([row["pixel_values"] for row in part[i : i + size]]) for i in range(0, len(part), size)]


def made(folder: Path, make) -> Path:
    """A model's folder: what ``make()`` returns, saved whole, unless it is there already."""
    if not (folder / "config.json").exists():
        aside = folder.with_suffix(".partial")
        shutil.rmtree(aside, ignore_errors=True)
        make().save_pretrained(aside)
        os.replace(aside, folder)
    return folder


def trained(net, folder: Path, parts: dict, seed: int, epochs: float, lr: float):
    """``net`` after a training, with its pruning on where it has one."""
    from transformers import Trainer, TrainingArguments

    from thresher import PruningTrainer

    args = TrainingArguments(
        output_dir=str(folder.with_suffix(".log")),
        num_train_epochs=epochs,
        learning_rate=lr,
        seed=seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **TRAINING,
    )
    if hasattr(net, "token_pruner"):
        few = parts["validation"][:FEW]
        trainer = PruningTrainer(net, args, train_dataset=parts["train"], calibration_dataset=few)
    else:
        trainer = Trainer(net, args, train_dataset=parts["train"])
    trainer.train()
    return net.eval()


def taught(part: list[dict], teacher) -> list[dict]:
    """A part with the logits of ``teacher``, which the trainer distils."""
    import torch

    with torch.inference_mode():
        logits = torch.cat([teacher(pixel_values=pixels).logits for pixels in batches(part, 100)]).clone()
    return [row | {"teacher_logits": own} for row, own in zip(part, logits, strict=True)]


def calibrated(net, part: list[dict]):
    """``net``, untrained, with its method on its budget on a part."""

    def forward(pixels):
        net(pixel_values=pixels)
        return net.token_pruner.record

    net.token_pruner.calibrate(forward, batches(part, 100))
    return net


def answers(net, part: list[dict]) -> dict:
    """Classes that are answered, MACs used and dense, and the mean tokens that enter each layer."""
    import torch

    said, used, dense, tokens = [], 0.0, 0.0, 0
    with torch.inference_mode():
        for pixels in batches(part, 100):
            said += net(pixel_values=pixels).logits.argmax(-1).tolist()
            record = net.token_pruner.record
            used, dense = used + float(record.used), dense + float(record.dense)
            tokens = tokens + torch.stack([count.n_attention.sum() for count in record.counts])
    return {"said": said, "used": used, "dense": dense, "tokens": (tokens / len(part)).tolist()}


def timed(nets: list, calls: list, repeats: int):
    """Seconds (models, repeats, calls): the models take turns at every call, after one pass that is not counted."""
    import numpy as np
    import torch

    taken = np.empty((len(nets), 1 + repeats, len(calls)))
    with torch.inference_mode():
        for repeat in range(1 + repeats):
            for c, pixels in enumerate(calls):
                for turn in range(len(nets)):
                    i = (repeat + c + turn) % len(nets)
                    start = time.perf_counter()
                    nets[i](pixel_values=pixels)
                    taken[i, repeat, c] = time.perf_counter() - start
    return taken[:, 1:]


def measure_vision(entry, runs: Path) -> list[dict]:
    """Rows of the dense ViT and of methods on it: "untrained" at several budgets, and fine-tuned from it, with the same
    steps, at one; accuracy on the test part, time at batch sizes 32 and 1.

    Budgets are met on the validation part. Every model is kept in ``runs`` as it is finished.
    """
    from transformers import ViTConfig, ViTForImageClassification, set_seed

    from thresher import Random, prune, unprune
    from thresher.core.pruner import METHODS

    own, folder, parts = entry.options, runs / entry.name, pictures(entry.seed)

    def start():
        set_seed(entry.seed)
        return trained(ViTForImageClassification(ViTConfig(**MODEL)), folder, parts, entry.seed, *own["dense"])

    def load(name: str):
        return ViTForImageClassification.from_pretrained(folder / name).eval()

    made(folder / "dense", start)
    dense, few, pruned = load("dense"), parts["validation"][:FEW], {}
    for method in ALONE:
        for target in own["targets"]:
            net = copy.deepcopy(dense)
            prune(net, METHODS[method](target_flops=target))
            name = f"{method}-untrained"
            made(folder / f"{name}-{target:g}", lambda net=net: calibrated(net, few))
            pruned[name, target] = prune(load(f"{name}-{target:g}"))
    lessons = parts | {"train": taught(parts["train"], dense)}
    for method in (None, *TUNED):  # None: the same steps, and every token stays
        chosen = Random(keep=1.0) if method is None else METHODS[method](target_flops=own["tuned"])
        name = "dense-continued" if method is None else method
        net = prune(copy.deepcopy(dense), chosen)
        made(folder / name, lambda net=net: trained(net, folder, lessons, entry.seed, *own["steps"]))
        pruned[name, None if method is None else own["tuned"]] = prune(load(name))
    found = {key: answers(net, parts["test"]) for key, net in pruned.items()}
    whole = prune(copy.deepcopy(dense), Random(keep=1.0))
    found = {("dense", None): answers(whole, parts["test"]), **found}
    nets = {("dense", None): dense, **pruned}
    unprune(nets["dense-continued", None])
    return rows_of(entry, parts["test"], nets, found)


def rows_of(entry, test: list[dict], nets: dict, found: dict) -> list[dict]:
    """Two rows, of the two batch sizes, for each of ``nets``, by method and target, and what it ``found``."""
    import numpy as np
    import torch

    from thresher.evaluation.hardware import environment
    from thresher.evaluation.rows import row
    from thresher.stats.bootstrap import bootstrap_interval
    from thresher.stats.metrics import compute_metric

    labels, base = [r["labels"] for r in test], found["dense", None]
    common = {"task": "digits", "model": entry.model, "seed": entry.seed, "runtime": "torch", "precision": "fp32"}
    common |= {"layout": "padded", "threads": torch.get_num_threads(), "metric": "accuracy", "split": "test"}
    common |= {"selected_on": "validation", "n_examples": len(test), "repeats": REPEATS, **environment()}
    common |= {"quality_dense": compute_metric("accuracy", base["said"], labels), "flops_dense": int(base["dense"])}
    rows = []
    for size, calls in ((32, batches(test, 32)[:8]), (1, batches(test, 1)[:24])):
        taken = timed(list(nets.values()), calls, REPEATS)
        totals = np.median(taken, axis=1).sum(1)
        for i, ((method, target), what) in enumerate(found.items()):
            quality, ratio = compute_metric("accuracy", what["said"], labels), what["dense"] / what["used"]
            low, high = bootstrap_interval("accuracy", labels, base["said"], what["said"])
            calling, sums = 1000 * np.median(taken[i], axis=0), taken[i].sum(1)
            speedup = float(totals[0] / totals[i])
            own = {"method": method, "target_flops": target, "mode": "pruned", "batch_size": size, "quality": quality}
            own |= {"flops_ratio": ratio, "flops_used": int(what["used"]), "interval_low": low, "interval_high": high}
            own |= {"latency_ms_p50": float(np.median(calling)), "latency_ms_p95": float(np.percentile(calling, 95))}
            own |= {"samples_per_second": size * len(calls) / float(totals[i]), "n_timed": size * len(calls)}
            own |= {"speedup_unpadded": speedup, "efficiency": speedup / ratio, "tokens_mean": what["tokens"][0]}
            own |= {"spread": float(np.subtract(*np.percentile(sums, (75, 25))) / np.median(sums))}
            own |= {"note": "tokens entering the layers: " + ", ".join(f"{n:.1f}" for n in what["tokens"])}
            if method == "dense":
                own |= {"mode": "dense-unpadded", "interval_low": None, "interval_high": None}
            rows.append(row(**common, **own))
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """One PNG: accuracy against the mean number of tokens that enter a layer, with the 95 % intervals of the drop; rows
    in which nothing left are not in it."""
    from thresher.reports.style import COLOURS, DENSE, drawing, legend_below

    lines: dict[str, list[tuple]] = {}
    for row in (row for row in rows if row["batch_size"] == 1 and row["flops_ratio"] > 1):
        entering = [float(n) for n in row["note"].partition(": ")[2].split(", ")]
        drop = row["quality_dense"] - row["quality"]
        ends = row["interval_high"] - drop, drop - row["interval_low"]
        lines.setdefault(row["method"], []).append((sum(entering) / len(entering), row["quality"], *ends))
    names = sorted({name.removesuffix("-untrained") for name in lines})
    with drawing(path, 6.4, 4) as figure:
        axis = figure.subplots()
        axis.axhline(rows[0]["quality_dense"], label="dense", **DENSE)
        for i, name in enumerate(names):
            for kind, style in (("-untrained", "o-"), ("", "*")):
                if points := lines.get(name + kind):
                    label, size = name + (kind and ", untrained"), 5 if kind else 12
                    x, y, below, above = zip(*points, strict=True)
                    look = {"color": COLOURS[i], "markersize": size, "elinewidth": 0.6, "label": label}
                    axis.errorbar(x, y, (below, above), fmt=style, **look)
        axis.set_xlabel("tokens entering a layer, mean (dense: 65)")
        axis.set_ylabel("accuracy on the test part, points")
        legend_below(figure, 4)
