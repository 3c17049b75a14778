"""Long texts: what is asked stands in them, where it is said to stand, and follows from the seed."""

from __future__ import annotations

import re

import numpy as np
import pytest
from datasets import Dataset

from thresher.data.longcontext import Book, Question, book_of, contexts, plant

PASSAGES = [f"The {n}th farmer sows. He waits. Then he reaps {n} sheaves." for n in range(40)]
ASKED = Question(PASSAGES[7], "How much does the 7th farmer reap?", ("7 sheaves",))
BOOK = Book(PASSAGES, [ASKED], lambda text: len(text.split()))
TASKS = [("needle",), ("multikey",), ("tracking",), ("squad",), ("needle", "multikey", "squad")]


@pytest.mark.parametrize("tasks", TASKS)
def test_answers_stand_in_texts_of_about_the_length(tasks):
    made = [*contexts(BOOK, tasks, 200, 12, keys=3)]
    assert made == [*contexts(BOOK, tasks, 200, 12, keys=3)]
    assert made != [*contexts(BOOK, tasks, 200, 12, keys=3, seed=1)]
    for context in made:
        assert 150 <= BOOK.length(context.text) <= 200
        assert [case.task for case in context.cases] == [*tasks]
        for case in context.cases:
            assert case.answers[0].strip() in context.text
            assert case.answers[0].startswith(" ")
    assert len({context.text for context in made}) == 12


@pytest.mark.parametrize("space", [" ", ""])
def test_a_passage_that_does_not_fit_is_cut_to_the_room(space):
    long = space.join(f"word{n}" for n in range(500))
    book = Book([long], (), lambda text: len(re.findall(r"[a-z]+|\d", text)))
    (context,) = contexts(book, ["needle"], 100, 1)
    assert 95 <= book.length(context.text) <= 100
    assert context.cases[0].answers[0].strip() in context.text
    (piece,) = book.filler(np.random.default_rng(0), 20)
    assert long.startswith(piece) and not piece.endswith(" ") and (not space or long[len(piece)] == " ")


def test_a_text_that_is_half_full_is_left_as_it_is():
    book = Book(["a b c d e f", "g h i j k l"], (), lambda text: len(text.split()))
    assert sorted(map(len, (book.filler(np.random.default_rng(n), 11) for n in range(8)))) == [1] * 8
    assert {len(" ".join(book.filler(np.random.default_rng(n), 13)).split()) for n in range(8)} == {12}


def test_needles_stand_at_their_depth():
    for context in contexts(BOOK, ["needle"], 300, 10):
        (case,) = context.cases
        place = context.text.index("The pass key") / len(context.text)
        assert case.depth == (context.number + 0.5) / 10
        assert abs(place - case.depth) < 0.05


def test_keys_differ_and_one_is_asked_for():
    for context in contexts(BOOK, ["multikey"], 300, 10, keys=4):
        codes = dict(re.findall(r"The code of the (\w+) door is (\d+)\.", context.text))
        assert len(codes) == 4 == len({*codes.values()})
        colour = re.search(r"of the (\w+) door", context.cases[0].question)[1]
        assert context.cases[0].answers == (f" {codes[colour]}",)


def test_the_common_word_is_the_most_common_one():
    for context in contexts(BOOK, ["words"], 200, 5):
        words = re.findall(r"\w+", context.text)[1:]
        often = context.cases[0].answers[0].strip()
        assert words.count(often) == 3 * max(words.count(word) for word in {*words} - {often})


def test_sentences_are_planted_between_others():
    assert plant("One. Two. Three.", [(0.0, "A."), (0.5, "B."), (1.0, "C.")]) == "A. One. Two. B. Three. C."


def test_books_have_the_questions_of_their_rows():
    rows = Dataset.from_dict(
        {
            "question": ["Who?", "Why?"],
            "context": ["A farmer.", "A farmer."],
            "answers": [{"text": ["A farmer", "farmer", "farmer"]}, {"text": []}],
        }
    )
    book = book_of(rows, ("question", "context"), len)
    assert book.passages == ["A farmer."]
    assert book.questions == [Question("A farmer.", "Who?", ("A farmer", "farmer"))]
    plain = book_of(Dataset.from_dict({"text": ["A farmer.", "A farmer.", "Grain."]}), ("text",), len)
    assert (plain.passages, plain.questions) == (["A farmer.", "Grain."], ())


@pytest.mark.parametrize(
    ("tasks", "said"),
    [(["haystack"], "no task 'haystack'"), ([], "expected some"), (["words", "needle"], "of its own")],
)
def test_unknown_tasks_are_refused(tasks, said):
    with pytest.raises(ValueError, match=said):
        next(contexts(BOOK, tasks, 100, 1))


def test_questions_need_a_book_that_has_some():
    with pytest.raises(ValueError, match="without questions"):
        next(contexts(Book(PASSAGES, (), len), ["squad"], 100, 1))
