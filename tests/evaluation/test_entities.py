"""Entities out of labels, and the agreement of two models on them."""

from __future__ import annotations

import pytest

from thresher.evaluation.entities import Agreement, Entity, agreement, entities, together


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ("O B-A I-A O", [("A", 1, 3)]),
        ("B-A B-A", [("A", 0, 1), ("A", 1, 2)]),
        ("B-A I-B I-B", [("A", 0, 1), ("B", 1, 3)]),
        ("I-A I-A O I-A", [("A", 0, 2), ("A", 3, 4)]),
        ("A A B O", [("A", 0, 2), ("B", 2, 3)]),
        ("B-A-B I-A-B", [("A-B", 0, 2)]),
        ("B-A I-A E-A I-A S-A S-A O E-A", [("A", 0, 3), ("A", 3, 4), ("A", 4, 5), ("A", 5, 6), ("A", 7, 8)]),
        ("B-A L-A U-A B-A U-B I-B", [("A", 0, 2), ("A", 2, 3), ("A", 3, 4), ("B", 4, 5), ("B", 5, 6)]),
        ("O O", []),
        ("", []),
    ],
)
def test_entities(labels, found):
    assert entities(labels.split()) == [Entity(*one) for one in found]


def test_a_token_without_a_label_ends_an_entity():
    assert entities(["B-A", None, "I-A"]) == [Entity("A", 0, 1), Entity("A", 2, 3)]


def test_agreement_is_counted_by_type_and_to_the_token():
    dense, pruned = entities(["B-A", "I-A", "O", "B-B"]), entities(["B-A", "O", "O", "B-B"])
    assert agreement(dense, pruned) == {"A": Agreement(0, 1, 1), "B": Agreement(1, 1, 1)}
    assert together(agreement(dense, pruned).values()).f1 == 0.5
    assert agreement([], dense)["A"].f1 == 0.0
    assert together([]).f1 == 1.0


def test_a_bare_type_is_no_prefix():
    labels = ["E-MAIL", "E-MAIL", "O", "NAME", "S-BAHN"]
    assert entities(labels) == [("E-MAIL", 0, 2), ("NAME", 3, 4), ("S-BAHN", 4, 5)]
    for known in (["O", "E-MAIL", "NAME"], ["O", "E-MAIL"], []):
        assert entities(["E-MAIL", "E-MAIL"], known) == [("E-MAIL", 0, 2)]
    assert entities(["B-E-MAIL", "I-E-MAIL", "S-NAME"]) == [("E-MAIL", 0, 2), ("NAME", 2, 3)]
