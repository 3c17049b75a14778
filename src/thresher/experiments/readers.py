"""Language models that read pictures: show what is left for a question, time one, tune how much is left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..api import prune, unprune
from ..core.method import pruner_of
from ..core.pruner import TokenPruner
from ..data.models import make_method
from ..data.pictures import asked, load_reader, pillow, read_pairs, read_picture
from ..evaluation.asking import answer, measure_asking, pruned_by, told
from ..evaluation.hardware import environment
from ..evaluation.rows import folder_written_whole
from ..methods.parts.budget import OutOfReach
from ..reports.asked import Asked, html, name_of, parts, picture_name, png
from .decoders import SHARED, check_read
from .spec import SUMMARY, BenchSpec, ShowSpec, TuneSpec, located

NOISE, QUESTION = 448, "What is in the picture?"  # pixels of a side, and the question, where none is given
TUNED = ("divprune", "cdpruner", "visionzip", "vispruner", "fastv", "pyramiddrop", "sparsevlm", "grid")
ANSWER = 16  # tokens
TUNING = "it is tuned under one budget, --target-flops, in torch"
Tell = Callable[[str, int, "int | None"], Any]


def reader(model: str, layout: str = "auto") -> tuple[PreTrainedModel, Any, TokenPruner | None]:
    """A model as it is, its processor, and the method that its folder prunes it with.

    Raises:
        ValueError: it cannot be read, or its folder prunes its cache.
    """
    net, processor = load_reader(model, layout)
    method = pruner_of(net)
    if method is not None:
        unprune(net)
        if not isinstance(method, TokenPruner):
            raise ValueError(f"{model} is pruned by {method.name}, which takes entries from a cache and no tokens")
    return net, processor, method


def methods_of(spec: ShowSpec | BenchSpec, own: TokenPruner | None) -> dict[str, TokenPruner]:
    """The methods that a specification names, by their names, else the model's own one.

    Raises:
        ValueError: there is none, or one prunes no tokens.
    """
    names = [name.strip() for name in (spec.method or "").split(",") if name.strip()]
    if spec.hold is not None or (spec.keep is not None and not names):
        raise ValueError("keep belongs to a method: name it (--method divprune); hold is of the cache of a decoder")
    options = {} if spec.keep is None else {"keep": spec.keep}
    made: dict[str, Any] = {name: make_method(name, options) for name in names}
    for name, method in made.items():
        if not isinstance(method, TokenPruner):
            raise ValueError(f"{name} takes entries from a cache: expected a method of pictures, as divprune or fastv")
    if not made and own is None:
        raise ValueError(f"{spec.model} is not pruned: name a method, as in --method divprune --keep 0.25")
    return made or {own.name: own}


def followed_questions(spec: ShowSpec) -> list[Asked]:
    """What is left of a picture for each question, and both answers; a page and a drawing where they are asked for.

    Raises:
        ValueError: no question, not one method, or a picture that cannot be read.
    """
    net, processor, own = reader(spec.model, spec.layout)
    if not spec.ask:
        raise ValueError(f"{spec.model} answers questions about a picture: give one with --ask")
    methods = methods_of(spec, own)
    if len(methods) != 1:
        raise ValueError(f"{len(methods)} methods: show follows one")
    (method,), picture, found = methods.values(), read_picture(spec.image), []
    say = lambda ids: processor.decode(ids, skip_special_tokens=True).strip()  # noqa: E731
    for question in spec.ask:
        inputs = {name: value.to(net.device) for name, value in asked(processor, picture, question).items()}
        dense = say(answer(net, inputs, spec.new))
        with pruned_by(net, method):
            said, report = say(answer(net, inputs, spec.new)), method.picture_report
            if not report["pictures"][0]:
                raise ValueError(f"{type(processor).__name__} put no picture into the prompt")
            shown = parts(net, processor, inputs, spec.image)
        found.append(Asked(question, said, dense, shown, report, name_of(net), method.name))
    if spec.html:
        html(found, spec.html)
    if spec.png:
        png(found, spec.png)
    return found


def bench_reader(spec: BenchSpec, *, progress: Tell | None = None) -> list[dict]:
    """Rows of the dense model and of methods for one question about a picture: milliseconds of the tower, of the rest
    of the prompt and of a token, tokens of the picture in every layer, bytes of the cache.

    Raises:
        ValueError: no method is named, neither by the folder nor by ``method``; or what only encoders have.
    """
    check_read(
        spec, (*SHARED, "image", "ask", "repeats"), "reads pictures and is timed in torch alone, one question at a time"
    )
    net, processor, own = reader(spec.model, spec.layout)
    methods = methods_of(spec, own)
    if spec.image is None:
        drawn = np.random.default_rng(0).integers(0, 256, (NOISE, NOISE, 3), dtype=np.uint8)
        picture = pillow().Image.fromarray(drawn)
    else:
        picture = read_picture(spec.image)
    inputs = {name: value.to(net.device) for name, value in asked(processor, picture, spec.ask or QUESTION).items()}
    fields = {"model": name_of(net), "task": picture_name(spec.image)}
    return measure_asking(net, methods, inputs, repeats=spec.repeats, fields=fields, progress=progress)


# --- tune -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Pair:
    """A question about a picture: the inputs, the dense model's answer (n,), and its log probabilities (n, V)."""

    inputs: dict[str, Any]
    answered: Tensor
    log: Tensor


