"""Schedules found without training: what they lose on the test part, where, and whether the bound keeps its word."""

from __future__ import annotations

import json
from pathlib import Path

IMDB = "imdb"
WORST = 1000  # draws for each schedule of the worst case


def judged(entry, task, rows, before, found, **fields) -> dict:
    """A row of what a pruned model loses on ``rows`` against a dense one; both as ``predict`` answers."""
    from thresher.evaluation.hardware import environment
    from thresher.evaluation.predict import quality
    from thresher.evaluation.rows import row
    from thresher.stats.bootstrap import bootstrap_interval

    low, high = bootstrap_interval(task.metric, rows["labels"], before, found)
    common = {"task": task.name, "model": entry.model, "method": entry.method, "target_flops": entry.target}
    common |= {"seed": entry.seed, "runtime": "torch", "precision": "fp32", "mode": "pruned", "split": "test"}
    common |= {"quality": quality(found, rows, task.metric), "quality_dense": quality(before, rows, task.metric)}
    common |= {"interval_low": low, "interval_high": high, "flops_ratio": found.macs_dense / found.macs_used}
    return row(**(common | fields), metric=task.metric, n_examples=len(rows), **environment())


def measure_tune(entry, runs: Path) -> list[dict]:
    """``thresher tune`` to a share of the MACs, then the model that it saved on the test part, beside the dense one.

    The model is made again where it is missing; what it took is in the note."""
    from entries import TASKS
    from thresher.api import dense
    from thresher.data.load import load_task
    from thresher.data.models import load
    from thresher.data.tokenize import tokenize
    from thresher.evaluation.predict import predict
    from thresher.experiments.spec import SUMMARY
    from thresher.experiments.tune import tune
    from thresher.reports.tables import kept

    setting, out = TASKS[entry.task], runs / entry.name
    if not (out / SUMMARY).exists():
        given = {"config": setting.config, "max_length": setting.training["max_length"], **entry.options}
        tune(str(runs / entry.needs[0]), setting.path, str(out), target_flops=entry.target, **given)
    said = json.loads((out / SUMMARY).read_text())
    net, tokenizer = load(str(out))
    task = load_task(setting.path, config=setting.config)
    test = tokenize(task.test, task, tokenizer, setting.training["max_length"])[0]
    found = predict(net, test)
    with dense(net):
        before = predict(net, test)
    (chosen,) = (one for one in said["schedules"] if one["chosen"])
    keeps = ", ".join(f"{kept(keep)} after layer {at}" for at, keep in zip(chosen["at"], chosen["keep"], strict=True))
    texts = f"{said['texts']['searched']} texts"
    if "tokens_mean" in said["texts"]:
        texts += f" of {said['texts']['tokens_mean']:g} tokens"
    told = f"{said['tuning']['method']}, {keeps}; {said['seconds'] / 60:.1f} minutes, {texts}"
    return [judged(entry, task, test, before, found, note=told)]


def chance(p: float) -> str:
    """A p-value in words."""
    return "< 0.001" if p < 0.0005 else f"{p:.3f}"


def measure_audit(entry, runs: Path) -> list[dict]:
    """What ``thresher audit`` says of a pruned model beside its dense one: a row for the whole and one for each slice,
    the one named by ``note``."""
    from entries import TASKS
    from thresher.evaluation.hardware import environment
    from thresher.evaluation.rows import row
    from thresher.experiments.audit import SCORES, audit

    setting, (dense, pruned) = TASKS[entry.task], (str(runs / name) for name in entry.needs)
    given = {"config": setting.config, "max_length": setting.training["max_length"], "examples": 0}
    common = {"model": entry.model, "seed": entry.seed, "runtime": "torch", "precision": "fp32", "mode": "pruned"}
    common |= {"task": entry.task, "method": entry.label, "split": "test"}
    rows = []
    for found in audit(pruned, setting.path, against=dense, **given):
        low, high = found["interval"] or (None, None)
        where = "all" if found["by"] == "all" else f"{found['by']}, {found['slice']}"
        alone = found["p_more"] is None
        told = f"{where}: p {chance(found['p' if alone else 'p_holm'])}"
        told += "" if alone else f", p that it loses more {chance(found['p_more_holm'])}"
        told += "" if found["detectable"] is None else f", detectable from {found['detectable']:.2g}"
        error = found["score"] == SCORES["regression"]  # of which less is better
        sign, metric = (-1, f"minus {found['score']}") if error else (1, found["score"])
        judged = {"metric": metric, "n_examples": found["n"]}
        judged |= {"quality": sign * found["pruned"], "quality_dense": sign * found["dense"]}
        judged |= {"interval_low": low, "interval_high": high, "flops_ratio": 1 / found["macs"], "note": told}
        rows.append(row(**common, **judged, tokens_mean=found["length"], **environment()))
    return rows


