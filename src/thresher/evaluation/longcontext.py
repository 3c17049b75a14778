"""What a decoder still answers about a long text when entries have left its cache.

Each text is read once. What leaves for a method and budget leaves a copy of its full cache (``ReadPrompt``), before the
question is read or after it, and the answers of equal budgets are made in one batch.

Shapes: R rows, one of each method; q tokens of a question, a of an answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..caches.hooks import ours
from ..caches.kvzip import KVzip
from ..caches.pruner import CachePruner
from ..data.longcontext import Case, Context
from ..data.qa import f1
from ..stats.paired import interval
from .prompt import ReadPrompt, copied, going_on, read_prompt, stacked, uneven

FULL = "full"  # the cache of which nothing has left
WHEN = ("after", "before")  # the question is read after entries have left, or before, with the text, as by generate()
REPEAT = "\n\nRepeat the text above, word by word."
LONGEST = 12  # tokens of an answer that is not exact
POINTS = 100.0


@dataclass(frozen=True, eq=False)
class Group:
    """Caches that hold equally much, in one batch, and what is known of each row."""

    cache: DynamicCache
    rows: list[dict]


@dataclass(frozen=True, eq=False)
class Judge:
    """Asks a decoder about texts, over the full cache and those of several methods.

    Attributes:
        methods: by their names in the results. One that has ``keep`` as a share is brought to this share of all that
            was read when it leaves.
        when: some of ``WHEN``.
        longest: tokens of an answer that is not exact.
    """

    model: PreTrainedModel
    tokenizer: Any
    methods: Mapping[str, CachePruner]
    when: Sequence[str] = WHEN
    longest: int = LONGEST

    def __call__(self, context: Context) -> list[dict]:
        """Results of all questions: ``score`` (0 to 1), ``score_begun``, the same when the space before an exact answer
        is given, the ``logprob`` of the first right answer, what was ``said``, entries ``held`` and ``bytes`` of the
        cache that was asked; KVzip is asked "after" alone."""
        results: list[dict] = []
        text: ReadPrompt | None = None
        later: list[Group] = []
        for case in context.cases:
            head, question, tail = self.parts(context.text, case)
            text = text or read_prompt(self.model, self.ids(head))
            for when in self.when:
                about = {"task": case.task, "number": context.number, "depth": case.depth, "when": when}
                about["exact"] = case.exact
                if when == "after":  # nothing that leaves depends on the question
                    read, later = text, later or self.groups(text, self.methods)
                    results += self.results(later, question + tail, None, case, about)
                else:
                    read = read_prompt(self.model, self.ids(question + tail), text)
                    known = {name: one for name, one in self.methods.items() if not isinstance(one, KVzip)}
                    results += self.results(self.groups(read, known), [], read.logits, case, about)
        return results

    def results(
        self, groups: list[Group], asked: list[int], ready: Tensor | None, case: Case, about: dict
    ) -> list[dict]:
        """What each cache answers, when it has read what is ``asked``."""
        return [
            about | row | one
            for group in groups
            for row, one in zip(group.rows, self.answered(copied(group.cache), asked, ready, case), strict=True)
        ]

    def groups(self, read: ReadPrompt, methods: Mapping[str, CachePruner]) -> list[Group]:
        """The caches of all methods, and the full one, as batches of equal numbers of entries."""
        caches = {FULL: read.full(), **{name: read.evicted(method) for name, method in methods.items()}}
        equal: dict[tuple, list[str]] = defaultdict(list)
        for name, cache in caches.items():
            own = (name,) if uneven(cache) else ()
            equal[own + tuple((type(layer), layer.held) for layer in ours(cache).values())].append(name)
        groups = []
        for names in equal.values():
            sizes = [sum(layer.nbytes for layer in ours(caches[name]).values()) for name in names]
            entry = sum(layer.entry_bytes for layer in ours(caches[names[0]]).values())  # in all layers
            known = {"held": sizes[0] / entry, "tokens": read.ids.shape[1]}
            rows = [known | {"method": name, "bytes": size} for name, size in zip(names, sizes, strict=True)]
            alike = [caches.pop(name) for name in names]
            groups.append(Group(stacked(alike) if len(alike) > 1 else alike[0], rows))
        return groups

    def answered(self, cache: DynamicCache, asked: list[int], ready: Tensor | None, case: Case) -> list[dict]:
        """What ``said`` says over any cache."""
        with going_on(self.model, cache):
            return self.said(cache, asked, ready, case)

    @torch.no_grad()
    def said(self, cache: DynamicCache, asked: list[int], ready: Tensor | None, case: Case) -> list[dict]:
        """What each row answers, when it has read what is ``asked``; ``ready``: (1, V) logits of the first token of the
        answer, where nothing is."""
        gold = self.ids(self.tokenizer(case.answers[0], add_special_tokens=False)["input_ids"])
        rows, start = len(next(iter(ours(cache).values())).counts), cache if case.exact else copied(cache)
        forced = torch.cat([self.ids(asked), gold[:, :-1]], 1).expand(rows, -1)
        logits = [] if ready is None else [ready[:, None].expand(rows, -1, -1)]
        if (more := gold.shape[1] - len(logits)) > 0:
            logits.append(self.model(input_ids=forced, past_key_values=start, logits_to_keep=more).logits)
        likely = torch.cat(logits, 1).float().log_softmax(-1)
        found = likely.gather(2, gold.expand(rows, -1)[..., None])[..., 0].sum(1).tolist()
        if case.exact:  # greedy decoding says the answer where each of its tokens is the most likely one
            best = likely.argmax(-1)
            said = [self.tokenizer.decode(row) for row in best]
            right = best == gold
            scores, begun = (right[:, n:].all(1).float().tolist() for n in (0, self.blank(gold[0])))
        else:
            first = self.ids(asked) if ready is None else ready.argmax(-1)[None]
            said = self.generated(cache, first.expand(rows, -1), ready is not None)
            scores = begun = [max(f1(text, answer) for answer in case.answers) for text in said]
        return [
            {"score": score, "score_begun": later, "logprob": logprob, "said": text}
            for score, later, logprob, text in zip(scores, begun, found, said, strict=True)
        ]

    def blank(self, gold: Tensor) -> int:
        """How many of the first tokens of an answer are spaces alone, the last one not counted."""
        return sum(1 for _ in takewhile(lambda token: not self.tokenizer.decode([token]).strip(), gold[:-1].tolist()))

    def generated(self, cache: DynamicCache, asked: Tensor, begun: bool) -> list[str]:
        """The first line of what each row answers, greedily; ``begun``: whether ``asked`` is its first token."""
        said = asked.tolist() if begun else [[] for _ in asked]
        while len(said[0]) < self.longest and not all(self.line(row)[1] for row in said):
            asked = self.model(input_ids=asked, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
            said = [[*row, *new] for row, new in zip(said, asked.tolist(), strict=True)]
        return [self.line(row)[0] for row in said]

    def line(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """The first line of what a row has said, and whether it has ended: what follows depends on its batch."""
        ends = {self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
        own = [*takewhile(lambda token: token not in ends, tokens)]
        text = self.tokenizer.decode(own, skip_special_tokens=True).lstrip()
        return (text.rstrip().splitlines() or [""])[0], len(own) < len(tokens) or "\n" in text

    def parts(self, text: str, case: Case) -> tuple[list[int], list[int], list[int]]:
        """The ids of the text with what stands before it, of the question, and of what follows up to the answer."""
        content = f"{text}\n\n{case.question}"
        if self.tokenizer.chat_template:
            told = [{"role": "user", "content": content}]
            content = self.tokenizer.apply_chat_template(told, add_generation_prompt=True, tokenize=False)
        cut = content.rindex(case.question)
        pieces = content[:cut], case.question, content[cut + len(case.question) :] + case.lead
        if not self.tokenizer.chat_template:
            pieces = (*pieces[:2], f"\n{case.lead}")
        first = not self.tokenizer.chat_template  # a template has its own first token
        head, *rest = (self.tokenizer(x, add_special_tokens=first and not n)["input_ids"] for n, x in enumerate(pieces))
        return head, rest[0], rest[1]

    def ids(self, tokens: list[int]) -> Tensor:
        """(1, n) on the model's device."""
        return torch.tensor([tokens], dtype=torch.long, device=self.model.device)


