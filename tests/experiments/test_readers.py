"""Language models that read pictures: what commands show, time and tune of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from support.families import FAMILIES
from support.visual import draw, save_reader
from thresher import DivPrune, FastV, SnapKV, prune
from thresher.api import unprune
from thresher.cli import app as cli
from thresher.core.method import pruner_of
from thresher.data.pictures import asked, load_reader, read_picture, reads_pictures
from thresher.evaluation.asking import answer, told
from thresher.experiments.readers import TUNED, reader
from thresher.reports.patches import GAP, LINE, SIDE

WHERE, WHAT = "w20 w31 w8 w12", "w9 w41 w77"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readers")
    save_reader(folder / "dense")
    save_reader(folder / "pruned", DivPrune(keep=9))
    draw(folder / "field.png")
    return folder


def run(*arguments: object):
    return CliRunner().invoke(cli.app, [*map(str, arguments)])


def rows(*arguments: object) -> list[dict]:
    result = run(*arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["rows"]


def fails(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2 and not result.stdout, result.output
    (line,) = result.stderr.splitlines()
    return line


def test_what_is_left_is_shown_for_each_question(place, tmp_path):
    """The same tokens that the model's own forward keeps, and the answers that it gives."""
    ask = ("--image", place / "field.png", "--ask", WHERE, "--ask", WHAT, "--new", 4)
    page, drawn = tmp_path / "page.html", tmp_path / "page.png"
    found = rows("show", place / "dense", *ask, "--method", "fastv", "--keep", 0.25, "--html", page, "--png", drawn)
    net, processor = load_reader(str(place / "dense"))
    kept = []
    for question, one in zip((WHERE, WHAT), found, strict=True):
        inputs = asked(processor, read_picture(place / "field.png"), question)
        say = lambda: processor.decode(answer(net, inputs, 4), skip_special_tokens=True).strip()  # noqa: B023, E731
        assert one["dense_answer"] == say()
        prune(net, FastV(keep=0.25))
        assert one["answer"] == say()
        with torch.no_grad():
            net(**inputs, use_cache=False)
        (site,) = net.token_pruner.record.sites
        unprune(net)
        stays = site.keep[0, site.pictures[0] == 0].tolist()
        (part,) = one["pictures"]
        assert (part["rows"], part["columns"]) == (6, 6) and part["left"] == {"1": 9}
        assert [patch["layer"] is None for patch in part["patches"]] == stays
        kept.append(stays)
    assert kept[0] != kept[1], "the text has a say"
    text = page.read_text(encoding="utf-8")
    assert WHERE in text and found[1]["answer"] in text and text.count('class="picture"') == 2
    side = SIDE // 6 * 6
    with Image.open(drawn) as written:
        assert written.size == (2 * (side + GAP) + GAP, 2 * (3 * LINE + GAP + side + LINE + 2 * GAP))


def test_the_folder_may_say_what_leaves(place):
    image = ("--image", place / "field.png")
    (found,) = rows("show", place / "pruned", *image, "--ask", WHERE, "--new", 2)
    assert found["method"] == "divprune" and found["report"]["kept"] == [[9]]
    result = run("show", place / "pruned", *image, "--ask", WHERE, "--new", 2)
    assert "before layer 0:    9 left" in result.stdout and "9 of 36 tokens of the picture are left" in result.stdout


def test_a_question_is_timed(place):
    found = rows("bench", place / "dense", "--method", "divprune,fastv,visionzip", "--keep", 9, "--repeats", 1)
    assert [row["method"] for row in found] == ["dense", "divprune", "fastv", "visionzip"]
    for row in found:
        assert min(row[name] for name in ("tower_ms", "prefill_ms", "latency_ms_p50")) > 0
        layers = {"dense": [36], "fastv": [36, 36, 9, 9]}.get(row["method"], [9] * 4)
        assert row["visual"] == layers and row["visual_mean"] == sum(layers) / len(layers)
        text, entry = row["context"] - 36, 2 * 2 * 8 * 4  # keys and values of two heads of 8 in fp32
        assert row["cache_mb"] == pytest.approx(entry * sum(n + text for n in (layers * 4)[:4]) / 1e6)
        assert row["flops_ratio"] > 1 or row["method"] == "dense"
        assert "% of the dense model's time" in row["note"]
    result = run(
        "bench", place / "dense", "--method", "fastv", "--keep", 9, "--image", place / "field.png", "--ask", WHAT
    )
    assert result.exit_code == 0 and "tower" in result.stdout and "\nfastv" in result.stdout


