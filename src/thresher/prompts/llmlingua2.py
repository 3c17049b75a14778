"""LLMLingua-2: a token classifier says which words of a text have to stay (Pan et al., ACL Findings 2024, arXiv
2403.12968).

Shapes: N tokens of a prompt, U words, B windows of at most W tokens.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..api import dense, inner_model
from ..core.architecture import Architecture, find_architecture
from ..core.attachment import at_rest
from ..core.method import pruner_of
from .words import Prompt, Shortener, fitting, read_text

KEEP = 1  # the label of what has to stay; that of the rest is 0
ROWS = 16  # windows of one forward
ENDS = ".!?:;"  # behind which a capital letter says nothing


@dataclass(frozen=True)
class LLMLingua2(Shortener):
    """Keep the words that a token classifier of two labels holds to be needed, whatever is asked later.

    A word scores the mean probability of label 1 over its tokens. The best words stay, as many as fit: never more
    tokens than ``keep`` says, and fewer only where no word fits any more. A classifier that is pruned chooses as it is
    pruned.
    ``likelihood_labels`` makes what it learns from.

    | paper | here | why |
    |---|---|---|
    | above a quantile of all words | the best that fit | the number of tokens is met, in short texts and long ones |
    | labels: what GPT-4 left of a text | the words that a decoder finds least likely | any decoder has them |
    | forced: given tokens, digits | ``force``, ``numbers``, and ``names`` | half a fact is none |
    | chunks end where sentences do | windows end where words do | no window is nearly empty |

    Args:
        keep, words: as in ``Shortener``; counted in tokens of the classifier.
        numbers: words with a digit stay before all others.
        names: so do words with a capital letter that begin no sentence.
        force: so do words that hold one of these strings; ``("\\n",)`` keeps the first word of each line.
        window: tokens that are read at a time; fewer where the classifier takes fewer.
    """

    numbers: bool = field(default=True, kw_only=True)
    names: bool = field(default=True, kw_only=True)
    force: tuple[str, ...] = field(default=(), kw_only=True)
    window: int = field(default=512, kw_only=True)

    special: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 8:
            raise ValueError(f"window={self.window}: expected 8 tokens or more")
        if isinstance(self.force, str) or not all(isinstance(one, str) and one for one in self.force):
            raise ValueError(f"force={self.force!r}: expected strings, as ('\\n', '?')")
        object.__setattr__(self, "force", tuple(self.force))

    def check(self, info: Architecture, model: PreTrainedModel) -> None:
        labels = getattr(inner_model(model).config, "num_labels", None)
        if info.causal or labels != 2 or not type(inner_model(model)).__name__.endswith("ForTokenClassification"):
            raise ValueError(
                f"LLMLingua2 asks a token classifier of two labels, of which the second one says that a token stays; "
                f"{type(inner_model(model)).__name__} is none: load it with AutoModelForTokenClassification, or give "
                "GemFilter, which asks a decoder"
            )

    def choose(self, model: PreTrainedModel, prompt: Prompt, count: int, tokenizer: Any) -> tuple[list[int], int]:
        of = torch.tensor(prompt.units) - prompt.units[0]
        sizes = of.bincount()
        scores = torch.zeros(len(sizes)).index_add(0, of, self.scores(model, prompt, tokenizer)) / sizes.clamp(min=1)
        forced = torch.zeros(len(sizes)).index_add(0, of, torch.tensor(prompt.special).float()) > 0
        if prompt.parts:
            forced |= torch.tensor(self.forced(prompt.parts)[prompt.units[0] :][: len(sizes)])
        needed = int(sizes[forced].sum())
        if needed > count:
            warnings.warn(
                f"numbers, names and what is forced take {needed} tokens and {count} are to stay: some of them leave",
                stacklevel=3,
            )
        stays = fitting(scores + forced, sizes, forced & (needed <= count), count)
        return stays[of].nonzero()[:, 0].tolist(), find_architecture(inner_model(model)).depth

    def forced(self, parts: Sequence[str]) -> list[bool]:
        """Of each word of a text, whether it stays before others."""
        found, begins = [], True
        for part in parts:
            word = part.strip()
            begins = begins or "\n" in part[: len(part) - len(part.lstrip())]
            name = self.names and not begins and any(letter.isupper() for letter in word) and len(word) > 1
            number = self.numbers and any(letter.isdigit() for letter in word)
            found.append(name or number or any(one in part for one in self.force))
            begins = not word or word.rstrip("\"')]")[-1:] in ENDS
        return found

    @torch.no_grad()
    def scores(self, model: PreTrainedModel, prompt: Prompt, tokenizer: Any) -> Tensor:
        """(N,) fp32, the probability of each token that it has to stay."""
        if tokenizer is None:
            raise ValueError("LLMLingua2 needs tokenizer=, which knows what opens and closes a window")
        before, behind = around(tokenizer)
        limits = (self.window, tokenizer.model_max_length, find_architecture(inner_model(model)).max_tokens)
        room = min(limit for limit in limits if limit) - len(before) - len(behind)
        windows, found = windows_of(prompt.units, room), []
        with at_rest(model):
            for at in range(0, len(windows), ROWS):
                rows = [before + prompt.ids[a:b] + behind for a, b in windows[at : at + ROWS]]
                batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
                likely = model(**batch.to(inner_model(model).device)).logits.float().softmax(-1)[..., KEEP].cpu()
                found += [one[len(before) : len(row) - len(behind)] for row, one in zip(rows, likely, strict=True)]
        return torch.cat(found)


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before a text and behind it."""
    read = tokenizer("a", return_special_tokens_mask=True)
    ids, special = read["input_ids"], read["special_tokens_mask"]
    first, last = special.index(0), len(special) - special[::-1].index(0)
    return ids[:first], ids[last:]