def repeat_request(tokenizer: Any) -> tuple[int, ...]:
    """The ids that ask a model to repeat what it has read, for ``KVzip``: with a chat template as the user's turn."""
    text = REPEAT
    if tokenizer.chat_template:
        told = tokenizer.apply_chat_template(
            [{"role": "user", "content": REPEAT}], add_generation_prompt=True, tokenize=False
        )
        text = told[told.rindex(REPEAT.strip()) :]
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def fluency(model: PreTrainedModel, ids: Tensor, continued: int, methods: Mapping[str, CachePruner]) -> list[dict]:
    """How well the last ``continued`` of ``ids`` (1, N) are foreseen when entries have left the cache of those before.

    Returns of each method ``nll``, the mean negative log likelihood (nats a token), and ``kl``, the mean divergence of
    the full cache's distribution from its own.
    """
    read, rest = read_prompt(model, ids[:, :-continued]), ids[:, -continued:]
    own = {}
    for name, cache in {FULL: read.full(), **{name: read.evicted(method) for name, method in methods.items()}}.items():
        with going_on(model, cache):
            later = model(input_ids=rest[:, :-1], past_key_values=cache).logits
        own[name] = torch.cat([read.logits[:, None], later], 1).float().log_softmax(-1)
    full = own[FULL]
    return [
        {
            "method": name,
            "tokens": read.ids.shape[1],
            "nll": float(-found.gather(2, rest[..., None]).mean()),
            "kl": float((full.exp() * (full - found)).sum(-1).mean()),
        }
        for name, found in own.items()
    ]