@pytest.mark.slow
def test_a_share_is_tuned_by_what_the_answers_lose(place, tmp_path):
    lines = ["image,question"] + [f"{draw(tmp_path / f'{n}.png', n).name},w{20 + n} w{30 + n}" for n in range(3)]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    data = ("--data", tmp_path / "pairs.csv")
    found = rows("tune", place / "dense", *data, "--target-flops", 0.7, "--out", tmp_path / "fast")
    assert {row["method"] for row in found} == {*TUNED}
    assert all(row["flops_fraction"] == pytest.approx(0.7, abs=0.06) for row in found)
    losses = [row["divergence"] for row in found]
    assert losses == sorted(losses) and [row["chosen"] for row in found] == [True] + [False] * (len(found) - 1)
    net, processor = load_reader(str(tmp_path / "fast"))
    method = pruner_of(net)
    assert (method.name, [*method.sites], [*method.shares]) == tuple(found[0][k] for k in ("method", "at", "keep"))
    dense, apart, count = reader(str(place / "dense"))[0], 0.0, 0
    for n in range(3):
        inputs = asked(processor, read_picture(tmp_path / f"{n}.png"), f"w{20 + n} w{30 + n}")
        answered = answer(dense, inputs, 16)
        log, own = told(dense, inputs, answered)[0], told(net, inputs, answered)[0]
        apart, count = apart + float((log.exp() * (log - own)).sum()), count + len(log)
    assert apart / count == pytest.approx(losses[0], rel=1e-4, abs=1e-7)
    assert "is there and not empty" in fails("tune", place / "dense", *data, "--target-flops", 0.7, "--out", tmp_path)


def test_an_answer_is_judged_as_it_is_generated(place):
    """One token after the other over the cache of the pruned prompt."""
    net, processor = load_reader(str(place / "pruned"))
    inputs = asked(processor, read_picture(place / "field.png"), WHERE)
    found = net.generate(**inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    log, share = told(net, inputs, found.sequences[0, -4:])
    torch.testing.assert_close(log, torch.cat(found.logits).log_softmax(-1), atol=1e-5, rtol=1e-5)
    assert share == pytest.approx(net.token_pruner.picture_report["flops_fraction"])


def test_what_cannot_be_asked_is_said(place, tmp_path):
    image, dense = ("--image", place / "field.png"), place / "dense"
    assert "give one with --ask" in fails("show", dense, *image)
    assert "give one with --image" in fails("show", dense, "--ask", WHAT)
    ask = (*image, "--ask", WHAT)
    assert "name a method" in fails("show", dense, *ask)
    assert "unknown pruning method 'divprun'" in fails("show", dense, *ask, "--method", "divprun")
    assert "takes entries from a cache" in fails("show", dense, *ask, "--method", "snapkv", "--keep", 0.5)
    assert "show follows one" in fails("show", dense, *ask, "--method", "fastv,divprune")
    assert "keep belongs to a method" in fails("bench", dense, "--keep", 0.5)
    assert "timed in torch alone" in fails("bench", dense, "--method", "fastv", "--runtime", "onnx")
    for option in (("--batch-size", 3), ("--contexts", 64), ("--precision", "bf16")):
        name = option[0][2:].replace("-", "_")
        assert f"leave {name} out" in fails("bench", dense, "--method", "fastv", *option)
    assert "there is no file" in fails("show", dense, "--image", tmp_path / "no.png", *ask[2:], "--method", "fastv")
    (tmp_path / "a.csv").write_text("picture,question\nfield.png,w5\n")
    tune = ("tune", dense, "--data", tmp_path / "a.csv", "--out", tmp_path / "o")
    assert "under one budget, --target-flops" in fails(*tune, "--target-latency-ms", 5)
    assert "leave batch_size out" in fails(*tune, "--target-flops", 0.5, "--batch-size", 2)
    assert "has no column 'image'" in fails(*tune, "--target-flops", 0.5)
    save_reader(tmp_path / "cache", SnapKV(keep=0.5))
    assert "takes entries from a cache" in fails("bench", tmp_path / "cache", "--method", "fastv")
    FAMILIES["bert"].build().save_pretrained(tmp_path / "bert")
    assert not reads_pictures(str(tmp_path / "bert")) and reads_pictures(str(dense))
    assert "reads no pictures beside text" in fails("bench", tmp_path / "bert", "--ask", WHAT, "--data", "x.csv")
