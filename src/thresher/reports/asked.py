"""Questions about a picture: which of its tokens are left for which of them, and what a model answers with them and
with all, in the terminal, on a page and as a PNG."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text
from torch import Tensor

from ..core.view import departures
from ..data.pictures import pillow, read_picture
from ..evaluation.rows import whole
from .page import page, slider
from .patches import GAP, LINE, STYLE, Patch, PatchTrace, covered, grid, legend, shown_picture, strip
from .prompts import _column as column
from .prompts import _shown as shown
from .tables import drawn, fixed

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Asked:
    """A question about a picture.

    Attributes:
        answer, dense_answer: of the pruned and of the dense model.
        pictures: the parts of the picture, crops where the model makes some; none where their tokens are no grid.
        report: ``TokenPruner.picture_report``.
    """

    question: str
    answer: str
    dense_answer: str
    pictures: tuple[PatchTrace, ...]
    report: dict[str, Any]
    model: str
    method: str

    def to_dict(self) -> dict[str, Any]:
        """All but pixels, for JSON."""
        return vars(self) | {"pictures": [part.to_dict() for part in self.pictures]}

    @property
    def summary(self) -> str:
        """What was left, in words."""
        before, after = (sum(self.report[name][0]) for name in ("pictures", "kept"))
        mean, share = self.report["mean"], self.report["flops_fraction"]
        return (
            f"{after} of {before} tokens of the picture are left, {mean:.0f} in a layer on average, at {share:.0%} of "
            "the MACs of the language model's layers"
        )


def parts(model: Any, processor: Any, inputs: dict[str, Any], image: str | os.PathLike | Image) -> tuple:
    """The parts of a picture, each a ``PatchTrace``, of the last forward of a pruned model, which read ``inputs`` of
    one row; none where the tokens of one are no grid, or it cannot be told which pixels are whose."""
    pruner = model.token_pruner
    record = pruner.record
    numbers, sites = record.pictures[0], record.sites
    count = int(numbers.max()) + 1
    layers, scores = departures(sites, len(numbers))
    pixels = pixels_of(processor, inputs["pixel_values"], count, image)
    if pixels is None or not sites:
        return ()
    places, found = sites[0].places, []
    macs = {
        site.layer: row["macs"] / row["dense_macs"] for site in sites for row in [pruner.report[max(0, site.layer)]]
    }
    name = "" if hasattr(image, "convert") else os.fspath(image)
    for number, picture in enumerate(pixels):
        own = (numbers == number).nonzero()[:, 0].tolist()
        shape = shape_of(len(own), None if places is None else places[:, 0, own])
        if shape is None:
            return ()
        cells = [(place // shape[1], place % shape[1]) for place in range(len(own))]
        patches = tuple(Patch(*cell, layers[i], scores[i]) for cell, i in zip(cells, own, strict=True))
        left = {s.layer: sum(p.layer is None or p.layer > s.layer for p in patches) for s in sites}
        known: Any = (float(record.flops_fraction()), {}, False, name_of(model), pruner.name)
        found.append(PatchTrace(name, *shape, patches, (), left, macs, *known, picture=picture))
    return tuple(found)


def name_of(model: Any) -> str:
    """The folder of a model, or what it is."""
    return os.path.basename(os.path.normpath(model.config.name_or_path or type(model).__name__))


def shape_of(count: int, places: Tensor | None) -> tuple[int, int] | None:
    """Rows and columns of ``count`` tokens, by their ``places`` (3, n), else of a square; None: they are no grid."""
    if places is not None:
        frames, rows, columns = (len(of.unique()) for of in places)
        return (rows, columns) if frames == 1 and rows * columns == count else None
    side = math.isqrt(count)
    return (side, side) if side * side == count else None


def pixels_of(processor: Any, values: Tensor, count: int, image: str | os.PathLike | Image) -> list[Image] | None:
    """The pictures that the ``count`` runs of tokens are of: what the model read, where its pixels come as pictures,
    else, for one run, the picture itself; None: nobody can tell."""
    own = getattr(processor, "image_processor", processor)
    if values.dim() >= 4:
        flat = values.reshape(-1, *values.shape[-3:])
        return [shown_picture(own, one) for one in flat] if len(flat) == count else None
    return [read_picture(image)] if count == 1 else None


def terminal(asked: Asked) -> Text:
    """The grids of the parts, the question, both answers, and what was left."""
    result = Text()
    for part in asked.pictures:
        result.append_text(grid(part))
    result.append(f"\n{asked.question}\n", "bold")
    result.append(f"  dense:  {asked.dense_answer}\n  {asked.method}: {asked.answer}\n{asked.summary}\n")
    if not asked.pictures:
        result.append("the tokens of this model's picture are no grid: none is drawn\n")
    return result


def html(asked: Sequence[Asked], path: str | os.PathLike | None = None) -> str:
    """One self-contained page: for each question the picture under its tokens, and both answers. Written aside and
    moved to ``path``, if there is one. Raises ValueError where nothing can be drawn."""
    check_drawn(asked)
    layers = sorted({layer for one in asked for part in one.pictures for layer in part.left})
    intro = (
        f"{escape(asked[0].model)}, pruned by {escape(asked[0].method)}. Move the slider: a token that has left is "
        "covered by the colour of its layer. Point at a token for its layer and score."
    )
    body = "".join(
        f"<article><h2>{escape(one.question)}</h2>{''.join(covered(part, layers) for part in one.pictures)}"
        f"Dense: <b>{escape(one.dense_answer)}</b><br>{escape(one.method)}: <b>{escape(one.answer)}</b>"
        f"<p><small>{escape(one.summary)}</small></p>{''.join(legend(part, layers) for part in one.pictures)}</article>"
        for one in asked
    )
    return page("Which part of a picture is left for which question", intro, slider(layers) + body, layers, path, STYLE)


def png(asked: Sequence[Asked], path: str | os.PathLike) -> None:
    """The strips of every question below each other, with both answers. Written aside and moved. Raises as ``html``."""
    from PIL import ImageDraw

    check_drawn(asked)
    blocks: list[tuple[list[str], list[Image]]] = []
    for one in asked:
        said = [one.question, f"dense: {one.dense_answer}", f"{one.method}: {one.answer}"]
        blocks.append(([" ".join(line.split()) for line in said], [strip(part) for part in one.pictures]))
    width = max(picture.width for _, pictures in blocks for picture in pictures)
    height = sum(len(lines) * LINE + GAP + sum(p.height for p in pictures) for lines, pictures in blocks)
    sheet = pillow().Image.new("RGB", (width, height), "white")
    draw, at = ImageDraw.Draw(sheet), 0
    for lines, pictures in blocks:
        for line in lines:
            at += LINE
            draw.text((GAP, at - LINE + GAP // 2), line.encode("latin-1", "replace").decode("latin-1"), fill="black")
        at += GAP
        for picture in pictures:
            sheet.paste(picture, (0, at))
            at += picture.height
    with whole(path) as temporary:
        sheet.save(temporary, format="PNG")


def check_drawn(asked: Sequence[Asked]) -> None:
    """Raise ValueError where there is nothing to draw."""
    if not asked:
        raise ValueError("there is no question to show")
    if not all(one.pictures for one in asked):
        raise ValueError(
            f"what {asked[0].model} reads of a picture is no grid whose pixels are known: leave --png and --html out"
        )


def bench_table(rows: list[dict], width: int) -> Group:
    """Draw the rows of a question about a picture that was timed."""
    columns = [
        column(rows, "method", lambda r: r["method"], key=True, left=True),
        column(rows, "keep", lambda r: f"{r['keep']:g}" if r.get("keep") else "", left=True, rank=3),
        column(rows, "tokens of pictures", lambda r: f"{r['visual_mean']:,.1f}", rank=2),
        column(rows, "× fewer MACs", lambda r: fixed(r["flops_ratio"], 2), rank=1),
        column(rows, "tower ms", lambda r: shown(r, "tower_ms")),
        column(rows, "prefill ms", lambda r: shown(r, "prefill_ms")),
        column(rows, "ms/token", lambda r: shown(r, "latency_ms_p50")),
        column(rows, "× dense", lambda r: fixed(r["speedup_unpadded"], 2)),
        column(rows, "cache MB", lambda r: shown(r, "cache_mb"), rank=4),
    ]
    first = rows[0]
    above = f"{first['model']}, {first['precision']}, {first['threads']} threads, medians of {first['repeats']}, "
    above += f"prompt of {first['context']:,} tokens; {first['note']}"
    return drawn(columns, width, above=above)


def tune_table(rows: list[dict], width: int) -> Group:
    """Draw what every method loses at a budget, best first."""
    columns = [
        column(rows, "method", lambda r: r["method"], key=True, left=True),
        column(rows, "at", lambda r: ", ".join(map(str, r["at"])), left=True),
        column(rows, "keep", lambda r: ", ".join(f"{share:.3g}" for share in r["keep"]), left=True),
        column(rows, "MACs", lambda r: f"{r['flops_fraction']:.1%}"),
        column(rows, "KL a token", lambda r: fixed(r["divergence"], 4)),
        column(rows, "tokens as dense", lambda r: f"{r['agreement']:.1%}"),
        column(rows, "chosen", lambda r: "*" * r["chosen"], rank=1),
    ]
    return drawn(columns, width, above=f"{rows[0]['pairs']} pictures with questions; KL of the tokens of the answer")


def picture_name(image: str | os.PathLike | None) -> str:
    """What a picture is called in a row."""
    return "noise" if image is None else Path(image).name
