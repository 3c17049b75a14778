"""DINOv2's ViT-S/14 on pictures: ``python benchmarks/dinov2.py STEP``.

    saliency   how much of the map of what is salient is left, untrained, at 30 and 50 % fewer MACs (224 pixels)
    head       fit a head for CIFAR-10's classes on the model as it is (112 pixels), and try the methods, untrained
    train      fine-tune model and head on a part of CIFAR-10, then the --methods from it; resumes
    untrained  the methods on the fine-tuned model as they are
    time       pictures per second; nothing else may run on the machine

Rows land in ``results/dinov2`` as they are found; what is there is not made again. Wants ``python benchmarks/weights.py
dinov2-s14-saliency`` and ``THRESHER_DATA``, with ``cifar10``.

Shapes: B pictures of 3 x P x P, (P / 14)² patches and a class token.
"""

from __future__ import annotations

import argparse
import copy
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from encoder_models import PIXELS
from vision import batches, calibrated, made, taught, timed
from weights import DINOV2, available, pretrained

RUNS = Path(__file__).resolve().parent.parent / "runs" / "benchmarks" / "dinov2"
RESULTS = Path(__file__).resolve().parent / "results" / "dinov2"
SIDE, WIDE = 112, 224  # pixels, of the classes and of the maps
TRAIN, LESSONS, VALIDATION, TEST = 2000, 800, 64, 500  # pictures
TARGETS = (0.7, 0.5)  # of the MACs
METHODS = ("random", "topk", "evit", "tome", "ats", "dynamicvit")
UNTRAINED = tuple(method for method in METHODS if method != "dynamicvit")  # which is nothing before it has learned
FEW = 2  # pictures, on which a budget of fixed shares is met
TRAINING = {"per_device_train_batch_size": 32, "weight_decay": 0.05, "lr_scheduler_type": "cosine", "warmup_steps": 0.1}
MAPS = 32  # pictures of CIFAR-10, and as many crops of photographs