def summary(results: Iterable[Mapping], against: Sequence[str] = ()) -> list[dict]:
    """Means of results: of each task, ``when`` and method the quality in points, what was lost against the full cache
    with its paired 95 % interval, and the mean gain over the methods ``against``, with theirs; ``quality_begun`` and
    ``drop_begun`` (the loss and its interval) of answers of which the space before them is given: a model may have a
    number, and begin with other words.

    A loss is an example's score over the full cache minus its score over this one.
    """
    groups: dict[tuple, dict[str, dict]] = defaultdict(lambda: defaultdict(dict))
    for one in results:
        groups[one["task"], one["when"]][one["method"]][one["number"]] = one
    rows = []
    for (task, when), methods in groups.items():
        exact = all(one["exact"] for own in methods.values() for one in own.values())
        for method, own in methods.items():
            row = {"task": task, "when": when, "method": method, "n_examples": len(own), "exact": exact}
            row["quality"] = POINTS * _mean(own, "score")
            row |= {name: _mean(own, name) for name in ("logprob", "held", "bytes", "tokens")}
            row["drop"], row["interval_low"], row["interval_high"] = _paired(methods[FULL], own, exact)
            row["quality_begun"] = POINTS * _mean(own, "score_begun")
            row["drop_begun"] = _paired(methods[FULL], own, exact, "score_begun")
            row["gains"] = {
                other: _paired(own, methods[other], exact) for other in against if other in methods and other != method
            }
            rows.append(row)
    return rows


def _mean(own: Mapping[int, Mapping], name: str) -> float:
    return float(np.mean([one[name] for one in own.values()]))


def _paired(a: Mapping[int, Mapping], b: Mapping[int, Mapping], exact: bool, name: str = "score") -> tuple:
    """The mean of a - b over the examples that both have, in points, and its interval."""
    both = sorted({*a} & {*b})
    change = POINTS * np.array([a[number][name] - b[number][name] for number in both])
    low, high = interval(change, POINTS if exact else None) or (None, None)
    return float(change.mean()), low, high
