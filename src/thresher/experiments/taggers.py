"""Judge a saved tagger: which of the entities that its dense model finds it still finds.

Shapes: N entities of the dense model, over all texts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ..api import MODULE, dense
from ..data.models import clip, load_tagger
from ..data.task import DataError, Task
from ..data.texts import load_texts
from ..data.tokenize import tokenize
from ..evaluation.entities import Agreement, Entity, entities
from ..evaluation.predict import Predictions, predict
from .embedders import some_of
from .spec import AuditSpec


@dataclass(frozen=True)
class Tagged:
    """What two taggers found in the same texts.

    Attributes:
        kinds: (N,) the type of each entity of the dense model.
        found: (N,) bool, whether the pruned model has it, alike to the token.
        owners: (N,) long, the text of each.
        pruned: answers and costs of the pruned model, text by text.
        total: the agreement over all types.
    """

    task: Task
    kinds: list[str]
    found: np.ndarray
    owners: np.ndarray
    pruned: Predictions
    total: Agreement


def compare_tags(spec: AuditSpec, progress: Callable[[str, int, int], Any] | None = None) -> Tagged:
    """Run a pruned tagger and its dense model over the texts of the test part; labels are not looked at.

    Raises:
        ValueError: the model is not pruned, or the dense one has other labels.
        DataError: the data are no texts, or the dense model finds nothing in them.
    """
    if spec.by:
        raise ValueError(f"a tagger is audited by length and type of entity: leave {', '.join(spec.by)} out of by")
    net, tokenizer = load_tagger(spec.model, spec.layout)
    if not hasattr(net, MODULE):
        raise ValueError(f"{spec.model} is not pruned: there is nothing to audit; prune() it and save it first")
    own = os.path.join(spec.model, "dense")
    against = spec.against or (own if os.path.isdir(own) else None)
    other = load_tagger(against)[0] if against else None
    if other is not None and other.config.id2label != net.config.id2label:
        raise ValueError(f"{against} has other labels than {spec.model}: expected its dense model")
    task = load_texts(replace(spec, limit=None, metric=None))
    task = replace(task, test=some_of(task, spec.limit))
    rows = tokenize(task.test, task, tokenizer, clip(spec.max_length, net.config))[0]

    def run(name: str, model: Any) -> Predictions:
        tell = partial(progress, f"{name} model") if progress else None
        return predict(model, rows, batch_size=spec.batch_size, progress=tell)

    after = run("pruned", net)
    with nullcontext() if other else dense(net):
        before = run("dense", other or net)
    special, ids = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}, rows["input_ids"]
    wanted, said = [entities_of(p.logits, ids, special, net.config.id2label) for p in (before, after)]
    both = [{*one} & {*another} for one, another in zip(wanted, said, strict=True)]
    if not any(wanted):
        raise DataError(f"{spec.model} finds no entity in {len(wanted)} texts without pruning: name others (--data)")
    return Tagged(
        task,
        [entity.kind for one in wanted for entity in one],
        np.array([entity in own for one, own in zip(wanted, both, strict=True) for entity in one]),
        np.repeat(np.arange(len(wanted)), [len(one) for one in wanted]),
        after,
        Agreement(*(sum(map(len, some)) for some in (both, wanted, said))),
    )


def entities_of(logits: Any, ids: list[list[int]], special: set[int], names: Mapping[Any, str]) -> list[list[Entity]]:
    """The entities of each text, of ``logits`` (n, K) of its tokens ``ids``; special tokens have no label."""
    found = []
    for own, row in zip(ids, logits, strict=True):
        best = row.argmax(-1).tolist()
        labels = [None if one in special else names[i] for one, i in zip(own, best, strict=True)]
        found.append(entities(labels, names.values()))
    return found
