"""Which patch of a picture leaves where: trace it through a pruned image model, look at it in the terminal, a browser
or a PNG. Pictures are read and drawn with PIL."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.text import Text

from ..core.view import departures
from ..data.pictures import pillow, read_picture
from ..evaluation.predict import ready
from ..evaluation.rows import whole
from .page import page, ramp, slider, when
from .trace import prediction, told

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE, GAP, LINE = 288, 12, 16  # pixels: of a panel, between panels, of the line above each
FADED = 0.16  # what is left of the colours of a patch that left
STYLE = """
.picture { display: grid; width: min(100%, 30rem); margin: 0 0 .8rem; background-size: 100% 100% }
.picture span { display: flex; align-items: center; justify-content: center; font-size: .62rem }
.picture [data-step]:not(.gone) { background: none; color: transparent }
.strip { width: 100%; margin: .4rem 0 }
"""


@dataclass(frozen=True)
class Patch:
    """One patch of the picture; ``layer`` and ``score`` as in ``trace.Token``."""

    row: int
    column: int
    layer: int | None
    score: float | None


@dataclass(frozen=True)
class PatchTrace:
    """What one forward did to one picture.

    Attributes:
        rows, columns: patches of the picture as the model reads it.
        special: tokens before the patches (class, distillation, register), and the layer at which each leaves.
        picture: PIL image as the model reads it: resized and cropped; not compared.
        left: layer at which tokens may leave -> tokens left after it, special ones included.
        layer_macs, macs, prediction, probabilities, model, method: as in ``trace.Trace``.
    """

    image: str
    rows: int
    columns: int
    patches: tuple[Patch, ...]
    special: tuple[int | None, ...]
    left: dict[int, int]
    layer_macs: dict[int, float]
    macs: float
    prediction: dict[str, float]
    probabilities: bool
    model: str
    method: str
    picture: Image = field(repr=False, compare=False, kw_only=True)

    def to_dict(self) -> dict[str, Any]:
        """All but the picture, for JSON."""
        return {k: [vars(p) for p in v] if k == "patches" else v for k, v in vars(self).items() if k != "picture"}


def trace(model, processor, image: str | os.PathLike | Image) -> PatchTrace:
    """Run a pruned model on one picture, a file or an image of PIL, and tell where each patch leaves.

    Raises:
        ValueError: the model is not pruned, the file is no picture, or the tokens are no grid of patches.
    """
    if getattr(model, "token_pruner", None) is None:
        raise ValueError(f"this {type(model).__name__} is dense: no patch leaves it")
    name = "" if hasattr(image, "convert") else os.fspath(image)
    pixels = processor(read_picture(image), return_tensors="pt")["pixel_values"]
    if pixels.dim() != 4 or (size := getattr(model.config, "patch_size", None)) is None:
        what = f"{type(processor).__name__} and {type(model).__name__} make {tuple(pixels.shape)} of a picture"
        raise ValueError(f"{what}: expected (1, channels, height, width) and a patch_size")
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns = pixels.shape[2] // height, pixels.shape[3] // width
    with torch.no_grad(), ready(model):
        output = model(pixels.to(next(model.parameters())))

    pruner = model.token_pruner
    special, count = len(pruner.architecture.protected), int(pruner.record.counts[0].n_attention.sum())
    if count != special + rows * columns:
        what = f"{type(model).__name__} makes {count} tokens of {rows} × {columns} patches and {special} special tokens"
        raise ValueError(f"{what}: only one token a patch can be drawn")
    layers, scores = departures(pruner.record.sites, count)
    places = [(row, column) for row in range(rows) for column in range(columns)]
    found = zip(places, layers[special:], scores[special:], strict=True)
    patches = tuple(Patch(*place, layer, score) for place, layer, score in found)
    picture = shown_picture(processor, pixels[0]).crop((0, 0, columns * width, rows * height))  # a rest is not read
    known = told(model, output.get("logits"))
    return PatchTrace(name, rows, columns, patches, tuple(layers[:special]), *known, picture=picture)


def shown_picture(processor, pixels: torch.Tensor) -> Image:
    """What the model reads, (3, H, W), with the processor's normalization undone."""
    values = pixels.float()
    if getattr(processor, "do_normalize", False):
        mean, deviation = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
        values = values * deviation + mean
    if getattr(processor, "do_rescale", True):
        values = values / processor.rescale_factor
    return pillow().Image.fromarray(values.round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def _summary(trace: PatchTrace) -> str:
    left = sum(patch.layer is None for patch in trace.patches)
    return f"{left} of {len(trace.patches)} patches survive, at {trace.macs:.0%} of the dense model's MACs"


def after(trace: PatchTrace, layer: int) -> int:
    """Patches left after a layer."""
    return sum(patch.layer is None or patch.layer > layer for patch in trace.patches)


def terminal(trace: PatchTrace) -> Text:
    """What ``grid`` shows, and the prediction."""
    return grid(trace).append(f"prediction: {prediction(trace)}\n")


def grid(trace: PatchTrace) -> Text:
    """The patches: the layer after which each leaves, in its colour, or a square; the legend below."""
    colours = dict(zip(trace.left, ramp(len(trace.left)), strict=True))
    result = Text(no_wrap=True)
    for patch in trace.patches:
        if patch.layer is None:
            result.append(" ■ ", "bold")
        else:
            result.append(f"{patch.layer:>2} ", "{1} on {0}".format(*colours[patch.layer]))
        result.append("\n" * (patch.column == trace.columns - 1))
    result.append("\n")
    for layer in trace.left:
        result.append("    ", f"on {colours[layer][0]}")
        result.append(f" {when(layer)}: {after(trace, layer):>4} left, {trace.layer_macs[layer]:>4.0%} MACs\n")
    return result.append(" ■ ", "bold").append(f" {_summary(trace)}\n")


def png(trace: PatchTrace, path: str | os.PathLike) -> None:
    """The picture, and beside it what survives after each site; the rest is faded. Written aside and moved."""

    with whole(path) as temporary:
        strip(trace).save(temporary, format="PNG")


def strip(trace: PatchTrace) -> Image:
    """The picture and a panel for each site, side by side."""
    pil = pillow()
    from PIL import ImageDraw

    cell = max(1, SIDE // max(trace.rows, trace.columns))
    size = (trace.columns * cell, trace.rows * cell)
    picture = trace.picture.resize(size, pil.Image.Resampling.BICUBIC)
    faded = pil.Image.blend(pil.Image.new("RGB", size, "white"), picture.convert("L").convert("RGB"), FADED)
    panels = [("as the model reads it", picture)]
    for layer in trace.left:
        panel = picture.copy()
        for patch in trace.patches:
            if patch.layer is not None and patch.layer <= layer:
                box = (patch.column * cell, patch.row * cell, (patch.column + 1) * cell, (patch.row + 1) * cell)
                panel.paste(faded.crop(box), box)
        panels.append((f"{when(layer)}: {after(trace, layer)} of {len(trace.patches)}", panel))
    sheet = pil.Image.new("RGB", (len(panels) * (size[0] + GAP) + GAP, size[1] + LINE + 2 * GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, panel) in enumerate(panels):
        left = GAP + i * (size[0] + GAP)
        draw.text((left, GAP), name, fill="black")
        sheet.paste(panel, (left, GAP + LINE))
    return sheet


def html(traces: Sequence[PatchTrace], path: str | os.PathLike | None = None) -> str:
    """One self-contained page: each picture under its patches, which the slider covers as they leave, and the strip of
    ``png``. Written aside and moved to ``path``, if there is one. Raises ValueError without traces."""
    if not traces:
        raise ValueError("there is no picture to show")
    layers = sorted({layer for trace in traces for layer in trace.left})
    intro = (
        f"{escape(traces[0].model)}, pruned by {escape(traces[0].method)}. Move the slider: a patch that has left is "
        "covered by the colour of its layer. Point at a patch, or walk with the arrow keys, for its layer and score."
    )
    body = slider(layers) + "".join(_article(trace, layers) for trace in traces)
    return page("Which patch leaves where", intro, body, layers, path, STYLE)


def _article(trace: PatchTrace, layers: list[int]) -> str:
    return f"""<article>{covered(trace, layers)}
Prediction: <b>{escape(prediction(trace))}</b>{legend(trace, layers)}</article>
"""


def covered(trace: PatchTrace, layers: list[int]) -> str:
    """The picture under its patches, as HTML."""
    spans = []
    for patch in trace.patches:
        kind, where = "", "survives"
        if patch.layer is not None:
            step, where = layers.index(patch.layer) + 1, f"leaves {when(patch.layer)}"
            kind = f' class="s{step}" data-step="{step}"'
        score = "" if patch.score is None else f", score {patch.score:.2f}"
        tip = f"row {patch.row}, column {patch.column}: {where}{score}"
        spans.append(f'<span{kind} data-tip="{tip}">{"" if patch.layer is None else patch.layer}</span>')
    shape = f"grid-template-columns: repeat({trace.columns}, 1fr); aspect-ratio: {trace.columns} / {trace.rows}"
    style = f"{shape}; background-image: url({_data(trace.picture)})"
    walked = f'data-walk="{trace.columns}" tabindex="0" role="group" '
    walked += f'aria-label="{trace.rows} rows of {trace.columns} patches"'
    return f'<div class="picture" {walked} style="{style}">{"".join(spans)}</div>'


def legend(trace: PatchTrace, layers: list[int]) -> str:
    """The colours of the layers, what survives, and the strip, as HTML."""
    items = "".join(
        f'<li class="s{layers.index(layer) + 1}">{when(layer)}: {after(trace, layer)} left, '
        f"{trace.layer_macs[layer]:.0%} MACs</li>"
        for layer in trace.left
    )
    return f"""<ul>{items}</ul>
<small>{escape(Path(trace.image).name)}: {_summary(trace)}</small>
<img class="strip" alt="{_strip_told(trace)}" src="{_data(strip(trace))}">"""


def _strip_told(trace: PatchTrace) -> str:
    """What the strip shows, in words."""
    left = "; ".join(f"{after(trace, layer)} of {len(trace.patches)} {when(layer)}" for layer in trace.left)
    return f"the picture, and the patches that are left: {left}"


def _data(picture: Image) -> str:
    """The picture as an address that needs no file."""
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
