"""Timing entries: all methods of a task in one interleaved run, and the efficiency of packed execution by itself."""

from __future__ import annotations

from pathlib import Path

from soak import measure_soak
from tuning import judged, measure_audit, measure_coverage, measure_tune
from vision import measure_vision

# of some labels alone, or untrained
UNJUDGED = dict.fromkeys(("quality", "quality_dense", "interval_low", "interval_high"))


def measure_task(entry, runs: Path) -> list[dict]:
    """Wall-clock rows of the models an entry needs: the dense one first, then the pruned ones, on the
    first texts of the test part; quality where these are all. They keep as many tokens as the first of the pruned ones,
    or with "replayed" False their own."""
    from entries import ENTRIES, TASKS
    from thresher.data.load import load_task
    from thresher.data.models import load
    from thresher.data.tokenize import tokenize
    from thresher.evaluation.benchmark import measure
    from thresher.evaluation.predict import predict

    setting = TASKS[entry.task]
    first, *others = entry.needs
    dense, tokenizer = load(str(runs / first))
    task = load_task(setting.path, config=setting.config, limit=setting.limit)
    test = tokenize(task.test, task, tokenizer, setting.training["max_length"])[0]
    net = load(str(runs / others[0]))[0]
    whole = len(test) <= entry.options["limit"]
    test = test if whole else test.select(range(entry.options["limit"]))
    labels = {other.name: other.label for other in ENTRIES}
    baselines = {labels[name]: load(str(runs / name))[0] for name in others[1:]}
    if entry.options.get("replayed", True):
        kept = predict(net, test).kept
        for model in baselines.values():
            model.token_pruner.row_counts = kept
    rows = measure(
        net,
        test,
        task,
        max_length=setting.training["max_length"],
        against=dense,
        baselines=baselines,
        repeats=5,
        fields={"model": entry.model, "split": "test", "target_flops": entry.target, "seed": entry.seed},
    )
    return rows if whole else [{**row, **UNJUDGED} for row in rows]