def cifar(part: str, count: int, side: int, seed: int = 0) -> list[dict]:
    """Rows of pixel_values (3, side, side), enlarged by bicubic interpolation, and labels: ``count`` drawn at random,
    as many of each class."""
    import numpy as np
    import pyarrow.parquet as parquet
    from PIL import Image

    table = parquet.read_table(Path(os.environ["THRESHER_DATA"]) / "cifar10" / f"{part}.parquet")
    labels, draw = np.array(table["label"]), np.random.default_rng(seed)
    chosen = [draw.choice(np.flatnonzero(labels == label), -(-count // 10), replace=False) for label in range(10)]
    rows = []
    for i in np.stack(chosen, 1).ravel()[:count]:
        with Image.open(io.BytesIO(table["image"][int(i)]["bytes"].as_py())) as picture:
            enlarged = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        rows.append({"pixel_values": pixels(np.asarray(enlarged)), "labels": int(labels[i])})
    return rows


def pixels(picture) -> Any:
    """(3, side, side) of a picture of bytes (side, side, 3), as the model was trained on them."""
    import torch

    mean, deviation = (torch.tensor(PIXELS[name])[:, None, None] for name in ("image_mean", "image_std"))
    return (torch.from_numpy(picture.copy()).permute(2, 0, 1) / 255 - mean) / deviation


def photographs(count: int, side: int, seed: int = 0) -> list[dict]:
    """Squares out of scikit-learn's two photographs, of 224 to 400 pixels, drawn at random and brought to ``side``."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    draw, rows = np.random.default_rng(seed), []
    for i in range(count):
        picture = load_sample_images().images[i % 2]
        size = int(draw.integers(224, 400))
        top, left = (int(draw.integers(0, whole - size)) for whole in picture.shape[:2])
        square = Image.fromarray(picture[top : top + size, left : left + size])
        rows.append({"pixel_values": pixels(np.asarray(square.resize((side, side), Image.Resampling.BICUBIC)))})
    return rows


def landed(name: str) -> bool:
    """Whether the rows of that name are there."""
    return (RESULTS / f"{name}.json").exists()


def land(name: str, rows: list[dict]) -> None:
    """Write rows, with what is the same in all of them."""
    import torch

    from thresher.evaluation.hardware import environment
    from thresher.evaluation.rows import row, write_rows

    common = {"model": DINOV2, "seed": 0, "runtime": "torch", "precision": "fp32", "layout": "padded"}
    common |= {"threads": torch.get_num_threads(), **environment()}
    write_rows(RESULTS / f"{name}.json", [row(**(common | one)) for one in rows])
    for one in rows:
        print(name, one.get("method"), one.get("target_flops"), one.get("quality"), one.get("note", ""), flush=True)


def method_of(name: str, target: float) -> Any:
    """A method with a budget; "dense" keeps every token."""
    from thresher import Random
    from thresher.core.pruner import METHODS as KNOWN

    return Random(keep=1.0) if name == "dense" else KNOWN[name](target_flops=target)


def budgeted(net: Any, name: str, target: float, part: list[dict]) -> Any:
    """A copy of ``net``, pruned, untrained, on its budget; None where the method refuses it, which is said."""
    from thresher import prune

    net = prune(copy.deepcopy(net), method_of(name, target))
    try:
        return calibrated(net, part if name == "ats" else part[:FEW])
    except ValueError as error:
        print(f"{name} at {target}: {error}", flush=True)
        return None


def told(net: Any, part: list[dict]) -> tuple[list[int], float, float]:
    """The classes that are answered, and MACs used and dense."""
    import torch

    said, used, dense = [], 0.0, 0.0
    with torch.inference_mode():
        for some in batches(part, 50):
            said += net(pixel_values=some).logits.argmax(-1).tolist()
            used, dense = used + float(net.token_pruner.record.used), dense + float(net.token_pruner.record.dense)
    return said, used, dense


def saliency() -> None:
    """Correlation of the maps with those of the dense model, picture by picture, over the squares of 8 x 8 that the
    decoder draws."""
    import numpy as np
    import torch
    from transformers import Dinov2Model

    from encoder_models import SaliencyHead
    from thresher import prune, unprune

    tower, head = Dinov2Model.from_pretrained(pretrained(DINOV2)).eval(), SaliencyHead(pretrained(DINOV2))
    parts = {"cifar10": cifar("test", MAPS, WIDE), "photographs": photographs(MAPS, WIDE)}

    @torch.inference_mode()
    def maps(part):
        drawn, used, dense = [], 0.0, 0.0
        for some in batches(part, 16):
            states = tower(pixel_values=some).last_hidden_state[:, 1:]
            drawn.append(torch.sigmoid(head(states)).flatten(1))
            record = tower.token_pruner.record if hasattr(tower, "token_pruner") else None
            used, dense = (used, dense) if record is None else (used + float(record.used), dense + float(record.dense))
        return torch.cat(drawn).numpy(), used, dense

    whole = {name: maps(part)[0] for name, part in parts.items()}
    for method in UNTRAINED:
        for target in TARGETS:
            if landed(f"saliency-{method}-{target:g}"):
                continue
            calm = parts["photographs"] if method == "ats" else parts["photographs"][:FEW]
            prune(tower, method_of(method, target))
            try:
                calibrated(tower, calm)
            except ValueError as error:
                print(f"{method} at {target}: {error}", flush=True)
                unprune(tower)
                continue
            rows = []
            for name, part in parts.items():
                found, used, dense = maps(part)
                alike = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(whole[name], found, strict=True)])
                drawn = np.random.default_rng(0).choice(alike, (2000, len(alike))).mean(1)
                low, high = np.percentile(100 * (1 - drawn), (2.5, 97.5))
                own = {"task": f"saliency-{name}", "method": f"{method}-untrained", "target_flops": target}
                own |= {"mode": "pruned", "metric": "correlation", "quality_dense": 100.0, "split": "test"}
                own |= {"quality": 100 * alike.mean(), "interval_low": low, "interval_high": high}
                own |= {"flops_ratio": dense / used, "n_examples": len(part), "max_length": 257}
                own |= {"note": f"of a picture, 5th percentile {100 * np.percentile(alike, 5):.1f}"}
                rows.append(own)
            unprune(tower)
            land(f"saliency-{method}-{target:g}", rows)


def trained(net: Any, folder: Path, rows: list[dict], calm: list[dict], epochs: float, lr: float) -> Any:
    """``net`` after a training, which goes on from its last checkpoint, with its pruning on where it has one."""
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    from thresher import PruningTrainer
    from thresher.evaluation.hardware import has_bf16

    log = folder.with_suffix(".log")
    args = TrainingArguments(
        output_dir=str(log),
        num_train_epochs=epochs,
        learning_rate=lr,
        seed=0,
        save_steps=10,
        save_total_limit=1,
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=has_bf16(),
        **TRAINING,
    )
    pruned = hasattr(net, "token_pruner")
    if not pruned:
        net.set_attn_implementation("eager")  # whose backward in bf16 takes two thirds of the time of sdpa's
    trainer: Any = PruningTrainer if pruned else Trainer
    trainer = trainer(net, args, train_dataset=rows, **({"calibration_dataset": calm} if pruned else {}))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(log)) if log.exists() else None)
    return net.eval()


def with_head() -> Any:
    """The classifier of the ten classes whose head alone was fitted, by logistic regression on the class token and the
    mean of the patches, as the head reads them; fitted first where it is not there."""
    import numpy as np
    import torch
    from sklearn.linear_model import LogisticRegression
    from transformers import Dinov2ForImageClassification

    def start():
        net = Dinov2ForImageClassification.from_pretrained(pretrained(DINOV2), num_labels=10).eval()
        rows = cifar("train", TRAIN + VALIDATION, SIDE)[:TRAIN]
        with torch.inference_mode():
            states = (net.dinov2(pixel_values=some).last_hidden_state for some in batches(rows, 50))
            read = torch.cat([torch.cat([x[:, 0], x[:, 1:].mean(1)], 1) for x in states]).double().numpy()
        mean, deviation = read.mean(0), read.std(0)
        fitted = LogisticRegression(C=0.01, max_iter=500).fit((read - mean) / deviation, [r["labels"] for r in rows])
        weight = torch.tensor(fitted.coef_ / deviation, dtype=torch.float32)
        with torch.no_grad():
            net.classifier.weight.copy_(weight)
            net.classifier.bias.copy_(torch.tensor(fitted.intercept_ - (fitted.coef_ / deviation) @ np.asarray(mean)))
        return net

    return Dinov2ForImageClassification.from_pretrained(made(RUNS / "head", start)).eval()


def fine_tuned() -> Any:
    """The dense classifier of the ten classes, from ``with_head``; fine-tuned first where it is not there."""
    from transformers import Dinov2ForImageClassification, set_seed

    def start():
        set_seed(0)
        rows = cifar("train", TRAIN + VALIDATION, SIDE)[:TRAIN]
        return trained(with_head(), RUNS / "dense", rows, [], epochs=1, lr=5e-5)

    return Dinov2ForImageClassification.from_pretrained(made(RUNS / "dense", start)).eval()


def row_of(name: str, target: float | None, test: list[dict], base: list[int], own: tuple, **fields: Any) -> dict:
    """A row of accuracy beside that of the dense model's answers ``base``."""
    from thresher.stats.bootstrap import bootstrap_interval
    from thresher.stats.metrics import compute_metric

    said, used, dense = own
    labels = [one["labels"] for one in test]
    low, high = bootstrap_interval("accuracy", labels, base, said)
    quality, before = compute_metric("accuracy", said, labels), compute_metric("accuracy", base, labels)
    return {
        "method": name,
        "target_flops": target,
        "mode": "pruned",
        "metric": "accuracy",
        "quality": quality,
        "quality_dense": before,
        "flops_ratio": dense / used,
        "interval_low": low,
        "interval_high": high,
        "split": "test",
        "selected_on": "validation",
        "n_examples": len(test),
        "max_length": (SIDE // 14) ** 2 + 1,
        **fields,
    }


def classes(start_from: Callable[[], Any], task: str, methods: Sequence[str], untrained: bool) -> None:
    """Accuracy of ``methods`` on a classifier as they are, or trained on for ``LESSONS`` pictures with its answers
    distilled; "dense-continued": the same steps without pruning."""
    from transformers import Dinov2ForImageClassification

    from thresher import prune

    net = start_from()
    rest, test = cifar("train", TRAIN + VALIDATION, SIDE), cifar("test", TEST, SIDE)
    calm, lessons = rest[TRAIN:], None
    base = told(prune(copy.deepcopy(net), method_of("dense", 1.0)), test)[0]
    wanted = [(method, target) for target in reversed(TARGETS) for method in methods]
    if not untrained:
        wanted.insert(0, ("dense", 1.0))
    for method, target in wanted:
        name = f"{method}{'-untrained' if untrained else '-continued' if method == 'dense' else ''}"
        if landed(f"{task}-{name}-{target:g}"):
            continue
        if untrained:
            own = budgeted(net, method, target, calm)
            if own is None:
                continue
        else:
            lessons = lessons or taught(rest[:LESSONS], net)

            def start(method=method, target=target, lessons=lessons):
                start = prune(copy.deepcopy(net), method_of(method, target))
                few = calm if method == "ats" else calm[:FEW]
                return trained(start, RUNS / f"{method}-{target:g}", lessons, few, epochs=1, lr=3e-5)

            try:
                own = prune(Dinov2ForImageClassification.from_pretrained(made(RUNS / f"{method}-{target:g}", start)))
            except ValueError as error:
                print(f"{method} at {target}: {error}", flush=True)
                continue
        how = {} if untrained else {"recipe": f"{LESSONS} pictures once, dense answers distilled", "trained_steps": 25}
        asked = None if method == "dense" else target
        row = row_of(name, asked, test, base, told(own.eval(), test), **how)
        land(f"{task}-{name}-{target:g}", [{**row, "task": task}])


def time(tiny: bool) -> None:
    """Pictures per second beside the dense model, in turns, at batches of 32 and 1, of 112 and 224 pixels; ``tiny``:
    the small pictures once, two in a batch, and no rows."""
    import numpy as np
    import torch
    from transformers import Dinov2ForImageClassification

    net = Dinov2ForImageClassification.from_pretrained(pretrained(DINOV2), num_labels=10).eval()  # weights cost nothing
    repeats, large = (1, 2) if tiny else (4, 32)
    for side in (SIDE,) if tiny else (SIDE, WIDE):
        part = photographs(large, side)
        for target in TARGETS:
            nets = {"dense": net}
            for method in ("topk", "evit", "tome"):
                if (own := budgeted(net, method, target, part)) is not None:
                    nets[method] = own
            rows = []
            for size, calls in ((large, batches(part, large)), (1, batches(part, 1)[:6])):
                taken = timed(list(nets.values()), calls, repeats)
                totals = np.median(taken, 1).sum(1)
                for i, (method, one) in enumerate(nets.items()):
                    own = {"task": "speed", "method": method, "mode": "dense-unpadded" if not i else "pruned"}
                    own |= {"batch_size": size, "max_length": (side // 14) ** 2 + 1, "repeats": repeats}
                    own |= {"samples_per_second": size * len(calls) / totals[i], "n_timed": size * len(calls)}
                    own |= {"latency_ms_p50": float(1000 * np.median(taken[i]))}
                    own |= {"speedup_unpadded": totals[0] / totals[i]}
                    own |= {"spread": float(np.subtract(*np.percentile(taken[i].sum(1), (75, 25))) * totals[i] ** -1)}
                    if i:
                        with torch.inference_mode():
                            one(pixel_values=calls[0])
                        ratio = 1 / float(one.token_pruner.record.flops_fraction())
                        own |= {"target_flops": target, "flops_ratio": ratio}
                        own |= {"efficiency": totals[0] / totals[i] / ratio}
                    rows.append(own)
            if not tiny:
                land(f"time-{side}-{target:g}", rows)


STEPS: dict[str, Callable[[argparse.Namespace], None]] = {
    "saliency": lambda _: saliency(),
    "head": lambda _: classes(with_head, "cifar10-head", UNTRAINED, untrained=True),
    "train": lambda given: classes(fine_tuned, "cifar10", given.methods, untrained=False),
    "untrained": lambda _: classes(fine_tuned, "cifar10", UNTRAINED, untrained=True),
    "time": lambda given: time(given.tiny),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="of train; default: all")
    parser.add_argument("--tiny", action="store_true", help="of time: try it, and write no rows")
    given = parser.parse_args()
    if not available(DINOV2):
        parser.error(f"{pretrained(DINOV2)} is not there: python benchmarks/weights.py {DINOV2}")
    RUNS.mkdir(parents=True, exist_ok=True)
    STEPS[given.step](given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
