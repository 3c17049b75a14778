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
