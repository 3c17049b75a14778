"""Tune a finished model: find a pruning schedule without training, under one budget, and save the model so pruned.

No label is needed: what is measured is how far the pruned model's answers are from the dense model's, on texts that are
never those of a test part.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedModel

from ..core.cost import LatencyTable
from ..core.pareto import pareto_front
from ..core.pruner import PUT_BACK, pruner_of, query_of
from ..data.embedder import Embedder, is_embedder, load_embedder
from ..data.models import clip, load
from ..data.task import Task
from ..evaluation.hardware import environment
from ..evaluation.rows import folder_written_whole
from ..reports import plots
from ..search.explore import (
    PROFILING,
    Budget,
    Samples,
    ScheduleSearch,
    Scores,
    by_states,
    left_alone,
    scores_of,
    scores_of_averages,
    with_survivors,
)
from ..search.reference import Sample, texts_of, tokenized
from .cache_spec import reads
from .readers import tune_reader
from .service import Service
from .spec import COLUMNS, SUMMARY, TuneSpec, job, task_entry

PICTURE = "tuning.png"
NEAR = 0.05  # a time that is asked for is met within
CORRECTED = 2  # times at most, by what a schedule really takes
BUDGETS = ("target_flops", "target_latency_ms", "max_disagreement", "max_drop")


@job(TuneSpec)
def tune(spec: TuneSpec, *, progress: Callable[[str, int, int | None], Any] | None = None) -> list[dict]:
    """Find at which layers how many tokens can leave a finished model, under one budget; save the model so pruned.

    ``ScheduleSearch`` says how, ``readers.tune_reader`` how it is done with models that read pictures.

    Args:
        spec: see ``TuneSpec``. Texts come from the validation part and then from the train part. What the model was
            trained on says too little of its mistakes: where there are too few others to test on, a warning counts
            them. ``method`` is one whose ``keep`` or ``r`` is a share for each site, or "auto", the best of ``SCORES``;
            ``method_options`` are other fields of the one method. Texts below ``min_length`` are left out of the search
            and of the test, which then says nothing of such.
        progress: called with what is going on, steps done and all steps.

    Returns:
        A row for each schedule on the front, the strongest last, the one that was saved ``chosen``. Shares are of 1;
        "tested" and "bound" are of the test, the rest of the search. ATS keeps fewer tokens than its cost says.

    Raises:
        ValueError: not one budget, a runtime without a budget of time, one out of reach, too few texts, no schedule
            that passes the test, a pruned model, another kind of method, data that do not fit, a folder in use.
    """
    if reads(spec.model):
        return tune_reader(spec, progress=progress)
    budget = Budget.only({name: getattr(spec, name) for name in BUDGETS})
    scores, out, started = scores_of(spec.method, spec.method_options), Path(spec.out), time.time()
    service = Service.of(spec, budget.of_time)
    _check_places(out, spec.plot)
    net, tokenizer = finished(spec.model)
    tell = progress or (lambda what, done, total: None)
    texts = read_texts(spec, budget, net, tokenizer, tell)
    scores = {name: (one, kept_query(texts.task, tokenizer, own) | own) for name, (one, own) in scores.items()}
    scores = of_embedder(net, scores, texts.samples.search, spec.method == "auto" and not budget.of_time)
    clock = Clock(service, tokenizer, texts.samples.search.rows, tell) if budget.of_time else None
    search = ScheduleSearch(net, scores, texts.samples, clock.table(net) if clock else None, tell)
    chosen, timed = (search.find(budget), {}) if clock is None else clock.meet(search, budget)
    rows = [*search.rows.values()]
    method, options = scores[chosen["method"]]
    reached = {name: chosen[name] for name in ("flops_fraction", "divergence", "disagreement", "overlap", "bound")}
    reached |= timed | (_pooled(search, chosen) if isinstance(net, Embedder) else {})
    asked = {name: getattr(spec, name) for name in ("model", "data", "seed", "min_length", *COLUMNS)}
    served = vars(service) if budget.of_time else {}
    summary = {
        "tuning": asked | {"method": method, "method_options": options, budget.name: budget.value} | served,
        "task": task_entry(spec, texts.task, texts.max_length),
        "reached": reached,
        "texts": {name: getattr(texts, name) for name in ("searched", "tested", "max_length", "tokens_mean")},
        "profile": search.profiled.alone,
        "schedules": rows,
        "seconds": round(time.time() - started, 1),
        **environment(),
    }
    with folder_written_whole(out) as aside:
        net.save_pretrained(aside, *([tokenizer] if isinstance(net, Embedder) else []))
        tokenizer.save_pretrained(aside)
        (aside / SUMMARY).write_text(json.dumps(summary, indent=1))
        if find_spec("matplotlib"):
            plots.search(rows, search.profiled.alone, aside / PICTURE, budget.limit)
    if spec.plot is not None:
        plots.search(rows, search.profiled.alone, spec.plot, budget.limit)
    return best(rows, search.cost)


def _check_places(out: Path, plot: Path | None) -> None:
    """Raise ValueError for a folder that is not empty, and a picture that cannot be drawn."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there and not empty: choose another folder for the result")
    if plot is not None and find_spec("matplotlib") is None:
        raise ValueError("the picture needs matplotlib, which is missing: pip install 'thresher-pruning[plot]'")


def finished(model: str) -> tuple[Any, Any]:
    """A dense model that is to be tuned, an ``Embedder`` where it is one, and its tokenizer. Raises ValueError for a
    pruned one."""
    net, tokenizer = load_embedder(model) if is_embedder(model) else load(model)
    if pruner_of(net) is not None:
        raise ValueError(f"{model} is pruned already: tune its dense model")
    return net, tokenizer


