"""The registry: one name, one class."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import thresher.methods
from support.families import FAMILIES
from thresher import TopK, prune
from thresher.core.pruner import METHODS, TokenPruner
from thresher.core.tokens import LAYOUTS

README = Path(thresher.methods.__file__).with_name("README.md")
OURS = {name for name, method in METHODS.items() if method.__module__.startswith("thresher.methods.")}
PAPERS = sorted(OURS - {"random", "cut", "firstk", "grid", "pool"})


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


def test_the_example_of_the_readme_is_a_method(registry):
    (code,) = re.findall(r"```python\n(.+?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(code, {"TopK": TopK, "ClassVar": ClassVar})
    bert, answers = FAMILIES["bert"], []
    for layout in LAYOUTS:
        model = prune(bert.build(), registry["class-attention"](keep=0.6), layout=layout)
        with torch.no_grad():
            answers.append(bert.run(model, bert.batch()))
        assert model.token_pruner.record.flops_fraction() < 0.9
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", PAPERS)
def test_each_method_tells_its_paper_and_its_departures(name):
    """The first word is a verb, a year stands in the first sentence, departures are rows of three cells."""
    text = METHODS[name].__doc__
    paper, *_ = text.split("\n\n")
    assert re.match(r"(Keep|Learn|Merge|Fuse|Sample|Skim|Train) ", paper) and re.search(r"\b20\d\d\b", paper)
    table = text[text.index("| paper |") :].partition("\n\n")[0]
    header, ruler, *rows = [line.strip() for line in table.strip().splitlines()]
    assert (header, ruler) == ("| paper | here | why |", "|---|---|---|") and rows
    for row in rows:
        cells = row.strip("|").split(" | ")
        assert len(cells) == 3 and all(cell.strip() for cell in cells), f"crooked: {row}"


@pytest.mark.parametrize("path", sorted(README.parent.glob("*.py")), ids=lambda path: path.stem)
def test_only_rows_of_tables_are_long(path: Path):
    """Ruff leaves long lines of these files alone, since a row of a table cannot be wrapped."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.strip().startswith("| ")]
