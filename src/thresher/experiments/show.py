"""Follow texts, or a picture, through a pruned model: which token leaves after which layer."""

from __future__ import annotations

from typing import Any

from ..data.load import load_task
from ..data.models import clip, load, load_vision
from ..data.texts import load_texts
from ..reports import patches
from ..reports.asked import Asked
from ..reports.trace import html, trace
from .cache_spec import decodes, reads
from .decoders import followed_prompts
from .readers import followed_questions
from .spec import ShowSpec, job


@job(ShowSpec)
def followed_texts(spec: ShowSpec) -> list[Any]:
    """What happens to each text, or of a decoder what is left of it in the cache; a page of it where one is asked for.
    Returns ``Trace`` or ``PromptTrace``."""
    if decodes(spec.model):
        return followed_prompts(spec, [text for text, _ in texts_of(spec)])
    if (spec.method, spec.keep, spec.hold) != (None, None, None):
        raise ValueError(f"{spec.model} is no decoder: --method, --keep and --hold name what prunes the cache of one")
    pruned, tokenizer = load(spec.model, spec.layout)
    max_length = clip(spec.max_length, pruned.config)
    traces = [trace(pruned, tokenizer, text, pair, max_length=max_length) for text, pair in texts_of(spec)]
    if spec.html:
        html(traces, spec.html)
    return traces


@job(ShowSpec)
def followed_picture(spec: ShowSpec) -> patches.PatchTrace | list[Asked]:
    """What happens to the patches of a picture, or of a language model to what it reads of one for each question; a
    page and a drawing of it where they are asked for."""
    if reads(spec.model):
        return followed_questions(spec)
    if spec.ask or (spec.method, spec.keep, spec.hold) != (None, None, None):
        what = "--ask, --method, --keep and --hold"
        raise ValueError(f"{spec.model} answers no questions: {what} are for language models that do")
    traced = patches.trace(*load_vision(spec.model, spec.layout), spec.image)
    if spec.html:
        patches.html([traced], spec.html)
    if spec.png:
        patches.png(traced, spec.png)
    return traced


def texts_of(spec: ShowSpec) -> list[tuple[str, str | None]]:
    """The texts to follow, alone or in pairs, ``limit`` at most."""
    if spec.texts:
        texts = [(text, spec.pair) for text in spec.texts]
    elif spec.file:
        texts = [(line, None) for line in spec.file.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        task = load_task(spec, need_labels=False) if not decodes(spec.model) else load_texts(spec)
        rows = task.test.select(range(min(spec.limit, len(task.test))))
        texts = [(*(row[column] for column in task.text_columns), None)[:2] for row in rows]
    return texts[: spec.limit]
