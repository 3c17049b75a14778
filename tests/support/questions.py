"""Questions whose answers are known."""

from __future__ import annotations

import random

from support.toy import FILLERS

ANSWERS = ("wheat", "chaff")


def questions(count: int, seed: int = 0, words: int = 12) -> list[dict]:
    """Paragraphs with one of the two answers somewhere; the title changes every four."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        text = draw.choices(FILLERS, k=draw.randint(4, words))
        text.insert(draw.randint(0, len(text)), ANSWERS[i % 2])
        context = " ".join(text)
        start = context.index(ANSWERS[i % 2])
        answers = {"text": [ANSWERS[i % 2]], "answer_start": [start]}
        rows.append({"title": f"t{i // 4}", "question": "the grain", "context": context, "answers": answers})
    return rows


def fields(count: int) -> list[dict]:
    """So many questions in SQuAD's columns, each of a passage of its own."""
    return [
        {
            "question": f"Who sows field {n}?",
            "context": f"The {n}th farmer sows field {n}. Then the grain grows, and the wheat is reaped by all.",
            "answers": {"text": [f"The {n}th farmer"], "answer_start": [0]},
            "title": f"field {n}",
        }
        for n in range(count)
    ]
