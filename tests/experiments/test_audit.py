"""The audit finds the slice that pruning hurts, counts what it says it counts, and tells what it cannot use."""

from __future__ import annotations

import csv
import json
import random
import re
from html import unescape
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification, BertConfig, BertForQuestionAnswering
from typer.testing import CliRunner

from support.families import FAMILIES, NO_DROPOUT, TEXT
from support.files import write
from support.questions import questions
from support.tiny import save_tiny, tiny_tokenizer
from support.toy import FILLERS, OPTIONS, make_toy
from thresher import FirstK, TopK, prune
from thresher.cli import app as cli
from thresher.data.task import DataError
from thresher.experiments import train as jobs
from thresher.experiments.audit import LEVEL, SMALLEST, audit, groups, quarters, worst
from thresher.reports import audit_page as findings
from thresher.stats.paired import excess_tests, holm, paired_test

KEPT = 5  # tokens that FirstK keeps: of a text with the class token, four words


def fields(count: int, seed: int = 3) -> list[dict]:
    """Texts of 8 to 16 words; ``place`` tells whether the word that is the class is among the first four."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        words, label = draw.choices(FILLERS, k=draw.randint(7, 15)), ("chaff", "wheat")[i % 2]
        late = i % 4 > 1
        words.insert(draw.randint(7, len(words)) if late else draw.randint(0, 3), label)
        rows.append({"text": " ".join(words), "label": label, "place": "late" if late else "early"})
        rows[-1] |= {
            "weight": round(draw.uniform(1, 90), 2),
            "year": 2000 + i % 3,
            "source": ("", "farm", "mill")[i % 3],
        }
        rows[-1] |= {"id": f"n{i}", "one": "same", "few": "rare" if i < 4 else f"often {i % 2}", "none": ""}
    return rows


@pytest.fixture(scope="module")
def farm(tmp_path_factory) -> SimpleNamespace:
    """A model that has learned to find the word, pruned to the first few tokens; its data, with columns of groups."""
    folder = tmp_path_factory.mktemp("farm")
    toy = make_toy(folder)
    options = {name: value for name, value in OPTIONS.items() if name not in ("target_flops", "prune_epochs")}
    jobs.train(toy.model, toy.data, str(folder / "dense"), **options | {"method": "dense", "prune_epochs": 0})
    model = AutoModelForSequenceClassification.from_pretrained(folder / "dense").eval()
    prune(model, FirstK(keep=KEPT, at=(0,))).save_pretrained(folder / "pruned")
    tiny_tokenizer().save_pretrained(folder / "pruned")
    table = write(folder / "fields" / "test.csv", fields(160))
    return SimpleNamespace(
        folder=folder, dense=str(folder / "dense"), model=str(folder / "pruned"), data=str(table), rows=fields(160)
    )


@pytest.fixture(scope="module")
def rows(farm) -> list[dict]:
    return audit(farm.model, farm.data, against=farm.dense, by=("place", "weight", "year"))


def run(*arguments: object):
    return CliRunner().invoke(cli.app, ["audit", *map(str, arguments)])


def fails(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2 and not result.stdout, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in result.stderr
    return line


def slices(rows: list[dict], by: str) -> dict[str, dict]:
    return {row["slice"]: row for row in rows if row["by"] == by}


# --- what it finds ---------------------------------------------------------------------------------------------------
def test_the_slice_that_pruning_hurts_is_named(farm, rows):
    late, early = (slices(rows, "place")[name] for name in ("late", "early"))
    assert early["dense"] > 90 and late["dense"] > 90 and early["pruned"] > 85
    assert late["drop"] > 15 and late["worse"] and late["p_holm"] < 0.001 and late["interval"][0] > 8
    assert not early["worse"] and late in worst(rows)[:2]
    said = " ".join(findings.verdict(rows))
    told = rf"significantly more than the other examples \(Holm, 5%\): .*place late \(drop {late['drop']:.1f}, "
    assert re.search(told, said)
    for case in late["examples"]:
        line, tokens = farm.rows[case["row"]], case["trace"]["tokens"]
        assert case["trace"]["texts"] == (line["text"],) and line["place"] == "late"
        assert case["label"] == case["dense"] == line["label"] != case["pruned"]
        assert [token["layer"] for token in tokens] == [None] * KEPT + [0] * (len(tokens) - KEPT)
        assert [token["layer"] for token in tokens if token["text"] == line["label"]] == [0]
    assert len(late["examples"]) == 2 and sum(bool(row["examples"]) for row in rows) <= 3


def test_a_model_that_loses_nothing_is_told_what_could_have_been_found(farm, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(farm.dense).eval()
    prune(model, TopK(keep=1.0)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    rows = audit(str(tmp_path), farm.data, against=farm.dense, by=("place",))
    assert all(row["drop"] == row["lost"] == row["gained"] == 0 and row["p"] == 1 for row in rows)
    assert all(not row["worse"] and row["p_more"] == 1 and not row["examples"] for row in rows[1:])
    assert all(row["interval"][0] < 0 < row["interval"][1] and row["tokens"] == 1 for row in rows)
    said = findings.verdict(rows)
    assert "stays the same" in said[0] and "No slice of 8 loses significantly more" in said[1]
    least = min(row["detectable"] for row in rows[1:])
    assert f"between {least:.1f} points" in said[1]
    # what it says it would have found: so many examples of that slice alone
    row = min(rows[1:], key=lambda row: row["detectable"])
    change = np.zeros(rows[0]["n"])
    change[: round(row["detectable"] * row["n"] / 100)] = 100
    member = np.arange(len(change)) < row["n"]
    assert excess_tests(change, member[None], 100.0)[0] <= LEVEL / 8
    change[round(row["detectable"] * row["n"] / 100) - 1] = 0
    assert excess_tests(change, member[None], 100.0)[0] > LEVEL / 8


def test_the_figures_are_those_of_the_models(farm, rows):
    """Counted again, one text at a time, by the models alone."""
    tokenizer = tiny_tokenizer()
    nets = [AutoModelForSequenceClassification.from_pretrained(folder).eval() for folder in (farm.dense, farm.model)]
    prune(nets[1])
    right, costs = [], []
    for line in farm.rows:
        batch = tokenizer(line["text"], return_tensors="pt")
        with torch.no_grad():
            said = [net(**batch).logits.argmax().item() for net in nets]
        right.append([net.config.id2label[i] == line["label"] for net, i in zip(nets, said, strict=True)])
        report = nets[1].token_pruner.report
        sums = [sum(layer[name] for layer in report) for name in ("macs", "dense_macs")]
        costs.append([report[0]["tokens_in"], report[-1]["tokens_kept"], *sums])
    right, costs = np.array(right), np.array(costs, float)
    for row in rows:
        if row["by"] == "input length":
            low, high = map(int, row["slice"].split("–"))
            member = (costs[:, 0] >= low) & (costs[:, 0] <= high)
        elif row["by"] == "weight":
            low, high = map(float, row["slice"].split("–"))
            member = np.array([low <= line["weight"] <= high for line in farm.rows])
        else:
            name = {"class": "label", "place": "place", "year": "year"}.get(row["by"])
            member = np.array([row["by"] == "all" or str(line[name]) == row["slice"] for line in farm.rows])
        lost, gained = (right[member] == (1, 0)).all(1).sum(), (right[member] == (0, 1)).all(1).sum()
        assert (row["n"], row["lost"], row["gained"]) == (member.sum(), lost, gained)
        assert row["dense"] == pytest.approx(100 * right[member, 0].mean())
        assert row["drop"] == pytest.approx(100 * (lost - gained) / member.sum())
        assert row["interval"][0] < row["drop"] < row["interval"][1]
        assert row["p"] == paired_test(100.0 * (right[member, 0].astype(int) - right[member, 1]))
        sums = costs[member].sum(0)
        assert (row["length"], row["tokens"]) == pytest.approx((sums[0] / member.sum(), sums[1] / sums[0]))
        assert row["macs"] == pytest.approx(sums[2] / sums[3])
    for name in ("p", "p_more"):
        assert [row[f"{name}_holm"] for row in rows[1:]] == pytest.approx(holm([row[name] for row in rows[1:]]))


def test_the_rows_are_in_order_and_go_into_json(farm, rows):
    cuts = dict.fromkeys(row["by"] for row in rows)
    assert [*cuts] == ["all", "input length", "class", "place", "weight", "year"]
    for by, names in (("class", ["chaff", "wheat"]), ("place", ["early", "late"]), ("year", ["2000", "2001", "2002"])):
        assert [*slices(rows, by)] == names
    for by, ends in (("input length", int), ("weight", float)):
        edges = [tuple(map(ends, name.split("–"))) for name in slices(rows, by)]
        assert len(edges) == 4 and edges == sorted(edges)
        assert all(high < low for (_, high), (low, _) in pairwise(edges))
    assert sum(row["n"] for row in slices(rows, "weight").values()) == rows[0]["n"] == 160
    assert rows[0]["metric"] == "accuracy" and rows[0]["metric_pruned"] == pytest.approx(rows[0]["pruned"])
    again = json.loads(json.dumps(rows, allow_nan=False))
    assert findings.html(again) == findings.html(rows) and findings.verdict(again) == findings.verdict(rows)


def printed(rows: list[dict], width: int = 200) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(findings.table(rows, width))
    return captured.get()


# --- how it is shown -------------------------------------------------------------------------------------------------
def test_the_table_and_the_page(rows, tmp_path):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(findings.table(rows, 200))
    shown = console.export_text()
    assert (
        "*place: late" in shown
        and "class: chaff" in shown
        and shown.count("*") <= 1 + sum(bool(row["worse"]) for row in rows)
    )
    for width in (60, 80, 100, 120, 160):
        narrow = printed(rows, width)
        assert max(len(line.rstrip()) for line in narrow.splitlines()) <= width and "…" not in narrow
        assert "late" in narrow and "drop" in narrow and "p more" in narrow.replace("\n", " ").replace("  ", " ")
    page = findings.html(rows, tmp_path / "new" / "audit.html")
    assert (tmp_path / "new" / "audit.html").read_text(encoding="utf-8") == page
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["audit.html"]
    assert not re.search(r"https?://|\bsrc=|<link|@import|url\(", page)
    assert page.count("dense says ") == page.count("<article>") == sum(len(row["examples"]) for row in rows) > 0
    worse = sum(bool(row["worse"]) for row in rows)
    assert page.count("<svg") == len(rows) and page.count('<tr class="worse">') == worse > 0
    assert all(sentence in unescape(page) for sentence in findings.verdict(rows))
    bare = findings.html([row | {"examples": []} for row in rows])
    assert "<article>" not in bare and 'type="range"' not in bare


def test_values_of_the_data_are_escaped(rows):
    odd = [row | {"slice": "[red]<b>x</b>"} if row["by"] == "place" else row for row in rows]
    assert "<b>x" not in findings.html(odd)
    assert "[red]<b>x</b>" in printed(odd)


@pytest.mark.filterwarnings("default")  # which the command tells
def test_the_command_writes_what_it_shows(farm, tmp_path):
    page, file = tmp_path / "audit.html", tmp_path / "audit.json"
    given = (farm.model, "--data", farm.data, "--against", farm.dense, "--by", "place, source", "--max-length", "32")
    result = run(*given, "--html", page, "--json", file)
    assert result.exit_code == 0, result.output
    assert (
        "place: late" in result.stdout and "significantly more" in result.stdout and "tokens survive" in result.stdout
    )
    assert "note: source: 54 of 160 rows have no value and are in no slice" in result.stderr
    assert "significantly more" in page.read_text(encoding="utf-8")
    written = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert written[0]["by"] == "all" and {row["by"] for row in written} >= {"place", "class"}
    quiet = run(*given[:-4], "--by", "place", "--json", "-", "--examples", 0, "--quiet", "--limit", 60)
    shown = json.loads(quiet.stdout)["rows"]
    assert not quiet.stderr and shown[0]["n"] == 60 and not any(row["examples"] for row in shown)


# --- what it is compared with ----------------------------------------------------------------------------------------
def test_the_dense_model_is_against_the_folder_or_the_model_itself(farm, tmp_path):
    options = {"examples": 0, "limit": 80}
    own = audit(farm.model, farm.data, **options)
    assert own[0]["against"] is None and "trained with pruning" in " ".join(findings.verdict(own))
    beside = tmp_path / "pruned"
    for source, place in ((farm.model, beside), (farm.dense, beside / "dense")):
        place.mkdir()
        for file in Path(source).glob("*.*"):
            (place / file.name).write_bytes(file.read_bytes())
    found = audit(str(beside), farm.data, **options)
    assert found[0]["against"] == "dense"
    named = audit(farm.model, farm.data, against=farm.dense, **options)
    assert [row["dense"] for row in found] == [row["dense"] for row in named] == [row["dense"] for row in own]


def test_models_that_do_not_pair(farm, tmp_path):
    given = ("--data", farm.data, "--limit", 20)
    assert "is not pruned: there is nothing to audit" in fails(farm.dense, *given)
    assert "is pruned: expected the dense model" in fails(farm.model, *given, "--against", farm.model)
    three = save_tiny(tmp_path / "three")
    assert "3 outputs, expected one like the BertForSequenceClassification with 2" in fails(
        farm.model, *given, "--against", three
    )
    other = AutoModelForSequenceClassification.from_pretrained(farm.dense)
    other.config.id2label = {0: "wheat", 1: "chaff"}
    other.save_pretrained(tmp_path / "turned")
    tiny_tokenizer().save_pretrained(tmp_path / "turned")
    assert "has the labels wheat, chaff, the pruned model chaff, wheat" in fails(
        farm.model, *given, "--against", tmp_path / "turned"
    )
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["straw"])
    AutoModelForSequenceClassification.from_pretrained(farm.dense).save_pretrained(tmp_path / "words")
    tokenizer.save_pretrained(tmp_path / "words")
    assert "another vocabulary" in fails(farm.model, *given, "--against", tmp_path / "words")
    assert "BertForQuestionAnswering" in fails(farm.model, *given, "--against", reader(tmp_path / "reader"))


# --- data that cannot be used ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("nowhere", "no column 'nowhere': its columns are text, label, place"),
        ("one", "column 'one' has only the value 'same'"),
        ("none", "column 'none' has no value"),
        ("id", "column 'id' has 160 values in 160 examples, expected 50 at most"),
        ("label", "'label' is the text or the label: name another column"),
        ("text", "'text' is the text or the label"),
    ],
)
def test_columns_that_cannot_be_used(farm, column, expected):
    assert expected in fails(farm.model, "--data", farm.data, "--by", column)


@pytest.mark.parametrize("labels", [None, "", -1])
def test_data_without_labels(farm, tmp_path, labels):
    lines = [{"text": line["text"]} | ({} if labels is None else {"label": labels}) for line in fields(30)]
    assert "label" in fails(farm.model, "--data", write(tmp_path / "test.csv", lines))


def test_small_groups_and_empty_values_are_counted(farm):
    with pytest.warns(UserWarning) as noted:
        rows = audit(farm.model, farm.data, by=("few", "place"), limit=100, examples=0)
    rare = sum(i < 4 for i in np.random.default_rng(0).permutation(160)[:100])
    assert 0 < rare < SMALLEST and [*slices(rows, "few")] == ["often 0", "often 1"]
    expected = f"few: {rare} of 100 rows are in groups of less than 10 and are in no slice (rare)"
    assert expected in [str(warning.message) for warning in noted]


def test_groups_of_values():
    assert groups(["a", " a ", None, "", "b"], "x") == ["a", "a", None, None, "b"]
    assert groups([True, False, None], "x") == ["True", "False", None]
    assert groups([2020, 2021, float("nan")], "x") == ["2020", "2021", None]
    found = groups([*map(float, range(40)), float("nan"), float("inf")], "x")
    assert found[:40:13] == ["0–9", "10–19", "20–29", "30–39"] and found[40:] == [None, None]
    assert quarters(np.array([5, 5, 5, 5, 5, 5, 5, 9])) == ["5"] * 7 + ["9"]
    with pytest.raises(DataError, match="51 values"):
        groups([f"v{i}" for i in range(51)], "x")


# --- other tasks -----------------------------------------------------------------------------------------------------
def test_regression_loses_absolute_error(tmp_path):
    draw = random.Random(0)
    lines = [
        {"text": " ".join(draw.choices(FILLERS, k=draw.randint(2, 12))), "score": draw.gauss(0, 1), "side": "ab"[i % 2]}
        for i in range(60)
    ]
    data = write(tmp_path / "test.csv", lines)
    model = save_tiny(tmp_path / "model", TopK(keep=0.4), num_labels=1)
    rows = audit(str(model), str(data), by=("side",))
    net, tokenizer, found = FAMILIES["bert"].build(num_labels=1), tiny_tokenizer(), []
    for turn in range(2):
        net = prune(net, TopK(keep=0.4)) if turn else net
        with torch.no_grad():
            values = [net(**tokenizer(line["text"], return_tensors="pt")).logits.item() for line in lines]
        found.append(np.abs(np.array(values) - [line["score"] for line in lines]))
    whole = rows[0]
    assert (whole["dense"], whole["pruned"]) == pytest.approx((found[0].mean(), found[1].mean()), abs=1e-4)
    assert whole["drop"] == pytest.approx((found[1] - found[0]).mean(), abs=1e-4)
    assert whole["interval"][0] < whole["drop"] < whole["interval"][1] and whole["score"] == "absolute error"
    assert {row["by"] for row in rows} == {"all", "input length", "side"} and all(row["detectable"] for row in rows[1:])
    said = findings.verdict(rows)[0]
    assert f"absolute error {'rises' if whole['drop'] > 0 else 'falls'} by" in said and "points" not in said
    assert float(worst(rows)[0]["examples"][0]["label"]) in [line["score"] for line in lines]


def reader(folder: Path, method=None) -> Path:
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(**TEXT | NO_DROPOUT | {"initializer_range": 0.4})).eval()
    (prune(model, method) if method else model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_question_answering_loses_f1(tmp_path):
    lines = questions(240)
    for i, line in enumerate(lines):
        line["source"] = f"press {i % 3}"
    data = write(tmp_path / "validation.json", lines)
    rows = audit(str(reader(tmp_path / "model", TopK(keep=0.3))), str(tmp_path), by=("source",), max_length=40)
    assert data.exists() and rows[0]["score"] == "F1 of the answer" and rows[0]["metric"] == "qa_f1"
    assert rows[0]["dense"] == pytest.approx(rows[0]["metric_dense"])
    assert rows[0]["pruned"] == pytest.approx(rows[0]["metric_pruned"])
    assert rows[0]["drop"] == pytest.approx(rows[0]["dense"] - rows[0]["pruned"])
    assert rows[0]["n"] == sum(row["n"] for row in slices(rows, "input length").values())
    assert {row["by"] for row in rows} <= {"all", "input length", "source"} and rows[0]["macs"] < 1


def test_a_head_that_is_no_match_is_refused(tmp_path):
    with open(tmp_path / "test.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerows([("text", "score"), *((f"the wheat {chr(97 + i)}", i / 7) for i in range(20))])
    model = save_tiny(tmp_path / "model", TopK(keep=0.4))
    with pytest.raises(ValueError, match="3 logits"):
        audit(str(model), str(tmp_path / "test.csv"))
