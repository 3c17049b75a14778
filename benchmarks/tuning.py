"""Schedules found without training: what they lose on the test part, where, and whether the bound keeps its word."""

from __future__ import annotations

import json
from pathlib import Path

IMDB = "imdb"


def judged(entry, task, rows, before, found, **fields) -> dict:
    """A row of what a pruned model loses on ``rows`` against a dense one; both as ``predict`` answers."""
    from thresher.machine import environment
    from thresher.metrics import bootstrap_interval
    from thresher.predicting import quality
    from thresher.report import row

    low, high = bootstrap_interval(task.metric, rows["labels"], before, found)
    common = {"task": task.name, "model": entry.model, "method": entry.method, "target_flops": entry.target}
    common |= {"seed": entry.seed, "runtime": "torch", "precision": "fp32", "mode": "pruned", "split": "test"}
    common |= {"quality": quality(found, rows, task.metric), "quality_dense": quality(before, rows, task.metric)}
    common |= {"interval_low": low, "interval_high": high, "flops_ratio": found.macs_dense / found.macs_used}
    return row(**(common | fields), metric=task.metric, n_examples=len(rows), **environment())


def measure_tune(entry, runs: Path) -> list[dict]:
    """``thresher tune`` to a share of the MACs, then the model that it saved on the test part, beside the dense one.

    The model is made again where it is missing; what it took is in the note."""
    from entries import DATA, TASKS
    from thresher.api import dense
    from thresher.data import load_task, tokenize
    from thresher.frontier import kept
    from thresher.jobs import SUMMARY
    from thresher.loading import load
    from thresher.predicting import predict
    from thresher.tune import tune

    setting, out = TASKS[entry.task], runs / entry.name
    if not (out / SUMMARY).exists():
        given = {"config": setting.config, "max_length": setting.training["max_length"], **entry.options}
        tune(str(runs / entry.needs[0]), str(DATA / setting.data), str(out), target_flops=entry.target, **given)
    said = json.loads((out / SUMMARY).read_text())
    net, tokenizer = load(str(out))
    task = load_task(str(DATA / setting.data), config=setting.config)
    test = tokenize(task.test, task, tokenizer, setting.training["max_length"])[0]
    found = predict(net, test)
    with dense(net):
        before = predict(net, test)
    (chosen,) = (one for one in said["schedules"] if one["chosen"])
    keeps = ", ".join(f"{kept(keep)} after layer {at}" for at, keep in zip(chosen["at"], chosen["keep"], strict=True))
    told = f"{said['tuning']['method']}, {keeps}; {said['seconds'] / 60:.1f} minutes, {said['texts']['searched']} texts"
    return [judged(entry, task, test, before, found, note=told)]


def measure_audit(entry, runs: Path) -> list[dict]:
    """What ``thresher audit`` says of a pruned model beside its dense one: a row for the whole and one for each slice,
    the one named by ``note``."""
    from entries import DATA, TASKS
    from thresher.audit import audit
    from thresher.machine import environment
    from thresher.report import row

    setting, (dense, pruned) = TASKS[entry.task], (str(runs / name) for name in entry.needs)
    given = {"config": setting.config, "max_length": setting.training["max_length"], "examples": 0}
    common = {"model": entry.model, "seed": entry.seed, "runtime": "torch", "precision": "fp32", "mode": "pruned"}
    common |= {"task": entry.task, "method": entry.method, "metric": "accuracy", "split": "test"}
    rows = []
    for found in audit(pruned, str(DATA / setting.data), against=dense, **given):
        low, high = found["interval"] or (None, None)
        more = "" if found["p_more"] is None else f", p that it loses more {found['p_more_holm']:.3f}"
        told = f"{found['by']}, {found['slice']}: p {found['p_holm'] if more else found['p']:.3f}{more}"
        told += "" if found["detectable"] is None else f", detectable from {found['detectable']:.1f}"
        judged = {"quality": found["pruned"], "quality_dense": found["dense"], "n_examples": found["n"]}
        judged |= {"interval_low": low, "interval_high": high, "flops_ratio": 1 / found["macs"], "note": told}
        rows.append(row(**common, **judged, tokens_mean=found["length"], **environment()))
    return rows


def measure_promise(entry, runs: Path) -> list[dict]:
    """Whether at most 5 % of draws give a schedule that disagrees with the dense model more than was asked for.

    Schedules are searched on IMDB's train part, as ``tune`` does it; each then answers so many reviews of the test part
    ("pool"), which stand for all texts. Draws with replacement from these are tested as ``tune`` tests, and what passes
    is judged by the whole pool."""
    import numpy as np
    from datasets import Dataset

    from entries import DATA
    from thresher.bounds import least, passing, upper
    from thresher.data import load_task
    from thresher.loading import load
    from thresher.machine import environment
    from thresher.report import row
    from thresher.samples import Sample, tokenized
    from thresher.tune import PROFILING, SEARCHED, TESTED, Search

    options, draw = entry.options, np.random.default_rng(entry.seed)
    net, tokenizer = load(str(runs / entry.needs[0]))
    task = load_task(str(DATA / IMDB))

    def sample(part: Dataset, count: int) -> Sample:
        texts = part.select(draw.permutation(len(part))[:count])
        return Sample(net, tokenized(texts, task, tokenizer, options["max_length"]), 32)

    searched, profiled, pool = (
        sample(task.train, SEARCHED),
        sample(task.train, PROFILING),
        sample(task.test, options["pool"]),
    )
    search = Search(net, "topk", {}, searched, False, lambda *_: None)
    search.profile(profiled)
    answers, rows = {}, []

    def differs(left) -> np.ndarray:
        if left not in answers:
            search.apply(left)
            result = pool.compare(net)
            answers[left] = result.differs, 1 / result.flops_fraction
        return answers[left][0]

    for limit in options["limits"]:
        n, sequence = TESTED * least(limit), search.sequence("disagreement", limit)
        true, chosen = [], []
        for left in sequence:  # those far beyond the limit pass in no draw
            true.append(float(differs(left).mean()))
            if true[-1] > 3 * limit:
                break
        for _ in range(options["draws"]):
            texts = draw.integers(options["pool"], size=n)
            tested = (int(differs(left)[texts].sum()) for left in sequence[: len(true)])
            chosen.append(passing((upper(wrong, n) for wrong in tested), limit) - 1)
        passed = [i for i in chosen if i >= 0]
        wrong = sum(true[i] > limit for i in passed)
        ratios = sorted(answers[sequence[i]][1] for i in passed)
        told = f"asked {limit:g}: {wrong} of {options['draws']} draws violate it, {options['draws'] - len(passed)} are "
        told += f"refused; true disagreement {100 * np.mean([true[i] for i in passed] or [0]):.2f} % on average, "
        told += f"FLOPs {ratios[0]:.2f} to {ratios[-1]:.2f} times fewer" if ratios else "nothing passes"
        common = {"task": entry.task, "model": entry.model, "method": "topk", "seed": entry.seed, "mode": "pruned"}
        common |= {"runtime": "torch", "precision": "fp32", "max_length": options["max_length"], "split": "test"}
        ratio = ratios[len(ratios) // 2] if ratios else None
        rows.append(
            row(**common, flops_ratio=ratio, n_examples=n, repeats=options["draws"], note=told, **environment())
        )
    return rows
