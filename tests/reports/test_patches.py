"""Every patch of a picture is accounted for, in the trace, the terminal, the PNG and on the page."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil, ViTImageProcessorPil
from typer.testing import CliRunner

from support.families import FAMILIES
from support.tiny import save_tiny
from thresher import LTP, FirstK, Threshold, TopK, prune
from thresher.cli import app as cli
from thresher.data.models import load_vision
from thresher.reports.patches import FADED, GAP, LINE, html, png, strip, terminal, trace

SQUARE = {"height": 20, "width": 20}
PROCESSORS = {
    "clip-vision": lambda: CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size=SQUARE),
    "siglip-vision": lambda: SiglipImageProcessorPil(size=SQUARE),
}


def processor(family: str = "vit"):
    return PROCESSORS.get(family, lambda: ViTImageProcessorPil(size=SQUARE))()


def picture(width: int = 20, height: int = 20) -> Image.Image:
    """Another colour in every patch of 4 x 4."""
    values = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(values.repeat(4, 0).repeat(4, 1))


def pruned(family: str = "vit", method=None, layout: str = "auto", **options):
    return prune(FAMILIES[family].build(**options), method or TopK(keep=0.6), layout=layout)


def traced(family: str = "vit", method=None, **options):
    return trace(pruned(family, method, **options), processor(family), picture())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("vit")
    pruned().save_pretrained(place)
    processor().save_pretrained(place)
    picture(36, 28).save(place / "field.png")
    return place


def run(*arguments: object):
    return CliRunner().invoke(cli.app, ["show", *map(str, arguments)])


def fails(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2 and not result.stdout, result.output
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("family", "special"), [("vit", 1), ("deit", 2), ("dinov2", 1), ("clip-vision", 1), ("siglip-vision", 0)]
)
@pytest.mark.parametrize("method", [lambda: TopK(keep=0.6), lambda: Threshold(1.0)], ids=["topk", "threshold"])
def test_every_patch_is_accounted_for(family, special, method):
    shown = traced(family, method())
    assert (shown.rows, shown.columns, len(shown.special)) == (5, 5, special)
    assert [(p.row, p.column) for p in shown.patches] == [(row, column) for row in range(5) for column in range(5)]
    assert set(shown.special) <= {None}, "the model protects them"
    for layer, left in shown.left.items():
        assert left == special + sum(patch.layer is None or patch.layer > layer for patch in shown.patches)
    assert 0 < sum(patch.layer is None for patch in shown.patches) < 25
    assert 0 < shown.macs < 1.1 and (sum(shown.prediction.values()) == pytest.approx(1)) == bool(shown.probabilities)
    assert shown.probabilities == (family in ("vit", "deit", "dinov2"))


def test_patches_lie_where_they_are_read():
    """The first tokens of the sequence are the class token and the first row of patches."""
    shown = traced(method=FirstK(keep=6, at=(1,)))
    assert [(p.row, p.column) for p in shown.patches if p.layer is None] == [(0, column) for column in range(5)]
    assert {p.layer for p in shown.patches if p.row} == {1} and shown.left == {1: 6}
    wide = prune(FAMILIES["vit"].build(image_size=(8, 20)), FirstK(keep=6, at=(1,)))
    shown = trace(wide, ViTImageProcessorPil(size={"height": 8, "width": 20}), picture())
    assert (shown.rows, shown.columns) == (2, 5) and shown.picture.size == (20, 8)
    assert [p.row for p in shown.patches if p.layer is None] == [0] * 5


@pytest.mark.parametrize("layout", ["mask", "padded", "packed"])
def test_the_layout_does_not_matter(layout):
    reference, shown = traced(), traced(layout=layout)
    assert [patch.layer for patch in shown.patches] == [patch.layer for patch in reference.patches]
    for patch, expected in zip(shown.patches, reference.patches, strict=True):
        assert patch.score == pytest.approx(expected.score, abs=1e-4)


def test_register_tokens_come_first():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification

    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(**FAMILIES["dinov2"].options, num_register_tokens=3)
    model = prune(Dinov2WithRegistersForImageClassification(config).eval(), TopK(keep=0.6))
    shown = trace(model, processor(), picture())
    assert len(shown.special) == 4 and len(shown.patches) == 25
    assert shown.left == {layer: 4 + n for layer, n in zip(shown.left, lefts(shown), strict=True)}


def lefts(shown) -> list[int]:
    return [sum(p.layer is None or p.layer > layer for p in shown.patches) for layer in shown.left]


@pytest.mark.parametrize("family", ["vit", "clip-vision"])
def test_the_picture_is_what_the_model_reads(family):
    shown = traced(family)
    assert np.abs(np.asarray(shown.picture).astype(int) - np.asarray(picture())).max() <= 1
    model = pruned(family)
    cropped = trace(model, processor(family), picture(40, 20))
    assert cropped.picture.size == (20, 20)
    if family == "clip-vision":  # which crops the middle
        assert np.abs(np.asarray(cropped.picture).astype(int) - np.asarray(picture(40, 20))[:, 10:30]).max() <= 1


def test_the_terminal_shows_a_grid_and_a_legend():
    shown = traced()
    grid, _, legend = terminal(shown).plain.partition("\n\n")
    cells = [line.split() for line in grid.splitlines()]
    assert cells == [
        ["■" if p.layer is None else str(p.layer) for p in shown.patches if p.row == row] for row in range(5)
    ]
    for layer, left in zip(shown.left, lefts(shown), strict=True):
        assert re.search(rf"layer +{layer}: +{left} left", legend)
    assert "patches survive" in legend and f"{next(iter(shown.prediction))} " in legend


def test_the_strip_fades_what_has_left(tmp_path):
    shown = traced()
    drawn = np.asarray(strip(shown)).astype(float)
    side = shown.columns * (288 // 5)
    assert drawn.shape[:2] == (side + LINE + 2 * GAP, (1 + len(shown.left)) * (side + GAP) + GAP)
    panels = [drawn[GAP + LINE :, GAP + i * (side + GAP) :] for i in range(1 + len(shown.left))]
    for layer, panel in zip(shown.left, panels[1:], strict=True):
        for patch in shown.patches:
            at = (patch.row * side // 5 + side // 10, patch.column * side // 5 + side // 10)
            if patch.layer is None or patch.layer > layer:
                assert (panel[at] == panels[0][at]).all()
            else:
                assert panel[at].min() >= 255 * (1 - FADED) - 1 and np.ptp(panel[at]) == 0
    png(shown, tmp_path / "new" / "strip.png")
    with Image.open(tmp_path / "new" / "strip.png") as written:
        assert (np.asarray(written) == drawn).all()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["strip.png"]


def test_the_page_is_self_contained(tmp_path):
    shown = traced()
    page = html([shown], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert not re.search(r"https?://|<link|@import", page)
    assert set(re.findall(r'(?:src="|url\()([a-z]+:[a-z/]+)', page)) == {"data:image/png"}
    inside = base64.b64decode(re.search(r"url\(data:image/png;base64,([^)]+)\)", page).group(1))
    assert (np.asarray(Image.open(io.BytesIO(inside))) == np.asarray(shown.picture)).all()
    assert page.count("data-tip=") == 25
    assert page.count("data-step=") == sum(patch.layer is not None for patch in shown.patches)
    for patch in shown.patches:
        where = "survives" if patch.layer is None else f"leaves after layer {patch.layer}"
        assert f"row {patch.row}, column {patch.column}: {where}, score {patch.score:.2f}" in page
    with pytest.raises(ValueError, match="no picture"):
        html([])


def test_show_of_a_picture(folder, tmp_path):
    page, drawn, file = tmp_path / "page.html", tmp_path / "strip.png", tmp_path / "patches.json"
    result = run(folder, "--image", folder / "field.png", "--html", page, "--png", drawn, "--json", file)
    assert result.exit_code == 0 and not result.stderr, result.output
    assert "■" in result.stdout and "patches survive" in result.stdout
    assert "field.png" in page.read_text(encoding="utf-8") and drawn.read_bytes().startswith(b"\x89PNG")
    (row,) = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert len(row["patches"]) == 25 and row["special"] == [None] and row["method"] == "topk" and row["columns"] == 5
    alone = json.loads(run(folder, "--image", folder / "field.png", "--json", "-").stdout)["rows"]
    assert alone == [row]


def test_what_show_refuses(folder, tmp_path, monkeypatch):
    image = ("--image", folder / "field.png")
    assert "one of" in fails(folder, *image, "--text", "wheat")
    assert "--png draws a picture" in fails(save_tiny(tmp_path / "bert", TopK()), "--text", "wheat", "--png", "x.png")
    assert "reads input_ids and no pictures" in fails(tmp_path / "bert", *image)
    assert "there is no file" in fails(folder, "--image", tmp_path / "nothing.png")
    (tmp_path / "broken.png").write_bytes((folder / "field.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("wheat")
    for name in ("broken.png", "text.png"):
        assert f"{name} cannot be read as a picture" in fails(folder, "--image", tmp_path / name)
    FAMILIES["vit"].build().save_pretrained(tmp_path / "dense")
    assert "image processor" in fails(tmp_path / "dense", *image).lower()
    processor().save_pretrained(tmp_path / "dense")
    assert "is dense: no patch leaves it" in fails(tmp_path / "dense", *image)
    assert "cannot write" in fails(folder, *image, "--png", "/proc/strip.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match="pip install pillow"):
        trace(pruned(), processor(), folder / "field.png")


def test_tokens_that_are_no_grid_are_refused():
    model = pruned()
    model.config.patch_size = 5
    with pytest.raises(ValueError, match="26 tokens of 4 × 4 patches and 1 special"):
        trace(model, processor(), picture())


def test_loading_keeps_the_learned_thresholds(tmp_path):
    model = pruned(method=LTP(init=0.9))
    with torch.no_grad():
        model.token_pruner.threshold.mul_(1.1)
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    loaded, own = load_vision(str(tmp_path))
    assert trace(loaded, own, picture()).patches == trace(model, own, picture()).patches and not loaded.training