def windows_of(units: Sequence[int], room: int) -> list[tuple[int, int]]:
    """Where to cut N tokens into windows of at most ``room``: between words, and within words that are longer."""
    windows, start = [], 0
    while len(units) - start > room:
        end = start + room
        cut = next((i for i in range(end, start, -1) if units[i] != units[i - 1]), end)
        windows.append((start, cut))
        start = cut
    return [*windows, (start, len(units))]


# --- what a classifier learns from ------------------------------------------------------------------------------------
def likelihood_labels(
    texts: Iterable[str],
    tokenizer: Any,
    teacher: PreTrainedModel,
    teacher_tokenizer: Any,
    *,
    keep: float = 0.5,
    window: int = 512,
) -> list[dict[str, list[int]]]:
    """Label the words of texts by how little a decoder foresees them: what cannot be guessed has to stay.

    A word is worth the negative log likelihood that the decoder gives it, for each token that it costs. The most worth
    ``keep`` of the tokens of a window get label 1, the others 0, and special tokens -100: rows for
    ``transformers.Trainer`` or ``PruningTrainer`` with ``DataCollatorForTokenClassification``.

    Args:
        tokenizer: of the classifier; a fast one.
        teacher, teacher_tokenizer: a decoder, which is left as it was, and its fast tokenizer.
        window: tokens of a row, special ones included.

    Raises:
        ValueError: ``teacher`` is no decoder, a tokenizer that does not say where its tokens stand, or no share.

    Source: the measure is that of Selective Context (Li et al., EMNLP 2023, arXiv 2310.06201).
    """
    if not find_architecture(inner_model(teacher)).causal:
        raise ValueError(f"{type(inner_model(teacher)).__name__} is no decoder, and foresees no words")
    if not 0 < keep < 1:
        raise ValueError(f"keep={keep}: expected a share between 0 and 1")
    if not getattr(teacher_tokenizer, "is_fast", False):
        raise ValueError("teacher_tokenizer: expected the decoder's fast one, which says where its tokens stand")
    before, behind = around(tokenizer)
    if (room := window - len(before) - len(behind)) < 1:
        raise ValueError(
            f"window={window} has no room beside {window - room} special tokens: give {window - room + 1} or more"
        )
    rows = []
    for text in texts:
        read = read_text(text, tokenizer, True, False)
        ends = [*itertools.accumulate(map(len, read.parts))]
        for a, b in windows_of(read.units, room) if read.ids else ():
            first, last = read.units[a], read.units[b - 1]
            begin = ends[first - 1] if first else 0
            within = [end - begin for end in ends[first : last + 1]]
            worth = worths(text[begin : ends[last]], within, teacher, teacher_tokenizer)
            of = torch.tensor(read.units[a:b]) - first
            sizes = of.bincount(minlength=len(worth))
            density = worth / sizes.clamp(min=1)
            stays = fitting(density, sizes, torch.zeros(len(sizes), dtype=torch.bool), int(keep * (b - a)))[of].long()
            labels = [*[-100] * len(before), *stays.tolist(), *[-100] * len(behind)]
            rows.append({"input_ids": [*before, *read.ids[a:b], *behind], "labels": labels})
    return rows


@torch.no_grad()
def worths(text: str, ends: Sequence[int], teacher: PreTrainedModel, tokenizer: Any) -> Tensor:
    """(U,) negative log likelihoods (nats) that a decoder gives the words of a text, which end at ``ends``; the first
    token, before which nothing stands, has the mean of the others."""
    read = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    ids, opening = torch.tensor([read["input_ids"]]), getattr(tokenizer, "bos_token_id", None)
    spans = torch.tensor([end for _, end in read["offset_mapping"]])
    if opening is not None:
        ids = torch.cat([ids.new_tensor([[opening]]), ids], 1)
    inner = inner_model(teacher)
    with at_rest(teacher), nullcontext() if pruner_of(inner) is None else dense(inner):
        logits = teacher(input_ids=ids.to(inner.device), use_cache=False).logits[0, :-1].float()
    found = F.cross_entropy(logits, ids[0, 1:].to(logits.device), reduction="none").cpu()
    if opening is None:
        found = torch.cat([found.mean()[None] if len(found) else torch.zeros(1), found])
    of = torch.searchsorted(torch.tensor(ends), spans.clamp(max=ends[-1]))
    return torch.zeros(len(ends)).index_add(0, of, found)
