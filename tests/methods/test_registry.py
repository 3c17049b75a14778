"""The registry: one name, one class."""

from __future__ import annotations

import pytest

from thresher import TopK
from thresher.core.pruner import METHODS, TokenPruner


@pytest.fixture(autouse=True)
def registry():
    """The registry, which is afterwards as it was."""
    known = dict(METHODS)
    yield METHODS
    METHODS.clear()
    METHODS.update(known)


def test_a_subclass_without_a_name_does_not_take_its_parents_place(registry):
    class Mine(TopK):
        pass

    assert registry["topk"] is TopK and Mine not in registry.values()
    assert type(TokenPruner.from_dict(TopK(keep=0.4).to_dict())) is TopK


def test_a_subclass_with_a_name_has_its_own_place(registry):
    class Mine(TopK):
        name = "mine"

    assert registry["topk"] is TopK and registry["mine"] is Mine
    assert type(TokenPruner.from_dict(Mine(keep=0.4).to_dict())) is Mine


def test_a_second_class_of_one_name_is_refused(registry):
    with pytest.raises(ValueError, match=r"the name 'topk' belongs to thresher\.methods\.topk\.TopK: choose another"):

        class Mine(TopK):
            name = "topk"

    assert registry["topk"] is TopK


def test_a_cell_that_runs_again_replaces_its_class(registry):
    def cell(keep: float) -> type[TopK]:
        class Mine(TopK):
            name = "mine"

        Mine.start = keep
        return Mine

    first, second = cell(0.4), cell(0.5)
    assert first is not second and registry["mine"] is second
