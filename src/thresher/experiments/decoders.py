"""Decoders: time them with a shorter cache, ask them about long texts, show what is left of a prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..api import unprune
from ..caches.hooks import ours
from ..caches.pruner import CachePruner
from ..core.method import pruner_of
from ..data.load import load_task
from ..data.longcontext import Book, book_of, contexts
from ..data.models import clip, load_decoder
from ..data.spec import DataSpec
from ..data.task import DataError
from ..data.texts import TEXT, load_texts
from ..evaluation.decoding import MB, PRECISIONS, measure_decoding
from ..evaluation.hardware import environment
from ..evaluation.longcontext import FULL, WHEN, Judge, repeat_request, summary
from ..evaluation.prompt import read_prompt
from ..evaluation.rows import row, whole, write_csv, writing
from ..reports import compare_page
from ..reports.prompts import PromptTrace, html
from .cache_spec import cache_method
from .spec import BenchSpec, CompareSpec, ShowSpec, TaskSpec, remembered
from .workspace import inputs_of

SHARED = ("model", "method", "keep", "hold", "layout", "threads", "max_length")  # that all commands read, or check
COLUMNS = ("config", "text", "test_split", "train_split")  # what says which texts are read of the data
DATA = ("data", "limit", *COLUMNS)
CLAIM, ANSWERS, TABLE, PAGE = "compare.json", "answers.jsonl", "compare.csv", "compare.html"
BASELINES = ("random-cache", "streamingllm")
TEXTS = 100  # that are asked about, where no limit is given
Tell = Callable[[str, int, "int | None"], Any]


def opened(model: str, layout: str = "auto") -> tuple[PreTrainedModel, Any, CachePruner | None]:
    """A decoder as it is, its tokenizer, and the method that its folder prunes the cache with.

    Raises:
        ValueError: it cannot be read, or its folder prunes its tokens.
    """
    net, tokenizer = load_decoder(model, layout)
    method = pruner_of(net)
    if method is not None:
        unprune(net)
        if not isinstance(method, CachePruner):
            raise ValueError(
                f"{model} is pruned by {method.name}, which takes tokens from layers and none from a cache"
            )
    return net, tokenizer, method


def check_read(spec: TaskSpec, names: Sequence[str], what: str) -> None:
    """Raise ValueError for an option that a command does not read of a model, and say ``what`` is done with such;
    ``names``: those that it reads."""
    known = remembered(spec.model)
    for one in fields(spec):
        value = getattr(spec, one.name)
        if one.name not in names and value not in (one.default, known.get(one.name, one.default)):
            raise ValueError(f"{spec.model} {what}: leave {one.name} out")


def options_of(tokenizer: Any) -> dict[str, dict]:
    """What some methods have to be told of a tokenizer."""
    return {"kvzip": {"request": repeat_request(tokenizer)}}


# --- bench ------------------------------------------------------------------------------------------------------------
def bench_decoder(spec: BenchSpec, *, progress: Tell | None = None) -> list[dict]:
    """Rows of the full cache and of methods, at every number of tokens of a prompt: milliseconds of the prompt and of
    the tokens after it, what is held, the peak of memory while the prompt is read, and the time of scores.

    Raises:
        ValueError: no method is named, neither by the folder nor by ``method``; or what only encoders have.
    """
    check_read(spec, (*SHARED, "contexts", "repeats"), "is a decoder, which is timed in torch alone, on any tokens")
    net, tokenizer, own = opened(spec.model, spec.layout)
    methods = spec.cache_methods(options_of(tokenizer)) or ({} if own is None else {own.name: own})
    if not methods:
        raise ValueError(f"{spec.model} is not pruned: name methods and a budget, as in --method snapkv --keep 0.25")
    if (few := [tokens for tokens in spec.contexts if tokens < 2]) or not spec.contexts:
        raise ValueError(f"contexts={few or '()'}: expected prompts of 2 tokens or more")
    fields = {"model": Path(spec.model).name}
    return measure_decoding(net, methods, spec.contexts, repeats=spec.repeats, fields=fields, progress=progress)


# --- compare ----------------------------------------------------------------------------------------------------------
def compare_decoder(spec: CompareSpec, *, progress: Tell | None = None) -> list[dict]:
    """Ask a decoder about long texts over caches of every method and size, and tell what each loses.

    The texts are made of the test part of the data. Answers lie in ``out``: the same call goes on where it was
    interrupted. A method's loss is paired with the full cache's answers to the same questions.

    Returns:
        Rows: for each task and time of the question the full cache, then at each target the methods, best first.

    Raises:
        ValueError: a task, method or target that is none, an option that only trainings read, several seeds, data that
            cannot be asked about, or an ``out`` that belongs to another comparison.
    """
    check_read(
        spec,
        (*SHARED, "out", "methods", "targets", "seeds", "tasks", "when", *DATA),
        "is a decoder, which is asked, and neither trained nor timed",
    )
    if len(spec.seeds) != 1:
        raise ValueError(f"seeds={spec.seeds}: a decoder is asked about the texts of one seed, give one")
    net, tokenizer, own = opened(spec.model)
    if own is not None:
        raise ValueError(f"{spec.model} is pruned already: compare from its dense model")
    if unknown := [when for when in spec.when if when not in WHEN] or not spec.when:
        raise ValueError(f"when={unknown}: expected {' or '.join(WHEN)}")
    methods = _methods(spec, options_of(tokenizer))
    length = clip(spec.max_length, net.config)
    book = _book(spec, tokenizer)
    _claim(spec)
    file, count = spec.out / ANSWERS, spec.limit or TEXTS
    answers = [answer for answer in answered(file) if answer["number"] < count]
    known = {(answer["number"], answer["task"]) for answer in answers}
    judge = Judge(net, tokenizer, methods, spec.when)
    for context in contexts(book, spec.tasks, length, count, seed=spec.seeds[0]):
        if progress:
            progress("texts", context.number, count)
        if (context.number, context.cases[0].task) in known:
            continue
        own_answers = judge(context)
        with writing(spec.out), file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(own_answers) + "\n")
        answers += own_answers
    made = _rows(spec, answers, length, PRECISIONS[net.dtype])
    write_csv(spec.out / TABLE, made)
    if made:
        compare_page.html(made, spec.out / PAGE)
    return made


def answered(file: Path) -> list[dict]:
    """What a file of answers holds, a list in each line; a last line that was written in part is cut off.

    Raises:
        ValueError: another line is no such list.
    """
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    if lines and not lines[-1].endswith("\n"):
        with whole(file) as aside:
            aside.write_text("".join(lines[:-1]), encoding="utf-8")
        lines = lines[:-1]
    try:
        return [answer for line in lines for answer in json.loads(line)]
    except ValueError as error:
        raise ValueError(f"{file} holds a line that is no list of answers ({error}): remove that line") from None


def _methods(spec: CompareSpec, more: dict[str, dict]) -> dict[str, CachePruner]:
    """Every method at every target."""
    made = {}
    for target in dict.fromkeys(spec.targets):
        for name in dict.fromkeys((*spec.methods, *BASELINES)):
            made[f"{name}@{target:g}"] = cache_method(name, {"keep": target, **more.get(name, {})})
    return made


def _book(spec: CompareSpec, tokenizer: Any) -> Book:
    """The passages of the test part, and its questions where it has some and they are asked."""
    given = {name: getattr(spec, name) for name in ("data", *COLUMNS)}
    if "squad" in spec.tasks:
        task = load_task(DataSpec(**given))
        if task.kind != "qa":
            raise DataError(f"{spec.data} has no questions: squad needs the columns question, context and answers")
        columns = task.text_columns
    else:
        task, columns = load_texts(DataSpec(**given)), (TEXT,)
    return book_of(task.test, columns, lambda text: len(tokenizer(text, verbose=False)["input_ids"]))


def _claim(spec: CompareSpec) -> None:
    """Make ``out`` the folder of this comparison, or see that it is."""
    names = [*COLUMNS, "model", "data", "max_length", "methods", "targets", "tasks", "when", "seeds"]
    settings = json.loads(json.dumps({name: getattr(spec, name) for name in names} | {"inputs": inputs_of(spec)}))
    file = spec.out / CLAIM
    if spec.out.exists() and any(spec.out.iterdir()) and not file.exists():
        raise ValueError(f"{spec.out} is not empty and holds no {CLAIM}: choose another folder for the comparison")
    there = json.loads(file.read_text()) if file.exists() else settings
    there.setdefault("inputs", settings["inputs"])  # of an older version nothing is known
    other = ", ".join(sorted(name for name in settings if there.get(name) != settings[name]))
    if other and (spec.out / ANSWERS).exists():
        raise ValueError(f"{spec.out} belongs to another comparison (of other {other}): choose another folder")
    with whole(file) as aside:
        aside.write_text(json.dumps(settings, indent=1) + "\n")


def _rows(spec: CompareSpec, answers: list[dict], length: int, precision: str) -> list[dict]:
    """The rows of a comparison."""
    made = []
    for one in summary(answers):
        name, _, target = one["method"].partition("@")
        quality = {"quality": one["quality"], "quality_dense": one["quality"] + one["drop"]}
        quality |= {"interval_low": one["interval_low"], "interval_high": one["interval_high"]}
        full = one["bytes"] / one["held"] * one["tokens"] / MB
        made.append(
            row(
                task=one["task"],
                model=Path(spec.model).name,
                method=name,
                mode="dense" if name == FULL else "pruned",
                runtime="torch",
                precision=precision,
                threads=torch.get_num_threads(),
                metric="accuracy" if one["exact"] else "qa_f1",
                max_length=length,
                tokens_mean=one["tokens"],
                n_examples=one["n_examples"],
                split="test",
                keep=float(target or 1),
                when=one["when"],
                held=one["held"],
                cache_mb=one["bytes"] / MB,
                cache_mb_full=full,
                seed=spec.seeds[0],
                **quality,
                **environment(),
            )
        )
    return sorted(made, key=lambda r: (r["task"], WHEN.index(r["when"]), -r["keep"], -r["quality"]))


# --- show -------------------------------------------------------------------------------------------------------------
def followed_prompts(spec: ShowSpec, texts: Sequence[str]) -> list[PromptTrace]:
    """What is left of prompts in each layer, once they have been read; a page of it where one is asked for.

    Raises:
        ValueError: no method is named, or a text has no tokens.
    """
    check_read(spec, (*SHARED, "texts", "file", "html", *DATA), "is a decoder, which is shown texts one by one")
    net, tokenizer, own = opened(spec.model, spec.layout)
    methods = [*spec.cache_methods(options_of(tokenizer)).values()] or ([] if own is None else [own])
    if len(methods) != 1:
        raise ValueError(f"{spec.model} is not pruned by one method: name it, as in --method snapkv --keep 0.25")
    (method,), limit = methods, clip(spec.max_length, net.config)
    traces = []
    for text in texts:
        encoded = tokenizer(text, truncation=True, max_length=limit, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], [tuple(span) for span in encoded["offset_mapping"]]
        if not ids:
            raise ValueError("the text has no tokens")
        cache = read_prompt(net, torch.tensor([ids], device=net.device)).evicted(method)
        held = {}
        for number, layer in ours(cache).items():
            with layer.unrolled():
                places = layer.position[0]
            counts = torch.zeros(len(ids), dtype=torch.long)
            for head in places:
                counts[head[head >= 0].cpu().long()] += 1
            held[number] = [count / len(places) for count in counts.tolist()]
        tokens = tuple(tokenizer.convert_ids_to_tokens(ids))
        traces.append(PromptTrace(text, tokens, tuple(spans), held, Path(spec.model).name, method.name))
    if spec.html:
        html(traces, spec.html)
    return traces
