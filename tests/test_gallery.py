"""The examples run, in small, and what they print is true of what they did."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here_or_elsewhere():
    """By name: in this file, in another test, or by the Makefile."""
    places = [*Path(__file__).parent.rglob("test_*.py"), EXAMPLES.parent / "Makefile"]
    text = "\n".join(place.read_text(encoding="utf-8") for place in places)
    known = [path.stem for path in EXAMPLES.glob("*.py")]
    assert len(known) >= 7
    assert [stem for stem in known if f'example("{stem}")' not in text and f"{stem}.py" not in text] == []


@pytest.mark.slow  # a training on real text
@pytest.mark.filterwarnings("default")
def test_classify(tmp_path):
    row = example("classify").main(tmp_path, rows=160, length=48)
    assert row["quality"] > 60 and row["flops_ratio"] > 2 and "data-step" in (tmp_path / "tokens.html").read_text()


def test_embed(capsys):
    found = example("embed").main(articles=12)
    assert found["merged"] >= 0.8 and 0.9 < found["cosine"] < 1 and found["macs"] < 0.7
    assert "own article first" in capsys.readouterr().out


def test_long_prompt(capsys):
    held = example("long_prompt").main(prompt=160, new=4)
    assert held["SnapKV"] == pytest.approx(held["whole"] / 4, rel=0.1) and held["StreamingLLM"] < held["SnapKV"]
    assert capsys.readouterr().out.count("4 tokens in") == 3


def test_pictures(tmp_path, capsys):
    found = example("pictures").main(tmp_path, steps=150)
    assert found["dense"] > 0.5 and found["ToMe"] > found["dense"] - 0.15
    assert (tmp_path / "digit.html").stat().st_size > 5000 and "of the MACs" in capsys.readouterr().out


def test_ask_picture(capsys):
    share = example("ask_picture").main()
    assert share["Grid"] < share["DivPrune"] < share["FastV"] < 0.6, (
        "distances cost, and two layers with the whole picture"
    )
    assert capsys.readouterr().out.count("144 of 576 visual tokens") == 2


@pytest.mark.slow  # exports a graph
def test_edge(tmp_path):
    assert example("edge").main(tmp_path / "graph") > 0.999
