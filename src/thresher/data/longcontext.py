"""Long texts with questions about them: pass keys at a depth, keys among others, variables, words, paragraphs.

The tasks are those of RULER (Hsieh et al., 2024, arXiv 2404.06654) at a size that small models can answer, and SQuAD's
questions with other paragraphs around. All texts follow from a seed.
"""

from __future__ import annotations

import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DEPTHS = 10  # at which a pass key stands, from the beginning to the end
COLOURS = ("red", "blue", "green", "yellow", "orange", "purple", "brown", "black", "white", "pink", "grey", "golden")
WORDS = ("river", "stone", "apple", "window", "garden", "bridge", "candle", "mirror", "basket", "ladder", "bottle")
OFTEN, RARE = 3, 8  # times that the common word comes for each time of a rare one; rare words
QUESTION, LEAD = "Question: {} Give a short answer.", "Short answer:"


@dataclass(frozen=True)
class Case:
    """A question about a text.

    Attributes:
        task: where it comes from, one of ``TASKS``.
        lead: how the answer begins, which is given.
        answers: all that are right; the first one is scored.
        exact: whether an answer is right or wrong; else the overlap of its words counts.
        depth: where the answer stands in the text, 0 to 1; None: in several places, or unknown.
    """

    task: str
    question: str
    lead: str
    answers: tuple[str, ...]
    exact: bool = True
    depth: float | None = None


@dataclass(frozen=True)
class Context:
    """A text and the questions about it; ``number`` counts the texts of one kind."""

    number: int
    text: str
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Question:
    """A question about a passage."""

    passage: str
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Book:
    """What texts are made of.

    Attributes:
        passages: to draw from.
        questions: about some of them; may be empty.
        length: the tokens of a text.
    """

    passages: Sequence[str]
    questions: Sequence[Question]
    length: Callable[[str], int]

    def filler(self, rng: np.random.Generator, tokens: int, first: Sequence[str] = ()) -> list[str]:
        """Passages of ``tokens`` altogether at most, in any order, among them the ``first``.

        One that does not fit ends the text; it is cut to the room where less than half is filled.
        """
        chosen = [*first]
        spent = sum(map(self.length, chosen))
        for number in rng.permutation(len(self.passages)):
            passage = self.passages[int(number)]
            if passage in chosen:
                continue
            if spent + (more := self.length(passage)) > tokens:
                if 2 * spent < tokens and (cut := self.cut(passage, tokens - spent)):
                    chosen.append(cut)
                break
            chosen, spent = [*chosen, passage], spent + more
        return [chosen[int(number)] for number in rng.permutation(len(chosen))]

    def cut(self, passage: str, tokens: int) -> str:
        """The beginning of a passage, of so many tokens at most; whole words, where it has spaces between them."""
        fits = bisect_right(range(len(passage)), tokens, key=lambda end: self.length(passage[:end])) - 1
        begun = passage[: max(fits, 0)]
        return begun[: max(0, begun.rfind(" "))] or begun


def book_of(rows: Any, columns: Sequence[str], length: Callable[[str], int]) -> Book:
    """Texts and, where there are SQuAD's columns, questions about them. ``rows``: a part of a task."""
    if {"question", "context", "answers"} <= {*columns, *rows.column_names}:
        answers = [tuple(dict.fromkeys(own["text"])) for own in rows["answers"]]
        known = zip(rows["context"], rows["question"], answers, strict=True)
        questions = [Question(*one) for one in known if one[2]]
        return Book([*dict.fromkeys(rows["context"])], questions, length)
    return Book([*dict.fromkeys(rows[columns[0]])], (), length)


# --- tasks: what is planted into the text, as (depth, sentence), and what is asked ------------------------------------
Planted = list[tuple[float, str]]


def needle(rng: np.random.Generator, number: int, keys: int, digits: int) -> tuple[Planted, Case]:
    """A pass key, once in the text."""
    depth, key = (number % DEPTHS + 0.5) / DEPTHS, str(rng.integers(*_numbers(digits)))
    case = Case("needle", "What is the pass key in the text above?", "The pass key is", (f" {key}",), depth=depth)
    return [(depth, f"The pass key is {key}.")], case


def multikey(rng: np.random.Generator, number: int, keys: int, digits: int) -> tuple[Planted, Case]:
    """Codes of several doors, of which one is asked for."""
    colours = rng.choice(COLOURS, keys, replace=False)
    codes, depths = rng.choice(np.arange(*_numbers(digits)), keys, replace=False), rng.permutation(keys)
    planted = [
        ((float(depth) + 0.5) / keys, f"The code of the {colour} door is {code}.")
        for depth, colour, code in zip(depths, colours, codes, strict=True)
    ]
    asked = f"the code of the {colours[0]} door"
    answers = (f" {codes[0]}",)
    question, lead = f"What is {asked} in the text above?", f"T{asked[1:]} is"
    return planted, Case("multikey", question, lead, answers, depth=planted[0][0])