def measure_efficiency(entry, runs: Path) -> list[dict]:
    """Efficiency at fixed FLOPs reductions, untrained: TopK schedules on the lengths of a task's first 256 test texts
    ("least": of those with so many tokens); "timing" holds other arguments of ``measure``."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from entries import TASKS
    from thresher import TopK, prune, unprune
    from thresher.data.load import load_task
    from thresher.data.tokenize import tokenize
    from thresher.evaluation.benchmark import measure
    from weights import pretrained

    rows = []
    setting = TASKS[entry.task]
    task = load_task(setting.path, config=setting.config)
    source, classes = pretrained(entry.model), max(2, len(task.labels))
    net = AutoModelForSequenceClassification.from_pretrained(source, num_labels=classes).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    longest, least = entry.options["max_length"], entry.options.get("least", 1)
    test = tokenize(task.test, task, tokenizer, longest)[0]
    test = test.select([i for i, ids in enumerate(test["input_ids"]) if len(ids) >= least][:256])
    for ratio, keep in entry.options["keeps"].items():
        prune(net, TopK(keep=keep, at=entry.options["at"]))
        timed = measure(
            net,
            test,
            task,
            max_length=longest,
            batch_sizes=entry.options["batch_sizes"],
            fields={"model": entry.model, "split": "test", "recipe": f"untrained TopK(keep={keep}), {ratio}"},
            **{"modes": ("dense-unpadded", "pruned"), "repeats": 5, "batches": 4} | entry.options.get("timing", {}),
        )
        unprune(net)
        rows += [{**row, **UNJUDGED} for row in timed]
    return rows


def measure_runtimes(entry, runs: Path) -> list[dict]:
    """A pruned model and its dense one in every runtime and precision, in one interleaved run; quality on the whole
    test part, or on so many of its texts, drawn at random."""
    from entries import TASKS
    from thresher.experiments.bench import bench

    setting, (dense, pruned) = TASKS[entry.task], entry.needs
    rows = bench(
        str(runs / pruned),
        setting.path,
        config=setting.config,
        against=str(runs / dense),
        runtime=entry.options.get("runtime", ("torch", "onnx", "openvino")),
        precision=("fp32", "bf16", "int8"),
        max_length=setting.training["max_length"],
        limit=entry.options.get("limit"),
        repeats=entry.options.get("repeats", 5),
        examples=32,
        batches=4,
        baselines=(),
        graphs=runs / "graphs" / entry.name,
    )
    return [{**row, "model": entry.model, "target_flops": entry.target, "seed": entry.seed} for row in rows]


def graph_of(net, place: Path, longest: int, *, source: str | None = None, **how):
    """The runtime of a model's graph in ``place``, exported where another one is there or none; ``source``: the model's
    fingerprint, where it is known."""
    from thresher import export, load_runtime
    from thresher.exporting.export import fingerprint, source_of

    if source_of(place) != (source or fingerprint(net), longest):
        export(net, place, max_length=longest, **how)
    return load_runtime(place)


def measure_compression(entry, runs: Path) -> list[dict]:
    """Token pruning beside other compression, and on top of it: a model, the same pruned, one of half the layers, and
    that pruned as well, in torch and as int8 graphs of ONNX Runtime, in one interleaved run on the whole test part."""
    from entries import TASKS
    from thresher.data.load import load_task
    from thresher.data.models import load
    from thresher.data.tokenize import tokenize
    from thresher.evaluation.benchmark import measure

    setting = TASKS[entry.task]
    names = ("dense", "pruned", "minilm-l3", "minilm-l3 top")
    models = {name: load(str(runs / need))[0] for name, need in zip(names, entry.needs, strict=True)}
    tokenizer, longest = load(str(runs / entry.needs[0]))[1], setting.training["max_length"]
    folder, how = runs / "graphs" / entry.name, {"tokenizer": tokenizer, "format": "onnx", "precision": "int8"}
    places = {name: folder / f"{name.replace(' ', '-')}-onnx-int8" for name in names}
    opened = {name: graph_of(net, places[name], longest, **how) for name, net in models.items()}
    task = load_task(setting.path, config=setting.config)
    rows = measure(
        models["pruned"],
        tokenize(task.test, task, tokenizer, longest)[0],
        task,
        max_length=longest,
        against=models["dense"],
        baselines={name: models[name] for name in names[2:]},
        graphs={("onnx", "int8"): opened},
        examples=32,
        batches=4,
        fields={"model": entry.model, "split": "test", "seed": entry.seed},
    )
    return [{**row, "target_flops": entry.target} for row in rows]


def measure_anytime(entry, runs: Path) -> list[dict]:
    """Quality of one model on the test part at several budgets, chosen at run time."""
    from entries import TASKS
    from thresher.data.load import load_task
    from thresher.data.models import load
    from thresher.data.tokenize import tokenize
    from thresher.evaluation.predict import predict

    setting, (dense, pruned) = TASKS[entry.task], (str(runs / name) for name in entry.needs)
    net, tokenizer = load(pruned)
    task = load_task(setting.path, config=setting.config)
    test = tokenize(task.test, task, tokenizer, setting.training["max_length"])[0]
    before, rows = predict(load(dense)[0], test), []
    for budget in entry.options["budgets"]:
        net.token_pruner.budget = budget
        rows.append(judged(entry, task, test, before, predict(net, test), target_flops=budget))
    return rows


def measure_choice(entry, runs: Path) -> list[dict]:
    """What choosing alone takes: a threshold beside the k best of the same scores, interleaved, in microseconds."""
    import statistics
    import time

    import torch
    from transformers import BertConfig, BertModel

    from thresher import Threshold, TopK, prune
    from thresher.core.tokens import Padded
    from thresher.core.view import View
    from thresher.evaluation.hardware import environment
    from thresher.evaluation.rows import row

    threads, rows = torch.get_num_threads(), []
    methods = {"threshold": Threshold(1.0, at=(0,)), "topk": TopK(keep=0.5, at=(0,))}
    for method in methods.values():
        prune(BertModel(BertConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=1)), method)
    draw = torch.Generator().manual_seed(0)
    for size, length in entry.options["shapes"]:
        score, hidden = torch.rand(size, length, generator=draw) * 2, torch.zeros(size, length, 1)
        tokens = Padded.start(hidden, None)
        view = View(0, 0, tokens, torch.arange(length) == torch.zeros(size, 1), hidden)
        times = {name: [] for name in methods}
        for _ in range(entry.options["calls"]):
            for name, method in methods.items():
                start = time.perf_counter()
                method.choose(score, view)
                times[name].append(1e6 * (time.perf_counter() - start))
        for name, taken in times.items():
            low, middle, high = statistics.quantiles(taken, n=4)
            common = {"task": entry.task, "model": "none", "method": name, "runtime": "torch", "precision": "fp32"}
            common |= {"batch_size": size, "max_length": length, "threads": threads, "split": "none"}
            timed = {"latency_ms_p50": middle / 1000, "spread": (high - low) / middle, "repeats": len(taken)}
            rows.append(row(**common, **timed, **environment()))
    return rows


def measure_synthetic(entry, runs: Path) -> list[dict]:
    """Pure speed: random weights of BERT-base's shape, rows of equal length or of lengths from "least" up, fixed
    schedules, in every runtime that an entry names; one interleaved run per schedule."""
    import torch
    from datasets import Dataset
    from transformers import BertConfig, BertForSequenceClassification

    from thresher import TopK, prune, unprune
    from thresher.data.task import Task
    from thresher.evaluation.benchmark import measure
    from thresher.evaluation.roofline import roofline
    from thresher.exporting.export import fingerprint

    torch.manual_seed(0)
    net = BertForSequenceClassification(BertConfig()).eval()
    (size, length), threads = entry.options["shape"], torch.get_num_threads()
    draw = torch.Generator().manual_seed(0)
    count, least = size * entry.options["batches"], entry.options.get("least", length)
    ids = torch.randint(1000, 30_000, (count, length), generator=draw).tolist()
    ids = [row[:n] for row, n in zip(ids, torch.randint(least, length + 1, (count,), generator=draw), strict=True)]
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    task = Task(None, None, data, ("text",), None, [], "classification", "accuracy", "synthetic", "nothing", {})
    rows, folder = [], runs / "graphs" / "bert-base"

    calibration = [{k: torch.tensor([data[i][k]]) for k in data.column_names} for i in range(min(8, len(ids)))]

    def graph(name: str, source: str, runtime: str, precision: str):
        how = {"format": runtime, "precision": precision, "calibration": calibration}
        return graph_of(net, folder / f"{name}-{runtime}-{precision}", 512, source=source, **how)

    pairs = [tuple(pair.split()) for pair in entry.options["graphs"]]
    source = fingerprint(net)
    whole = {pair: graph("dense", source, *pair) for pair in pairs}
    for ratio, (keep, at) in entry.options["keeps"].items():
        prune(net, TopK(keep=keep, at=at))
        source = fingerprint(net)
        timed = measure(
            net,
            data,
            task,
            max_length=length,
            modes=("dense-unpadded", "pruned"),
            batch_sizes=(size,),
            repeats=entry.options["repeats"],
            examples=entry.options["batches"],
            batches=entry.options["batches"],
            precisions=entry.options["precisions"],
            graphs={pair: {"dense": whole[pair], "pruned": graph(ratio, source, *pair)} for pair in pairs},
            line=roofline(threads),
            fields={"model": entry.model, "split": "none", "recipe": f"untrained TopK(keep={keep}, at={at}), {ratio}"},
        )
        unprune(net)
        rows += [{**row, **UNJUDGED} for row in timed]
    return rows


KINDS = {
    "speed": measure_task,
    "efficiency": measure_efficiency,
    "runtimes": measure_runtimes,
    "compression": measure_compression,
    "anytime": measure_anytime,
    "tune": measure_tune,
    "audit": measure_audit,
    "coverage": measure_coverage,
    "choice": measure_choice,
    "soak": measure_soak,
    "synthetic": measure_synthetic,
    "vision": measure_vision,
}
