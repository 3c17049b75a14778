"""A pruning schedule without training: how sensitive each layer is, the best schedules by that, and a look at each.

No label is needed: what is measured is how far the pruned model's answers are from the dense model's, on texts that are
never those of a test part.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..core.pareto import pareto_front
from ..core.pruner import METHODS
from ..data.models import clip, load, make_method
from ..evaluation.hardware import environment
from ..evaluation.latency import compare
from ..evaluation.predict import Text
from ..evaluation.rows import folder_written_whole
from ..methods.topk import TopK
from ..reports import plots
from ..search.explore import LIMITS, SCORES, Search
from ..search.reference import Sample, texts_of, tokenized
from ..stats import bounds
from .spec import COLUMNS, SUMMARY, TuneSpec, job, task_entry
from .train import TIMED

PICTURE = "tuning.png"
BUDGETS = ("target_flops", "target_latency_ms", "max_disagreement", "max_drop")
SEARCHED, PROFILING, FEWEST = 256, 96, 32  # texts to search on, to try single layers on, and the fewest
TESTED = 8  # texts to test on, in multiples of the fewest that the bound needs


@job(TuneSpec)
def tune(spec: TuneSpec, *, progress: Callable[[str, int, int | None], Any] | None = None) -> list[dict]:
    """Find at which layers how many tokens can leave a finished model, under one budget; save the model so pruned.

    1. Each layer alone, at a few shares: how far the answers are from the dense model's (``samples.divergence``).
    2. Dynamic programming over layers and levels, as if what the layers do added up (``schedules.Space.frontier``), for
       the budget and for a range of others.
    3. The best for the budget is run with each of ``SCORES``, and the search goes on with the one whose answers are
       nearest to the dense model's; where that is not the one of the profile, the profile is taken again.
    4. Those schedules are run, and the best is refined: its neighbours are run, in the order of what the sum says, and
       whichever is better takes its place.

    A budget of disagreement or drop is met by a test on texts that chose nothing: the schedules found are tried from
    the mildest to the strongest, each with an exact upper bound at 5 %, up to the first whose bound is above the
    budget; the last before it is taken. The true rate on texts like these is then above the budget in at most 5 % of
    all draws of them. Disagreement has Clopper and Pearson's one-sided bound; the drop of accuracy, P(right when dense,
    wrong when pruned) - P(the reverse), the conservative difference of two such bounds at 2.5 % each
    (``bounds.paired_upper``). Texts are taken to be independent; questions on one article are not quite.

    Args:
        model: folder or hub id of a fine-tuned dense model.
        data: as ``load_task`` takes it; labels are needed for ``max_drop`` alone. Texts come from the validation part
            and then from the train part. What the model was trained on says too little of its mistakes: where there
            are too few others to test on, a warning counts them.
        out: the folder for the model, empty or not there: config.json holds the schedule, thresher.json what was found.
        target_flops: share of the dense model's MACs on the same texts without padding.
        target_latency_ms: mean milliseconds per text, one at a time, by ``latency.latency_table``, measured on this
            machine; what comes of it is measured at the end.
        max_disagreement: share of texts (questions) whose answer is another than the dense model's.
        max_drop: of accuracy, as a share; classification only.
        method: one whose ``keep`` is a share for each site: topk, spatten, vatp, entropy, ats, random, firstk; or
            "auto", the best of ``SCORES``.
        method_options: other fields of the one method, e.g. ``{"criterion": "column"}`` of entropy.
        batch_size: of the search; limit: texts to use; seed: of their order.
        min_length: texts of fewer tokens, special ones included, are left out, of the search and of the test: for data
            that are shorter than what will be served. What is tested then says nothing of shorter ones.
        plot: a PNG of cost and divergence; the same is in ``out`` where matplotlib is there.
        columns: config, text and label, as ``load_task`` has them.

    Returns:
        A row for each schedule on the front, from the mildest to the strongest, the one that was saved ``chosen``.
        Shares are of 1; "tested" and "bound" are of the test, the rest of the texts of the search. ATS keeps fewer
        tokens than its cost is searched with.

    Raises:
        ValueError: not one budget, one out of reach, too few texts, no schedule that passes the test, a pruned model, a
            method without such a schedule, data that do not fit, a folder that is not empty.
    """
    name, value = _budget({name: getattr(spec, name) for name in BUDGETS})
    model, data, out, method, method_options = spec.model, spec.data, spec.out, spec.method, spec.method_options
    plot, max_length, min_length, seed, limit = spec.plot, spec.max_length, spec.min_length, spec.seed, spec.limit
    batch_size, columns = spec.batch_size, {name: getattr(spec, name) for name in COLUMNS}
    known, options = sorted(n for n, kind in METHODS.items() if issubclass(kind, TopK)), dict(method_options or {})
    if method == "auto":
        if options:
            raise ValueError(f"method_options {', '.join(sorted(options))} are of one method: name it")
        scores = SCORES
    else:
        make_method(method, options)
        if method not in known:
            raise ValueError(f"{method} has no share to keep at each site: expected auto or one of {', '.join(known)}")
        scores = {method: (method, options)}
    if found := {"at", "keep"} & {*options}:
        raise ValueError(f"{', '.join(sorted(found))} is what is searched for: leave it out of method_options")
    if (folder := Path(out)).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{out} is there and not empty: choose another folder for the result")
    if plot is not None and find_spec("matplotlib") is None:
        raise ValueError("the picture needs matplotlib, which is missing: pip install 'thresher[plot]'")
    started = time.time()
    net, tokenizer = load(model)
    if hasattr(net, "token_pruner"):
        raise ValueError(f"{model} is pruned already: tune its dense model")
    tell = progress or (lambda what, done, total: None)
    max_length = clip(max_length, net.config)
    if min_length is not None and not (isinstance(min_length, int) and 1 <= min_length <= max_length):
        raise ValueError(f"min_length={min_length!r}: expected tokens of a text, 1 to max_length={max_length}")
    wanted = {"labelled": name == "max_drop", "seed": seed, "limit": limit, "min_length": min_length}
    task, texts, fresh = texts_of(net, tokenizer, data, **wanted, **columns)
    numbers = net.config.num_labels == 1
    if name in LIMITS and (numbers or (name == "max_drop" and task.kind == "qa")):
        what = "classes" if name == "max_drop" else "classes and answers"
        raise ValueError(f"{name} is for models that give {what}: this one is for {task.kind}")
    tested, searched = _cut(len(texts), name, value, min_length)
    if tested > fresh:
        warnings.warn(
            f"{tested - fresh} of the {tested} tested texts are of the train part: if the model was trained on them, "
            "what is found holds for such texts alone",
            stacklevel=2,
        )

    def sample(start: int, count: int) -> Sample:
        return Sample(
            net, tokenized(texts.select(range(start, start + count)), task, tokenizer, max_length), batch_size
        )

    tell("asking the dense model", 0, None)
    samples = [sample(tested, searched), sample(tested, min(PROFILING, searched))]  # while the model is dense
    search = Search(net, scores, *samples, name == "target_latency_ms", tell)
    budget = search.budget(name, value)
    held_out = sample(0, tested) if tested else None
    search.profile()
    chosen = search.meet(budget) if name not in LIMITS else search.test(name, value, held_out)
    search.rows[chosen]["chosen"] = True
    search.apply(*chosen)
    method, options = scores[chosen[0]]
    reached = {name: search.rows[chosen][name] for name in ("flops_fraction", "divergence", "disagreement", "bound")}
    if search.space.table is not None:
        reached |= _timed(net, search.sample, value)
    rows = list(search.rows.values())
    tokens = round(sum(map(len, search.sample.rows["input_ids"])) / searched, 1)
    summary = {
        "tuning": {
            "model": str(model),
            "data": str(data),
            "method": method,
            "method_options": options,
            name: value,
            "seed": seed,
            "min_length": min_length,
            **columns,
        },
        "task": task_entry(spec, task, max_length),
        "reached": reached,
        "texts": {"searched": searched, "tested": tested, "max_length": max_length, "tokens_mean": tokens},
        "profile": search.profiled,
        "schedules": rows,
        "seconds": round(time.time() - started, 1),
        **environment(),
    }
    _finish(net, tokenizer, folder, summary, value if name in LIMITS else None)
    if plot is not None:
        plots.search(rows, search.profiled, plot, value if name in LIMITS else None)
    return best(rows, search.cost)


def best(rows: list[dict], cost: str = "flops_fraction") -> list[dict]:
    """The rows on the Pareto front of cost and divergence, the dearest first; tested and chosen ones stay."""
    front = pareto_front(rows, lambda row: row[cost], lambda row: row["divergence"])
    shown = [row for row in rows if row in front or row["chosen"] or row["bound"] is not None]
    return sorted(shown, key=lambda row: (row[cost], row["divergence"]), reverse=True)


def _budget(given: dict[str, float | None]) -> tuple[str, float]:
    """The one budget that was given."""
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) != 1:
        raise ValueError(f"expected one budget of {', '.join(given)}, got {', '.join(named) or 'none'}")
    ((name, value),) = named.items()
    share = name != "target_latency_ms"
    if isinstance(value, bool) or not (0 < value < (1 if share else float("inf"))):
        raise ValueError(f"{name}={value!r}: expected {'a share between 0 and 1' if share else 'milliseconds'}")
    return name, float(value)


def _cut(count: int, name: str, value: float, min_length: int | None) -> tuple[int, int]:
    """Of so many texts how many to test on and how many to search on."""
    least = bounds.least(value, paired=name == "max_drop") if name in LIMITS else 0
    if count < least + FEWEST:
        what = f", and {name}={value:g} {least} more to test on" if least else ""
        kind = f" of {min_length} tokens or more" if min_length else ""
        raise ValueError(f"{count} texts{kind} are too few: the search needs {FEWEST} at least{what}")
    tested = min(TESTED * least, max(least, count - SEARCHED))
    return tested, min(SEARCHED, count - tested)


def _timed(net: PreTrainedModel, sample: Sample, asked: float) -> dict[str, float]:
    """What the schedule takes, one text at a time, beside the dense model."""
    text = Text(net, sample.rows, None)
    rows = range(0, len(text.lengths), -(-len(text.lengths) // TIMED))
    dense, pruned = compare(net, (text.batch([row], None, net.device) for row in rows))
    if pruned > asked:
        warnings.warn(f"measured: {pruned:.2f} ms per text, where {asked:g} were asked for", stacklevel=3)
    return {"latency_ms_dense": dense, "latency_ms": pruned, "latency_ms_asked": asked}


def _finish(net: PreTrainedModel, tokenizer: Any, out: Path, summary: dict, limit: float | None) -> None:
    """Write the result aside, then move it into place as a whole."""
    with folder_written_whole(out) as aside:
        net.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        (aside / SUMMARY).write_text(json.dumps(summary, indent=1))
        if find_spec("matplotlib"):
            plots.search(summary["schedules"], summary["profile"], aside / PICTURE, limit)
