"""What the benchmarks say of their rows: every kind in words, and the test of the tested bound itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from thresher.evaluation.rows import row


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def told(kind: str, **fields) -> str:
    """What the tables say of one row of the first entry of a kind."""
    from entries import ENTRIES
    from tables import timings

    entry = next(e for e in ENTRIES if e.kind == kind)
    common = {"quality": 81.25, "quality_dense": 83.5, "interval_low": -0.5, "interval_high": 5.0, "metric": "f1"}
    made = row(**(common | {"flops_ratio": 2.03, "n_examples": 400, "note": "told so"} | fields))
    return "\n".join(timings(entry.task, {entry.name: {"rows": [made]}}))


@pytest.mark.parametrize("kind", ["tune", "audit", "anytime"])
def test_a_drop_is_told_with_its_interval(bench, kind):
    said = told(kind, note="class, 1: p 0.04, p that it loses more 0.35", target_flops=0.45)
    assert "+2.25 [-0.50, +5.00]" in said


def test_an_audit_is_told_slice_by_slice(bench):
    said = told("audit", note="length, 3 to 9: p 0.04, p that it loses more 0.35, detectable from 4.1")
    assert "| length, 3 to 9 | 400 | 83.50 | +2.25 [-0.50, +5.00] | p 0.04, p that it loses more 0.35, " in said


def test_what_is_no_drop_is_told_too(bench):
    assert "* 400 texts, asked 0.02: violated" in told("coverage", note="asked 0.02: violated in 1 % of the draws")
    assert "* torch fp32: told so" in told("soak", runtime="torch", precision="fp32")


def test_every_kind_of_entry_can_be_told(bench):
    from entries import ENTRIES
    from tables import TELLERS

    own = {"train", "vision", "speed", "efficiency", "runtimes", "compression", "synthetic"}  # have their own tables
    assert {e.kind for e in ENTRIES} == own | set(TELLERS)


def test_the_simulation_counts_what_is_beyond_the_limit(bench):
    from tuning import violated

    differs = np.zeros((3, 100), bool)
    differs[1, :2], differs[2, :5] = True, True  # true rates 0, .02 and .05
    assert violated(differs, 0.02, [0, 1, 2, 2]) == 0.0, "at the limit is not beyond it"
    assert violated(differs, 0.02, [0, 1, 2, 3]) == 0.25
    assert violated(differs, 0.01, [0, 1, 2, 3]) == 0.5


def test_the_simulation_finds_a_test_that_is_too_mild(bench):
    """A schedule of true rate 5.1 % must pass a limit of 5 % in at most 5 % of the draws; a milder test shows."""
    from tuning import passes, violated

    rate, n, draw = 0.051, 500, np.random.default_rng(0)
    differs = np.zeros((1, 10_000), bool)
    differs[0, : int(rate * 10_000)] = True
    passed = passes(differs, 0.05, n, 2000, draw)
    assert 0.01 < violated(differs, 0.05, passed) <= 0.05
    mild = passes(differs, 0.07, n, 500, draw)  # a test of 7 % taken for one of 5 %
    assert violated(differs, 0.05, mild) > 0.3


def test_the_shorter_half_loses_the_long_rows_of_train_alone(bench, tmp_path, monkeypatch):
    import pandas

    import subsets

    monkeypatch.setattr(subsets, "FOLDER", tmp_path / "made")
    (tmp_path / "pairs").mkdir()
    rows = [{"one": "a " * n, "two": "b", "label": float(n)} for n in range(1, 12)]
    for part in ("train", "validation"):
        pandas.DataFrame(rows).to_parquet(tmp_path / "pairs" / f"{part}.parquet")
    made = subsets.shorter_half(tmp_path / "pairs")
    assert made == subsets.shorter_half(tmp_path / "pairs") and made.name == "pairs-shorter"
    assert [*pandas.read_parquet(made / "train.parquet")["label"]] == [1, 2, 3, 4, 5, 6]
    assert len(pandas.read_parquet(made / "validation.parquet")) == 11
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["pairs-shorter"]


def test_some_of_the_test_part_is_drawn_once_and_train_stays_whole(bench, tmp_path, monkeypatch):
    import pandas

    import subsets

    monkeypatch.setattr(subsets, "FOLDER", tmp_path / "made")
    (tmp_path / "imdb").mkdir()
    for part in ("train", "test"):
        pandas.DataFrame({"text": [f"{part} {n}" for n in range(50)]}).to_parquet(tmp_path / "imdb" / f"{part}.parquet")
    made = subsets.some_of_test(tmp_path / "imdb", 10)
    drawn = [*pandas.read_parquet(made / "test.parquet")["text"]]
    assert made.name == "imdb" and len({*drawn}) == 10 and drawn != [f"test {n}" for n in range(10)]
    assert len(pandas.read_parquet(made / "train.parquet")) == 50
    assert made == subsets.some_of_test(tmp_path / "imdb", 10) and made != subsets.some_of_test(tmp_path / "imdb", 5)


def test_our_drops_stand_beside_the_papers(bench):
    from entries import Entry
    from papers import beside

    entries = {method: Entry("mrpc", method, target=0.417) for method in ("ltp", "top", "topk")}
    answers = {"dense": [1] * 90 + [0] * 10, "pruned": [1] * 80 + [0] * 20}
    made = {"rows": [{"metric": "accuracy", "flops_ratio": 2.4}], "labels": [1] * 100, "predictions": answers}
    lines = beside({entry.name: made for entry in entries.values()})
    told = [line.split(" | ") for line in lines if line.startswith("| mrpc")]
    assert [line[1] for line in told] == ["top", "ltp"], "of the others the papers have no figure"
    assert all(line[2:4] == ["1", "2.40"] and line[4].startswith("+10.00 [") and line[5] == "" for line in told)
    assert told[1][6:] == ["2.10", "+0.55", "RoBERTa-base |"]
    assert beside({}) == []


def test_a_drop_is_against_the_dense_model_that_a_row_started_from(bench, tmp_path):
    """Two machines made two dense models of one seed; the pruned model and the extra steps may be of either."""
    from entries import Entry
    from tables import quality_table

    def answered(right: int) -> list[int]:
        return [1] * right + [0] * (100 - right)

    def landed(quality: int, dense: int) -> dict:
        row = {"metric": "accuracy", "quality": float(quality), "flops_ratio": 2.0}
        said = {"dense": answered(dense), "pruned": answered(quality)}
        return {"rows": [row], "labels": [1] * 100, "predictions": said, "reached": {"flops_fraction": 0.5}}

    entries = [Entry("sst2", "dense"), Entry("sst2", "dense-continued"), Entry("sst2", "ltp", target=0.49)]
    entries.append(Entry("sst2", "top", target=0.49))
    made = (landed(90, 90), landed(92, 90), landed(80, 85), landed(81, 90))
    results = {entry.name: result for entry, result in zip(entries, made, strict=True)}
    table = {line.split(" | ")[0]: line.split(" | ")[3:5] for line in quality_table("sst2", entries, results)[2:]}
    assert table["| ltp, 0.49"][0].startswith("+5.00 [") and table["| ltp, 0.49"][1] == "", "not the same dense model"
    assert table["| top, 0.49"][0].startswith("+9.00 [") and table["| top, 0.49"][1].startswith("+11.00 [")
    assert table["| dense-continued"][0].startswith("-2.00 [") and table["| dense"] == ["", ""]


def landed(wrong: int, fewer: float = 2.0) -> dict:
    """A result of 100 texts, of which dense gets ten wrong and the pruned model ``wrong``."""
    row = {"metric": "accuracy", "flops_ratio": fewer, "quality": 100 - wrong, "quality_dense": 90, "tokens_mean": 9}
    answers = {"dense": [1] * 90 + [0] * 10, "pruned": [1] * (100 - wrong) + [0] * wrong}
    return {"rows": [row], "labels": [1] * 100, "predictions": answers}


def test_the_readme_shows_the_smallest_budget_that_most_seeds_have(bench, tmp_path):
    from headline import headline

    found = {f"mrpc/minilm-l6-top-0.417-s{seed}": landed(12 + seed, 2.4) for seed in range(3)}
    found |= {"mrpc/minilm-l6-top-0.25-s0": landed(30, 4.0), "mrpc/minilm-l6-top-0.45-s0": landed(11, 2.2)}
    (line,) = (line for line in headline(tmp_path, found).splitlines() if "MRPC" in line)
    cells = line.split(" | ")
    assert cells[:4] == ["| [pairs of sentences](docs/expect.md)", "9", "MRPC, ToP, 3 seeds", "2.4"]
    assert cells[4].startswith("+3.0 [") and cells[4].endswith("of accuracy")
    assert headline(tmp_path, {}) == "No result has landed yet."


def test_the_readme_has_every_kind_of_reader_and_long_texts_first(bench):
    """Of the results that are there: a row is no number of its own, and none of the known cases is left out."""
    from headline import headline
    from run import RESULTS
    from tables import load

    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    table = text.partition("<!-- results -->")[2].partition("<!-- /results -->")[0]
    assert table.strip() == headline(RESULTS, load(RESULTS)).strip()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| [")]
    assert 12 <= len(rows) <= 16 and {len(row) for row in rows} == {7}
    pages = {row[0].partition("(docs/")[2].rstrip(")") for row in rows}
    assert pages >= {"expect.md", "rerank.md", "long-prompts.md", "vision.md"}
    tokens = [int(row[1]) for row in rows]
    assert tokens == sorted(tokens, reverse=True)
    assert len(text.splitlines()) < 150


def test_the_mean_over_glue_needs_every_task(bench):
    from papers import GLUE, glue_mean

    found = {f"{task}/minilm-l6-top-0.417-s0": landed(12) for task in GLUE}
    assert glue_mean("top", dict(list(found.items())[1:])) == [] == glue_mean("ltp", found)
    told = glue_mean("top", found)[0]
    low, high = map(float, told.partition("[")[2].partition("]")[0].split(", "))
    assert "+2.00" in told and low < 2 < high
    assert high - low < 6, "the mean of four is known better than one"


def test_the_picture_of_losses_shows_every_trained_method(bench, tmp_path):
    pytest.importorskip("matplotlib")
    from pictures import draw_losses, losses, pictures

    assert pictures({"mrpc/minilm-l6-top-0.417-s0": landed(12)}, tmp_path) == [], "one point compares nothing"

    found = {"mrpc/minilm-l6-top-0.417-s0": landed(12), "mrpc/minilm-l6-ltp-0.417-s0": landed(15)}
    found["mrpc/minilm-l6-topk-untrained-0.45-s0"] = landed(40)
    assert {name: points[0][:2] for name, points in losses(found)["mrpc"].items()} == {"top": (2, 2), "ltp": (2, 5)}
    draw_losses(found, tmp_path / "losses.svg")
    drawn = (tmp_path / "losses.svg").read_text()
    assert all(f">{name}<" in drawn for name in ("top", "ltp", "mrpc")) and ">topk<" not in drawn
