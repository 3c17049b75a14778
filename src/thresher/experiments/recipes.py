"""How known tasks are trained, in one table: ``thresher train --recipe top-mrpc`` puts a method and a task together.

"rerank" and "embed" are of any data of their kind.

Rates, batches and lengths follow the papers' (LTP, table 6; ToP's README), shortened to the few epochs after which a
small encoder stops gaining; what the user gives takes precedence.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from typing import Any, cast

METHODS = ("ltp", "top")
_SHORT = {"max_length": 128, "batch_size": 32, "epochs": 4, "prune_epochs": 4, "lr": 5e-5, "prune_lr": 1e-4}
_LONG = {"max_length": 512, "batch_size": 16, "epochs": 2, "prune_epochs": 2, "lr": 5e-5, "prune_lr": 1e-4}
TASKS: dict[str, dict[str, Any]] = {
    "sst2": _SHORT | {"max_length": 64, "batch_size": 64, "epochs": 2, "prune_epochs": 3},
    "cola": _SHORT | {"max_length": 64},
    "mrpc": _SHORT,
    "stsb": _SHORT,
    "trecqa": _SHORT,
    "rte": _SHORT | {"max_length": 256, "epochs": 6, "prune_epochs": 6},
    "qnli": _SHORT | {"epochs": 2, "prune_epochs": 2},
    "20newsgroups": _LONG | {"max_length": 256, "batch_size": 32, "lr": 1e-4},
    "imdb": _LONG,
    "rerank": {"task": "rerank", "max_length": 256, "batch_size": 16, "prune_epochs": 2, "lr": 1e-4, "prune_lr": 1e-4},
    "embed": _LONG | {"task": "embed", "max_length": 256, "batch_size": 32, "epochs": 0, "dropout": 0.0},
    "squad": _LONG | {"max_length": 384, "lr": 1e-4},
}
# Options of a method that depend on the task: finer bins and a longer ranking for longer texts.
_FINE = {"bins": 64, "topk": 60}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "top": {"cola": {"topk": 10}, "20newsgroups": _FINE, "imdb": _FINE, "squad": _FINE}
}


def recipe(name: str | None) -> dict[str, Any]:
    """The arguments of ``jobs.train`` that a recipe METHOD-TASK sets, without a budget; without a name what is usual.

    Raises ValueError where there is none of this name.
    """
    if name is None:
        return {"method": "topk", "method_options": {}}
    method, _, task = name.partition("-")
    if method not in METHODS or task not in TASKS:
        raise ValueError(
            f"there is no recipe {name!r}: expected a method ({', '.join(METHODS)}), a dash and a task "
            f"({', '.join(TASKS)}), as in top-mrpc"
        )
    return {"method": method, "method_options": dict(OPTIONS.get(method, {}).get(task, {})), **TASKS[task]}


def of_averages(model: str, method: str | None, given: Collection[str]) -> dict[str, Any]:
    """The method, and its options, of an embedder that averages the states of a text: tokens are merged by these.

    Empty for any other model, for one that cannot merge, for a named ``method`` that does not merge, and where none is
    named and the options ``given`` are not all of merging.
    """
    from ..core.pruner import METHODS
    from ..data.embedder import is_embedder, load_embedder
    from ..search.explore import AVERAGES, served

    name = method or "tome"
    if name not in AVERAGES or not is_embedder(model):
        return {}
    if method is None and not {*given} <= {f.name for f in fields(METHODS[name])}:
        return {}
    net = load_embedder(model)[0]
    if net.pooling.mode != "mean" or net.token_pruner is not None:
        return {}
    try:
        options = served(cast("Any", net), {name: AVERAGES[name]})[name][1]
    except ValueError:
        return {}
    return {"method": name, "method_options": options}