@dataclass(frozen=True)
class Texts:
    """What a search runs on: the texts with the dense model's answers, and where they come from."""

    task: Task
    max_length: int
    samples: Samples
    searched: int
    tested: int

    @property
    def tokens_mean(self) -> float:
        """Tokens of a text of the search."""
        return round(sum(map(len, self.samples.search.rows["input_ids"])) / self.searched, 1)


def read_texts(spec: TuneSpec, budget: Budget, net: Any, tokenizer: Any, tell: Callable) -> Texts:
    """Choose the texts of the search and of the test, and ask the dense model about them."""
    max_length, least = clip(spec.max_length, net.config), spec.min_length
    if least is not None and not (isinstance(least, int) and 1 <= least <= max_length):
        raise ValueError(f"min_length={least!r}: expected tokens of a text, 1 to max_length={max_length}")
    task, texts, fresh = texts_of(net, tokenizer, spec, labelled=budget.of_accuracy, seed=spec.seed, min_length=least)
    budget.check(task.kind, task.kind in ("reranking", "embedding") or net.config.num_labels == 1)
    tested, searched = budget.split(len(texts), f" of {least} tokens or more" if least else "")
    if tested > fresh:
        warnings.warn(
            f"{tested - fresh} of the {tested} tested texts are of the train part: if the model was trained on them, "
            "what is found holds for such texts alone",
            stacklevel=2,
        )
    tell("asking the dense model", 0, None)
    prompt = net.prompt(tokenizer, max_length) if isinstance(net, Embedder) else None

    def sample(start: int, count: int) -> Sample:
        rows = tokenized(texts.select(range(start, start + count)), task, tokenizer, max_length, prompt)
        return Sample(net, rows, spec.batch_size)

    few = min(PROFILING, searched)
    samples = Samples(sample(tested, searched), sample(tested, few), sample(0, tested) if tested else None)
    return Texts(task, max_length, samples, searched, tested)


def of_embedder(net: Any, scores: Scores, sample: Sample, auto: bool) -> Scores:
    """The scores of a model, as they are but for an embedder: where it averages states, what merges does so by them and
    leaves short texts alone, and ``auto`` merges; either pooling is tried where it pools all of them."""
    if not isinstance(net, Embedder):
        return scores
    if net.pooling.mode == "mean":
        alone = sample.rows["input_ids"]
        scores = scores_of_averages(cast("Any", net), scores) if auto else scores
        scores = {name: (one, by_states(one) | left_alone(one, alone) | own) for name, (one, own) in scores.items()}
    return with_survivors(scores) if net.pools_all else scores


def kept_query(task: Task, tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The option of a method that keeps the query of each pair, where candidates are ranked."""
    return query_of(tokenizer.sep_token_id, options.get("protect")) if task.kind == "reranking" else {}


def best(rows: list[dict], cost: str = "flops_fraction") -> list[dict]:
    """The rows on the Pareto front of cost and divergence, the dearest first; tested and chosen ones stay."""
    front = pareto_front(rows, lambda row: row[cost], lambda row: row["divergence"])
    shown = [row for row in rows if row in front or row["chosen"] or row["bound"] is not None]
    return sorted(shown, key=lambda row: (row[cost], row["divergence"]), reverse=True)


def _pooled(search: ScheduleSearch, chosen: dict) -> dict[str, Any]:
    """The mean cosine to the dense vectors; and with either pooling, where both were tried under the one schedule."""
    names, schedule = [chosen["method"], *search.alike(chosen["method"])], (chosen["at"], chosen["keep"])
    tried = [row for row in search.rows.values() if row["method"] in names and (row["at"], row["keep"]) == schedule]
    by_pooling = {search.scores[row["method"]][1].get("pooling", PUT_BACK): 1 - row["divergence"] for row in tried}
    pooling = search.scores[chosen["method"]][1].get("pooling", PUT_BACK)
    return {"cosine": 1 - chosen["divergence"], "pooling": {"chosen": pooling, "judged": by_pooling}}


@dataclass(frozen=True)
class Clock:
    """Meet a budget of milliseconds: by the table of prices first, then by what the model really takes."""

    service: Service
    tokenizer: Any
    rows: Dataset
    tell: Callable[[str, int, int | None], Any]

    def table(self, net: PreTrainedModel) -> LatencyTable:
        """The prices of the layers, where the model will serve."""
        self.tell("timing the layers", 0, None)
        return self.service.table(net, self.tokenizer, self.rows)

    def meet(self, search: ScheduleSearch, budget: Budget) -> tuple[dict, dict[str, float]]:
        """The row of the schedule that was chosen, and its times. Where it takes another time than its price, the
        price that is searched for is corrected, at most ``CORRECTED`` times; the last schedule counts."""
        asked = price = budget.value
        chosen = search.find(budget)
        for step in range(CORRECTED + 1):
            self.tell("timing the schedule", step, None)
            took = self.service.times(search.net, self.tokenizer, self.rows)
            price *= asked / took["latency_ms"]
            if abs(took["latency_ms"] / asked - 1) <= NEAR or step == CORRECTED:
                break
            try:
                other = search.find(Budget(budget.name, price))
            except ValueError:  # out of reach: no schedule is as cheap, or all tokens stay
                break
            if other is chosen:
                break
            chosen["chosen"], chosen = False, other
        if took["latency_ms"] > asked * (1 + NEAR):
            warnings.warn(
                f"measured: {took['latency_ms']:.2f} ms per text, where {asked:g} were asked for", stacklevel=4
            )
        return chosen, took | {"latency_ms_asked": asked}