def tracking(rng: np.random.Generator, number: int, keys: int, digits: int) -> tuple[Planted, Case]:
    """A variable that takes its value from another one, which takes it from a third."""
    value = str(rng.integers(*_numbers(digits)))
    planted = [(1 / 6, f"Set X1 = {value}."), (3 / 6, "Set X2 = X1."), (5 / 6, "Set X3 = X2.")]
    return planted, Case("tracking", "What is the value of X3 in the text above?", "The value of X3 is", (f" {value}",))


def _numbers(digits: int) -> tuple[int, int]:
    """The first number of so many digits, and the one after the last."""
    return 10 ** (digits - 1), 10**digits


TASKS: dict[str, Callable[[np.random.Generator, int, int, int], tuple[Planted, Case]]] = {
    task.__name__: task for task in (needle, multikey, tracking)
}
ALONE = ("words", "squad")  # tasks that plant nothing: a text of its own, and questions that come with passages


def contexts(
    book: Book, tasks: Sequence[str], length: int, count: int, *, seed: int = 0, keys: int = 4, digits: int = 5
) -> Iterator[Context]:
    """Yield ``count`` texts of ``length`` tokens, more or less, each with a question of every task.

    Args:
        tasks: of ``TASKS``; "squad", a question of the book; or "words" alone, the most common one of a list.
        keys: codes in a text of "multikey".
        digits: of a key. Where each of them is a token, what looks at the first one may lose the last ones.

    Raises:
        ValueError: there is no such task, the book has no questions, or words do not stand alone.
    """
    unknown = [task for task in tasks if task not in TASKS and task not in ALONE]
    if unknown or not tasks or ("words" in tasks and len(tasks) > 1):
        what = "words is a text of its own" if not unknown and tasks else f"there is no task {', '.join(unknown)!r}"
        raise ValueError(f"{what}: expected some of {', '.join([*TASKS, 'squad'])}, or words alone")
    if "squad" in tasks and not book.questions:
        raise ValueError("the texts come without questions: squad needs the columns question, context and answers")
    for number in range(count):
        rng = np.random.default_rng([seed, number, zlib.crc32("-".join(tasks).encode())])
        yield (
            common_words(book, rng, length, number)
            if "words" in tasks
            else mixed(book, rng, tasks, length, number, (keys, digits))
        )


def mixed(
    book: Book, rng: np.random.Generator, tasks: Sequence[str], length: int, number: int, sizes: tuple[int, int]
) -> Context:
    """Passages with what the tasks plant into them."""
    planted: Planted = []
    cases: list[Case] = []
    first: list[str] = []
    for task in tasks:
        if task == "squad":
            asked = book.questions[int(rng.integers(len(book.questions)))]
            answers = tuple(f" {answer}" for answer in asked.answers)
            cases.append(Case("squad", QUESTION.format(asked.text), LEAD, answers, exact=False))
            first.append(asked.passage)
        else:
            more, case = TASKS[task](rng, number, *sizes)
            planted, cases = [*planted, *more], [*cases, case]
    room = length - sum(book.length(sentence) for _, sentence in planted)
    return Context(number, plant("\n\n".join(book.filler(rng, room, first)), planted), tuple(cases))


def common_words(book: Book, rng: np.random.Generator, length: int, number: int) -> Context:
    """A list of words, of which one comes more often than any other."""
    often, *rare = rng.choice(WORDS, 1 + RARE, replace=False).tolist()
    times = max(1, length // (2 * (RARE + OFTEN)))  # a word and its comma
    listed = rng.permutation([often] * (OFTEN * times) + rare * times).tolist()
    question = "Which word comes most often in this list?"
    case = Case("words", question, "The most common word is", (f" {often}",))
    return Context(number, "Words: " + ", ".join(listed) + ".", (case,))


def plant(text: str, planted: Planted) -> str:
    """Put sentences between those of a text, each as near as possible to its depth."""
    ends = [0, *(match.end() for match in re.finditer(r"[.!?]\s+", text)), len(text)]
    places = []
    for depth, sentence in planted:
        far = [abs(end - depth * len(text)) for end in ends]
        places.append((ends[far.index(min(far))], sentence))
    for place, sentence in sorted(places, key=lambda known: known[0], reverse=True):
        text = f"{text[:place]}{sentence} {text[place:]}" if place < len(text) else f"{text} {sentence}"
    return text
