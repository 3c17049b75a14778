"""Methods x budgets on one task under one protocol: the same teacher, steps and seeds for all of them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..core.pruner import METHODS
from ..data.load import load_task
from ..data.models import clip, load
from ..data.task import Task
from ..data.tokenize import tokenize
from ..evaluation.benchmark import measure
from ..evaluation.rows import row, whole, write_csv
from ..methods.parts.budget import Budgeted
from ..reports import compare_page
from ..reports.plots import pareto
from ..stats.bootstrap import pooled_interval
from ..stats.letters import groups
from ..stats.metrics import is_mean
from .cache_spec import decodes
from .decoders import compare_decoder
from .spec import SUMMARY, CompareSpec, TrainingSpec, TrainSpec, job
from .train import train
from .workspace import Claimed

CLAIM, TABLE, PICTURE, PAGE = "compare.json", "compare.csv", "compare.png", "compare.html"
BASELINES = ("random", "firstk")
TIMED = 256  # examples that the timing knows; bench.measure times a sample of them
TIMES = """batch_size layout latency_ms_p50 latency_ms_p95 samples_per_second speedup_unpadded speedup_padded
    speedup_reference efficiency spread slower flops_ratio_timed n_timed repeats threads""".split()  # noqa: SIM905


@dataclass
class Run:
    """One training: what it is, and once it is over what came of it. ``method`` is "dense" for a teacher."""

    method: str
    target: float | None
    seed: int
    state: str = "waiting"  # running, done, failed
    row: dict = field(default_factory=dict)
    answers: list = field(default_factory=list)
    reason: str = ""

    @property
    def name(self) -> str:
        """Its folder: method-target-seed."""
        return "-".join([self.method, *([] if self.target is None else [f"{self.target:g}"]), f"s{self.seed}"])


@job(CompareSpec)
def compare(spec: CompareSpec, *, progress: Callable[..., Any] | None = None) -> list[dict]:
    """Train every method to every budget from one dense teacher per seed, and compare what came of it on the test part;
    of a decoder as ``compare_decoder`` says.

    Each run is one of ``train`` in a folder of its own in ``out`` ("dense-s0", "ltp-0.5-s0"): the same call goes on
    where it was interrupted, and one with more methods, targets or seeds adds theirs. A run that fails (a budget out
    of reach) is noted with its reason and stops no other. Budgets are met on the validation part; the test part
    chooses nothing.

    Args:
        spec: see ``CompareSpec``; ``epochs=0`` takes a fine-tuned model as the teacher.
        progress: called with all runs whenever one begins or ends; of a decoder with what goes on, how many texts are
            done, and all of them.

    Returns:
        Rows: for each target the methods, best quality first, after the dense model; means over the seeds, with the
        pooled interval of the drop and, at each target, the ``group`` (see ``letters.groups``). Where times were taken
        there is a row for batch size 1 and one for 32. They are also in ``out/compare.csv`` and on
        the page ``out/compare.html``, and in ``out/compare.png`` where matplotlib is there.

    Raises:
        ValueError: a method without a budget, a target outside (0, 1], data without labels, an ``out`` that holds
            something else or the comparison of other settings; or the dense model cannot be trained.
    """
    if decodes(spec.model):
        return compare_decoder(spec, progress=progress)
    methods = tuple(dict.fromkeys((*spec.methods, *BASELINES)))
    targets, seeds = tuple(dict.fromkeys(spec.targets)), tuple(dict.fromkeys(spec.seeds))
    _check(methods, targets, seeds, spec.untrained)
    task = load_task(spec)
    _claim(spec.out, _settings(spec))
    teachers = [Run("dense", None, seed) for seed in seeds]
    runs = [Run(method, target, seed) for seed in seeds for target in targets for method in methods]
    for run in (*teachers, *runs):
        run.state = "running"
        if progress:
            progress([*teachers, *runs])
        _train(run, spec)
        if progress:
            progress([*teachers, *runs])
    done = [run for run in runs if run.state == "done" and run.seed == seeds[0]]
    times = _times(spec, teachers[0], done, task) if spec.time and done else {}
    rows = list(_rows(task, teachers, runs, times))
    write_csv(spec.out / TABLE, rows)
    if any(r["quality"] is not None for r in rows):
        compare_page.html(rows, spec.out / PAGE)
    if find_spec("matplotlib") and any(r["mode"] == "pruned" and r["quality"] is not None for r in rows):
        pareto(rows, spec.out / PICTURE, f"{task.name}, {Path(spec.model).name}")
    return rows


def _train(run: Run, spec: CompareSpec) -> None:
    """Train one model and note what came of it; that a dense model fails is an error."""
    shared = {f.name: getattr(spec, f.name) for f in fields(TrainingSpec)}
    shared |= {"prune_epochs": 0} if spec.untrained or run.method == "dense" else {}
    own: dict[str, Any] = {}
    if run.method != "dense":
        own = {"target_flops": run.target, "at": spec.at, "dense_model": str(spec.out / f"dense-s{run.seed}")}
    one = TrainSpec(**shared, **own, method=run.method, seed=run.seed, out=spec.out / run.name)
    try:
        with redirect_stdout(io.StringIO()):  # the trainer's log, which the run's own summary holds
            run.row = train(one, progress=False)[-1]
        run.answers = json.loads((one.out / SUMMARY).read_text())["predictions"]["pruned"]
        run.state = "done"
    except ValueError as error:
        if run.method == "dense" or isinstance(error, Claimed):  # which is no failure of the method
            raise
        run.reason, run.state = str(error), "failed"


def _settings(spec: CompareSpec) -> dict[str, Any]:
    """What all runs of a comparison share."""
    names = [f.name for f in fields(TrainingSpec) if f.metadata.get("saved", True) and f.name != "threads"]
    return json.loads(json.dumps({name: getattr(spec, name) for name in (*names, "untrained", "at")}))


def _check(methods: tuple, targets: tuple, seeds: tuple, untrained: bool) -> None:
    """Raise ValueError for what cannot be compared."""
    able = sorted(name for name, of in METHODS.items() if "target_flops" in {f.name for f in fields(of)})
    turned = [n for n in able if issubclass(of := METHODS[n], Budgeted) and of.knob is not Budgeted.knob]
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"unknown pruning method {method!r}; those with a budget: {', '.join(able)}")
        if method not in able:
            raise ValueError(f"method {method} has no target_flops to compare at; those that have: {', '.join(able)}")
        if untrained and method not in turned:
            raise ValueError(f"method {method} meets no budget untrained; those that do: {', '.join(turned)}")
    for target in targets:
        if not 0 < target <= 1:
            raise ValueError(f"target {target}: expected a share of the dense MACs in (0, 1], such as 0.5")
    if not targets or not seeds:
        raise ValueError("there is nothing to compare: name one target and one seed or more")


def _claim(out: Path, settings: dict) -> None:
    """Make ``out`` the folder of this comparison, or see that it is; settings may change until a run is over."""
    file = out / CLAIM
    if out.exists() and any(out.iterdir()) and not file.exists():
        raise ValueError(f"{out} is not empty and holds no {CLAIM}: choose another folder for the comparison")
    there = json.loads(file.read_text()) if file.exists() else settings
    if there != settings and any(out.glob(f"*/{SUMMARY}")):
        names = sorted(name for name in {*there, *settings} if there.get(name) != settings.get(name))
        other = "; ".join(f"{name}: {there.get(name)!r} there, {settings.get(name)!r} asked" for name in names)
        raise ValueError(f"{out} belongs to another comparison ({other}): choose another folder")
    if there != settings:
        for begun in out.glob(".*.training"):  # by the other settings
            shutil.rmtree(begun)
    with whole(file) as aside:
        aside.write_text(json.dumps(settings, indent=1) + "\n")


def _times(spec: CompareSpec, teacher: Run, runs: list[Run], task: Task) -> dict:
    """What ``bench.measure`` says of time, a list of one dictionary per batch size, by method and target and, for the
    dense model, by method and mode. All models are in memory at once."""
    against, tokenizer = load(str(spec.out / teacher.name))
    nets = {(run.method, run.target): load(str(spec.out / run.name))[0] for run in runs}
    max_length = clip(spec.max_length, against.config)
    test = tokenize(task.test, task, tokenizer, max_length)[0]
    first, *rest = nets
    rows = measure(
        nets[first],
        test,
        task,
        max_length=max_length,
        limit=TIMED,
        repeats=spec.repeats,
        baselines={f"{method} {target:g}": nets[method, target] for method, target in rest},
        against=against,
    )
    keys = {f"{method} {target:g}": (method, target) for method, target in rest} | {first[0]: first}
    found: dict[tuple, list[dict]] = {}
    for r in rows:
        key = ("dense", r["mode"]) if r["method"] == "dense" else keys[r["method"]]
        found.setdefault(key, []).append({name: r[name] for name in TIMES if r.get(name) is not None})
    return found


def _rows(task: Task, teachers: list[Run], runs: list[Run], times: dict) -> Iterator[dict]:
    """The rows, means over the seeds; one for each batch size where times were taken."""
    means = is_mean(task.metric)
    labels = [1] * len(teachers[0].answers) if means else list(task.test[task.label_column])
    taught = {run.seed: run for run in teachers}
    for mode in ("dense-padded", "dense-unpadded") if times else ("dense-unpadded",):
        for timed in times.get(("dense", mode), [{}]):
            padded = {"flops_ratio": None} if mode == "dense-padded" else {}
            yield row(**_mean(teachers) | {"mode": mode} | padded | timed)
    for target in dict.fromkeys(run.target for run in runs):
        of = {
            m: [r for r in runs if (r.method, r.target) == (m, target)] for m in dict.fromkeys(r.method for r in runs)
        }
        done = {m: [r for r in found if r.state == "done"] for m, found in of.items()}
        answers = {m: {r.seed: r.answers for r in found} for m, found in done.items() if found}
        found = groups(task.metric, labels, answers) if answers else {}
        for method in (*found, *(m for m in of if m not in found)):
            failed: dict[str, list[str]] = {}
            for run in of[method]:
                if run.state == "failed":
                    failed.setdefault(run.reason, []).append(str(run.seed))
            said = [f"seed {', '.join(of_reason)}: {reason}" for reason, of_reason in failed.items()]
            note = {"note": "failed with " + "; ".join(said)} if said else {}
            if method not in found:
                blank = {"task": task.name, "model": teachers[0].row["model"], "metric": task.metric}
                yield row(**blank, method=method, target_flops=target, mode="pruned", **note)
                continue
            pairs = [(labels, taught[r.seed].answers, r.answers) for r in done[method]]
            low, high = pooled_interval(task.metric, pairs)
            own = {"interval_low": low, "interval_high": high, "group": found[method]} | note
            for timed in times.get((method, target), [{}]):
                yield row(**_mean(done[method]) | own | timed)


def _mean(runs: list[Run]) -> dict:
    """The row of runs that differ in their seed."""
    means = {
        name: sum(run.row[name] for run in runs) / len(runs) for name in ("quality", "quality_dense", "flops_ratio")
    }
    seeds = [run.seed for run in runs]
    return runs[0].row | means | {"seed": seeds[0] if len(seeds) == 1 else None, "seeds": seeds}
