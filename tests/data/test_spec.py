from dataclasses import dataclass, fields

import pytest

from support.files import reviews, write
from thresher.data.load import load_task
from thresher.data.spec import DataSpec, option
from thresher.data.task import DataError


def test_a_spec_and_its_fields_give_the_same_task(tmp_path):
    rows = [row | {"title": f"t{i}"} for i, row in enumerate(reviews(40))]
    path = write(tmp_path / "some.csv", rows)
    named, short = (
        load_task(DataSpec(data=path, text="title", limit=7), seed=3),
        load_task(path, text="title", limit=7, seed=3),
    )
    assert named.text_columns == ("title",) and len(named.train) == 7
    assert [part[:] for part in (named.train, named.test)] == [part[:] for part in (short.train, short.test)]
    with pytest.raises(TypeError, match="txt"):
        load_task(path, txt="title")


def test_a_spec_can_be_extended_by_fields_of_a_command():
    @dataclass(frozen=True, kw_only=True)
    class Command(DataSpec):
        seed: int = option("Of the training.", 0, metavar="N")

    spec = Command(data="some.csv", text=["a", "b"], seed=4)
    assert (spec.text, DataSpec(data="some.csv", text="a").text, DataSpec(data="b").text) == (("a", "b"), ("a",), None)
    assert all(field.metadata["help"].endswith(".") and len(field.metadata["help"]) < 80 for field in fields(spec))
    with pytest.raises(DataError, match="limit is 0, expected 1 or more rows"):
        Command(data="some.csv", limit=0)
