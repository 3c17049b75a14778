"""Timing entries: all methods of a task in one interleaved run, and the efficiency of packed execution by itself."""

from __future__ import annotations

from pathlib import Path

UNJUDGED = dict.fromkeys(
    ("quality", "quality_dense", "interval_low", "interval_high")
)  # of some labels alone, or untrained


def measure_task(entry, runs: Path) -> list[dict]:
    """Wall-clock rows of the models an entry needs: the dense one first, then the pruned ones, on the
    first texts of the test part; quality where these are all."""
    from entries import DATA, TASKS
    from thresher.bench import measure
    from thresher.data import load_task, tokenize
    from thresher.jobs import load
    from thresher.predicting import predict

    setting = TASKS[entry.task]
    first, *others = entry.needs
    dense, tokenizer = load(str(runs / first))
    task = load_task(str(DATA / setting.data), config=setting.config, limit=setting.limit)
    test = tokenize(task.test, task, tokenizer, setting.training["max_length"])[0]
    net = load(str(runs / others[0]))[0]
    whole = len(test) <= entry.options["limit"]
    test = test if whole else test.select(range(entry.options["limit"]))
    kept = predict(net, test).kept
    baselines = {}
    for name in others[1:]:
        model = load(str(runs / name))[0]
        model.token_pruner.row_counts = kept
        baselines[model.token_pruner.name] = model
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
    ("least": of those with so many tokens)."""
    from entries import DATA, TASKS
    from thresher import TopK, prune, unprune
    from thresher.bench import measure
    from thresher.data import load_task, tokenize
    from thresher.loading import load
    from weights import pretrained

    rows = []
    setting = TASKS[entry.task]
    task = load_task(str(DATA / setting.data), config=setting.config)
    net, tokenizer = load(pretrained(entry.model), num_labels=max(2, len(task.labels)))
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
            modes=("dense-unpadded", "pruned"),
            batch_sizes=entry.options["batch_sizes"],
            repeats=5,
            batches=4,
            fields={"model": entry.model, "split": "test", "recipe": f"untrained TopK(keep={keep}), {ratio}"},
        )
        unprune(net)
        rows += [{**row, **UNJUDGED} for row in timed]
    return rows