def passes(differs, limit: float, n: int, draws: int, draw) -> list[int]:
    """How many schedules pass in each of so many draws of ``n`` texts.

    differs: (S, P), whether each schedule, the mildest first, answers each text of the pool otherwise than the dense
        model."""
    from thresher.stats.bounds import passing, upper

    found = []
    for _ in range(draws):
        texts = draw.integers(differs.shape[1], size=n)
        found.append(passing((upper(int(one[texts].sum()), n) for one in differs), limit))
    return found


def violated(differs, limit: float, passed: list[int]) -> float:
    """The share of draws in which something passes whose true rate is above the limit."""
    beyond = (differs.mean(1) > limit).tolist()
    return sum(any(beyond[:count]) for count in passed) / len(passed)


def told_of(limit: float, outcomes: list, n: int, draws: int, draw) -> tuple[list[str], float | None]:
    """What draws of ``n`` texts say of a limit, given the schedules' outcomes on the whole pool, the mildest first; and
    the median of the FLOPs ratios that pass."""
    import numpy as np

    from thresher.search.explore import TESTED
    from thresher.stats.bounds import least

    differs = np.stack([outcome.differs for outcome in outcomes])
    passed, true = passes(differs, limit, n, draws, draw), differs.mean(1)
    taken = [count - 1 for count in passed if count]
    told = [f"asked {limit:g}: violated in {100 * violated(differs, limit, passed):.2f} % of the draws"]
    told += [f"refused in {100 * passed.count(0) / len(passed):.1f} %"]
    ratios = sorted(1 / outcomes[i].flops_fraction for i in taken)
    median = ratios[len(ratios) // 2] if ratios else None
    if taken:
        told += [f"true disagreement {100 * true[taken].mean():.2f} % on average"]
        told += [f"FLOPs {ratios[0]:.2f} to {ratios[-1]:.2f} times fewer, median {median:.2f}"]
    hairs = [rate * (1 - 1e-9) for rate in sorted({*true.tolist()}) if 0.2 * limit < rate <= limit * 1.5]
    worst = [violated(differs, h, passes(differs, h, TESTED * least(h), WORST, draw)) for h in hairs]
    if worst:
        told += [f"asked a hair less than the rates of {len(hairs)} schedules: in {100 * max(worst):.1f} % at most"]
    return told, median


def measure_coverage(entry, runs: Path) -> list[dict]:
    """In how many draws of texts a schedule passes that disagrees with the dense model more than was asked for: by the
    bound in at most 5 %.

    Schedules are searched on IMDB's train part as ``tune --method topk`` searches, one profile for all limits; each
    then answers so many reviews of the test part ("pool"), which stand for all texts. Draws from these, with
    replacement, are tested as ``tune`` tests, and what passes is judged by the whole pool. The worst case asks for a
    hair less than each schedule's true rate, in ``WORST`` draws each."""
    import numpy as np
    from datasets import Dataset

    from entries import DATA
    from thresher.data.load import load_task
    from thresher.data.models import load
    from thresher.evaluation.hardware import environment
    from thresher.evaluation.rows import row
    from thresher.search.explore import PROFILING, SEARCHED, TESTED, Budget, Samples, ScheduleSearch
    from thresher.search.reference import Sample, tokenized
    from thresher.stats.bounds import least

    options, draw = entry.options, np.random.default_rng(entry.seed)
    net, tokenizer = load(str(runs / entry.needs[0]))
    task = load_task(str(DATA / IMDB))

    def sample(part: Dataset, count: int) -> Sample:
        texts = part.select(draw.permutation(len(part))[:count])
        return Sample(net, tokenized(texts, task, tokenizer, options["max_length"]), 32)

    searched, profiled = sample(task.train, SEARCHED), sample(task.train, PROFILING)
    pool = sample(task.test, options["pool"])
    search, answers, rows = ScheduleSearch(net, {"topk": ("topk", {})}, Samples(searched, profiled)), {}, []
    search.profile()
    for limit in options["limits"]:
        n, trials = TESTED * least(limit), []
        for trial in search.sequence(Budget("max_disagreement", limit)):
            trials.append(trial)
            if trial not in answers:
                search.apply(*trial)
                answers[trial] = pool.compare(net)
            if answers[trial].differs.mean() > 3 * limit:  # neither it nor a later one passes in any draw
                break
        told, ratio = told_of(limit, [answers[trial] for trial in trials], n, options["draws"], draw)
        common = {"task": entry.task, "model": entry.model, "method": "topk", "seed": entry.seed, "mode": "pruned"}
        common |= {"runtime": "torch", "precision": "fp32", "max_length": options["max_length"], "split": "test"}
        found = {"n_examples": n, "repeats": options["draws"], "flops_ratio": ratio}
        rows.append(row(**common, **found, note="; ".join(told), **environment()))
    return rows