def tune_reader(spec: TuneSpec, *, progress: Tell | None = None) -> list[dict]:
    """Find how much of a picture can leave at which site under a share of the MACs, on pictures with questions and
    without labels; save the model so pruned.

    Every method is brought onto the budget; the one whose answers are nearest to the dense model's is taken: the mean
    KL(dense || pruned) of the tokens of the dense model's own answers, each after those before it.

    Returns:
        A row for each method, nearest first, the one that was saved ``chosen``.

    Raises:
        ValueError: another budget than ``target_flops``, a pruned model, a method without shares, no pairs, a folder
            that is not empty.
    """
    read = ("method_options", "target_flops", "out", "data", "config", "text", "train_split", "limit")
    check_read(spec, (*SHARED, *read), f"reads pictures: {TUNING}")
    if spec.target_flops is None:
        raise ValueError(f"{spec.model} reads pictures: {TUNING}")
    out, began, tell = Path(spec.out), time.time(), progress or (lambda *_: None)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there and not empty: choose another folder for the result")
    net, processor, own = reader(spec.model)
    if own is not None:
        raise ValueError(f"{spec.model} is pruned already: tune its dense model")
    names = TUNED if spec.method == "auto" else (spec.method,)
    if spec.method_options and spec.method == "auto":
        raise ValueError("method_options belong to one method: name it")
    methods = {name: share_method(name, spec.target_flops, spec.method_options or {}) for name in names}
    pairs = asked_pairs(spec, net, processor, tell)
    rows, missed = [], []
    for number, (name, method) in enumerate(methods.items()):
        tell(name, number, len(methods))
        try:
            rows.append({"method": name} | judged(net, method, pairs))
        except OutOfReach as error:
            missed.append(f"{name}: {error}")
        except ValueError as error:  # it does not go with this model
            if spec.method != "auto":
                raise
            missed.append(f"{name}: {error}")
    if not rows:
        raise ValueError(missed[0])
    rows.sort(key=lambda row: row["divergence"])
    for row in rows:
        row |= {"chosen": row is rows[0], "pairs": len(pairs)}
    best = {"at": tuple(rows[0]["at"]), "keep": tuple(rows[0]["keep"])}
    prune(net, make_method(rows[0]["method"], {**(spec.method_options or {}), **best}))
    summary = {
        "tuning": {"model": spec.model, "data": located(str(spec.data)), "target_flops": spec.target_flops},
        "schedules": rows,
        "left_out": missed,
        "seconds": round(time.time() - began, 1),
        **environment(),
    }
    with folder_written_whole(out) as aside:
        net.save_pretrained(aside)
        processor.save_pretrained(aside)
        (aside / SUMMARY).write_text(json.dumps(summary, indent=1))
    return rows


def share_method(name: str, target: float, options: dict[str, Any]) -> TokenPruner:
    """A method that a budget can be met with by the share that it keeps. Raises ValueError for others."""
    method: Any = make_method(name, {"keep": 0.5, "target_flops": target, **options})
    if not isinstance(method, TokenPruner) or getattr(method, "knob", lambda: None) is None:
        raise ValueError(f"{name} has no share to tune: expected {', '.join(TUNED)}")
    return method


def asked_pairs(spec: TuneSpec, net: PreTrainedModel, processor: Any, tell: Tell) -> list[Pair]:
    """The pairs of the data, with what the dense model answers."""
    found, rows = [], read_pairs(spec)
    for number, (file, question) in enumerate(rows):
        tell("asking the dense model", number, len(rows))
        inputs = {k: v.to(net.device) for k, v in asked(processor, read_picture(file), question).items()}
        answered = answer(net, inputs, ANSWER)
        found.append(Pair(inputs, answered, told(net, inputs, answered)[0]))
    return found


def judged(net: PreTrainedModel, method: TokenPruner, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Bring a method onto its budget, and measure what it changes: schedule, share of the MACs, KL of a token, and how
    many tokens would be the dense model's."""

    @torch.no_grad()
    def forward(pair: Pair) -> Any:
        net(**pair.inputs, use_cache=False, logits_to_keep=1)
        return method.record

    with pruned_by(net, method):
        method.calibrate(forward, pairs)  # type: ignore[arg-type]
        apart, same, shares, count = 0.0, 0, [], 0
        for pair in pairs:
            log, share = told(net, pair.inputs, pair.answered)
            apart += float((pair.log.exp() * (pair.log - log)).sum())
            same += int((log.argmax(-1) == pair.log.argmax(-1)).sum())
            shares.append(share)
            count += len(log)
        known: Any = method
        found = {"at": [*known.sites], "keep": [*known.shares]}
    return found | {
        "flops_fraction": sum(shares) / len(shares),
        "divergence": apart / count,
        "agreement": same / count,
    }
