"""Which token leaves where: trace a text through a pruned model, read it in the terminal or in a browser."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.text import Text

from ..core.pruner import token_pruner_of
from ..core.view import departures
from ..data.models import positions
from ..evaluation.predict import ready
from ..evaluation.rows import whole

# viridis: even steps of lightness, told apart by the colour-blind as well (Smith and van der Walt, 2015)
VIRIDIS = ("440154", "482475", "414487", "355f8d", "2a788e", "21918c", "22a884", "44bf70", "7ad151", "bddf26")
BELOW = 8  # lines of a screen that are not the text: summary, prediction, blank ones, what is more, the prompt


@dataclass(frozen=True)
class Token:
    """One token of the input.

    Attributes:
        text: as in the vocabulary.
        part: 0 in the text, 1 in its pair, None for special tokens.
        start, end: its characters in that part; None for special tokens.
        layer: 0-based layer after whose attention it leaves; None: it survives.
        score: the method's score where it left, or at the last site where any could.
    """

    text: str
    part: int | None
    start: int | None
    end: int | None
    layer: int | None
    score: float | None


@dataclass(frozen=True)
class Trace:
    """What one forward did to one text or pair.

    Attributes:
        left: layer at which tokens may leave -> tokens left after it.
        layer_macs: the same layers -> MACs, as a fraction of the dense layer's.
        macs: of the forward, as a fraction of the dense model's on the same tokens.
        prediction: label -> probability, the most probable first; the value for regression; empty without such a head.
        probabilities: whether ``prediction`` holds probabilities.
    """

    texts: tuple[str, ...]
    tokens: tuple[Token, ...]
    left: dict[int, int]
    layer_macs: dict[int, float]
    macs: float
    prediction: dict[str, float]
    probabilities: bool
    model: str
    method: str


def trace(model, tokenizer, text: str, text_pair: str | None = None, max_length: int | None = None) -> Trace:
    """Run a pruned model on one text and tell where each token leaves.

    Args:
        max_length: tokens, special ones included; what is longer is cut. None: what the model takes.

    Raises:
        ValueError: the model is not pruned, or its tokenizer does not tell the characters of a token.
    """
    pruner = token_pruner_of(model, "trace")
    if pruner is None:
        raise ValueError(f"this {type(model).__name__} is dense: no token leaves it")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} does not tell the characters of a token: use a fast tokenizer")
    texts = (text,) if text_pair is None else (text, text_pair)
    limit = min(n for n in (max_length, positions(model), tokenizer.model_max_length) if n is not None)
    encoded = tokenizer(*texts, truncation="longest_first", max_length=limit, return_offsets_mapping=True)
    spans, ids, parts = encoded.pop("offset_mapping"), encoded["input_ids"], encoded.sequence_ids(0)
    if not ids:
        raise ValueError("the text has no tokens")
    accepted, device = inspect.signature(model.forward).parameters, next(model.parameters()).device
    with torch.no_grad(), ready(model):
        output = model(**{k: torch.tensor([v], device=device) for k, v in encoded.items() if k in accepted})

    layers, scores = departures(pruner.record.sites, len(ids))
    spans = [(None, None) if part is None else span for part, span in zip(parts, spans, strict=True)]
    tokens = zip(tokenizer.convert_ids_to_tokens(ids), parts, *zip(*spans, strict=True), layers, scores, strict=True)
    return Trace(texts, tuple(Token(*token) for token in tokens), *told(model, output.get("logits")))


def told(model, logits: torch.Tensor | None) -> tuple:
    """What a trace holds besides the input, from ``left`` on: of the last forward of a pruned model."""
    pruner = model.token_pruner
    rows = [pruner.report[view.layer] for view in pruner.record.sites]
    return (
        {row["layer"]: int(row["tokens_kept"]) for row in rows},
        {row["layer"]: row["macs"] / row["dense_macs"] for row in rows},
        float(pruner.record.flops_fraction()),
        *_predict(model.config, logits),
        os.path.basename(os.path.normpath(model.config.name_or_path or type(model).__name__)),
        pruner.name,
    )


def _predict(config, logits: torch.Tensor | None) -> tuple[dict[str, float], bool]:
    """Label -> probability (or value), and whether they are probabilities."""
    if logits is None or logits.dim() != 2:
        return {}, False
    values, regression = logits[0].float(), logits.shape[1] == 1 or config.problem_type == "regression"
    if not regression:
        values = values.sigmoid() if config.problem_type == "multi_label_classification" else values.softmax(-1)
    labels = {config.id2label.get(i, f"LABEL_{i}"): value for i, value in enumerate(values.tolist())}
    return dict(sorted(labels.items(), key=lambda item: -item[1])), not regression


class Piece(NamedTuple):
    """A stretch of the input: its token, or None; ``read``: False for what was cut and the model never saw."""

    string: str
    token: Token | None
    read: bool = True


def pieces(trace: Trace) -> Iterator[Piece]:
    """Cut the input at its tokens, as it reads: tokens, what lies between them, and what was not read."""
    part: int | None = None
    at, started = 0, True
    for token in trace.tokens:
        if token.part != part:
            if part is not None:
                yield _rest(trace.texts[part][at:])
            part, at, started = token.part, 0, False
        if part is None:
            yield Piece(token.text, token)
        else:
            start, end = max(at, token.start or 0), max(at, token.end or 0)
            before = trace.texts[part][at:start]
            yield Piece(before, None) if started else _rest(before)  # a tokenizer may cut the start as well
            yield Piece(trace.texts[part][start:end], token)  # empty for the further bytes of one character
            at, started = end, True
    if part is not None:
        yield _rest(trace.texts[part][at:])


def _rest(string: str) -> Piece:
    """What no token covers at an end of a text: blanks, or what was cut."""
    return Piece(string, None, read=not string.strip())


def ramp(steps: int) -> list[tuple[str, str]]:
    """Background and text colour, at a contrast of 4.5:1 or more, from what leaves first to what leaves last."""
    colours = []
    for step in range(steps):
        place, blend = divmod(step / max(1, steps - 1) * (len(VIRIDIS) - 1), 1)
        ends = (bytes.fromhex(VIRIDIS[min(int(place) + i, len(VIRIDIS) - 1)]) for i in (0, 1))
        mixed = [round(low + (high - low) * blend) for low, high in zip(*ends, strict=True)]
        linear = [((c / 255 + 0.055) / 1.055) ** 2.4 for c in mixed]
        light = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) > 0.179
        colours.append(("#{:02x}{:02x}{:02x}".format(*mixed), "#000000" if light else "#ffffff"))
    return colours


def _summary(trace: Trace) -> str:
    left = sum(token.layer is None for token in trace.tokens)
    unread = sum(len(piece.string) for piece in pieces(trace) if not piece.read)
    cut = f"; {unread:,} characters were cut and not read" if unread else ""
    return f"{left} of {len(trace.tokens)} tokens survive, at {trace.macs:.0%} of the dense model's MACs{cut}"


def prediction(trace: Any) -> str:
    """The most probable answers of a trace, in words."""
    form = "{} {:.1%}" if trace.probabilities else "{} {:.3f}"
    return ", ".join(form.format(*item) for item in list(trace.prediction.items())[:5]) or "none"


def terminal(trace: Trace, screen: tuple[int, int] | None = None) -> Text:
    """The text, each token coloured by the layer at which it leaves, survivors bold, what was not read dim; the legend
    and the prediction below.

    Args:
        screen: columns and lines of a terminal; a longer text is cut so that all of it is on one screen.
    """
    colours, listed = dict(zip(trace.left, ramp(len(trace.left)), strict=True)), screen[0] - 37 if screen else 40
    result = Text()
    for string, token, read in pieces(trace):
        if token is not None and token.layer is not None:
            style = "{1} on {0}".format(*colours[token.layer])
        else:
            style = "bold" if token else "" if read else "dim"
        result.append(f" {string} " if token and token.part is None else string, style)
    if screen:
        result = _first_lines(result, screen[0], screen[1] - len(trace.left) - BELOW)
    result.append("\n\n")
    for layer, left in trace.left.items():
        gone = " ".join(token.text for token in trace.tokens if token.layer == layer)
        result.append("    ", f"on {colours[layer][0]}")
        result.append(f" layer {layer:>2}: {left:>4} left, {trace.layer_macs[layer]:>4.0%} MACs  ")
        result.append((gone if len(gone) < listed else gone[: listed - 1] + "…") + "\n", "dim")
    return result.append("bold", "bold").append(f" {_summary(trace)}\nprediction: {prediction(trace)}\n")


def _first_lines(text: Text, columns: int, lines: int) -> Text:
    """The beginning of a text that takes so many lines, and how many more there are."""
    wrapped = text.wrap(Console(width=columns), columns)
    if len(wrapped) <= (lines := max(3, lines)):
        return text
    return Text("\n").join(wrapped[:lines]).append(f"\n… {len(wrapped) - lines:,} more lines", "dim")


CUT = "cut: the model did not read this"
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --soft: #595959; --line: #ccc; --card: #f7f7f5 }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --ink: #f2f2f2; --soft: #b0b4ba; --line: #3a3e44; --card: #1e2125 } }
body { margin: 0; background: var(--page); color: var(--ink); font: 17px/1.5 system-ui, "Segoe UI", Roboto, sans-serif }
main { max-width: 50rem; margin: auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.5rem; margin: 0 } small { display: block; color: var(--soft); font-size: .88rem }
label { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: .8rem; padding: .7rem 0 }
label { background: var(--page) } label input { flex: 1 1 14rem; accent-color: #21918c } output { min-width: 7rem }
article { margin-bottom: 1.3rem; padding: 1rem 1.2rem; background: var(--card); border-radius: .6rem }
article, p .special { border: 1px solid var(--line) }
p { font-size: 1.1rem; line-height: 2; margin: 0 0 .6rem; white-space: pre-wrap; overflow-wrap: anywhere }
p span { padding: .12em 0; border-radius: .2em; font-weight: 700 } p [data-step] { font-weight: 400 }
p .special { font-size: .75em; padding: .2em .4em; margin: 0 .2em } p span:hover { outline: 2px solid var(--ink) }
p .cut { font-weight: 400; color: color-mix(in srgb, var(--soft) 60%, var(--card)); font-style: italic }
p .gone { background: none; color: color-mix(in srgb, var(--soft) 85%, var(--card)) }
ul { display: flex; flex-wrap: wrap; gap: .35rem; list-style: none; margin: .7rem 0 .4rem; padding: 0 }
li, #tip { padding: .1rem .5rem; border-radius: .3rem; font-size: .82rem }
#tip { position: fixed; background: var(--ink); color: var(--page) }
"""

SCRIPT = """
const slider = document.querySelector("input"), tip = document.querySelector("#tip");
const fade = () => {
  document.querySelector("output").textContent = JSON.parse(slider.dataset.names)[slider.value];
  for (const token of document.querySelectorAll("[data-step]"))
    token.classList.toggle("gone", +token.dataset.step <= +slider.value);
};
if (slider) { slider.oninput = fade; fade(); }
document.onpointerover = ({ target }) => {
  const token = target.closest("[data-tip]"), box = token?.getClientRects()[0];
  tip.hidden = !token;
  tip.textContent = token?.dataset.tip;
  tip.style.top = `${box?.bottom + 6}px`;
  tip.style.left = `${Math.min(box?.left, innerWidth - tip.offsetWidth - 8)}px`;
};
"""


def html(traces: Sequence[Trace], path: str | os.PathLike | None = None) -> str:
    """One self-contained page that shows ``traces`` of one model, written to ``path`` if there is one.

    Tokens are coloured by the layer at which they leave, survivors are bold; a slider fades what has left, and pointing
    at a token tells its layer and score. Raises ValueError without traces, OSError where it cannot be written.
    """
    if not traces:
        raise ValueError("there is no text to show")
    layers = sorted({layer for trace in traces for layer in trace.left})
    intro = (
        f"{escape(traces[0].model)}, pruned by {escape(traces[0].method)}. A coloured token leaves after the layer of "
        "its colour, a <b>bold</b> one survives; what is grey was cut and never read. Point at a token for its layer "
        "and score."
    )
    body = slider(layers) + "".join(article(trace, layers) for trace in traces)
    return page("Which token leaves where", intro, body, layers, path)


def page(
    title: str,
    intro: str,
    body: str,
    layers: Sequence[int],
    path: str | os.PathLike | None = None,
    style: str = "",
) -> str:
    """The frame of every page, with the colours of its ``layers``, and the script of the slider and of what is pointed
    at; ``intro`` and ``body`` are HTML. Written aside and moved to ``path``, if there is one."""

    colours = "".join(f".s{i} {{ background: {b}; color: {f} }}\n" for i, (b, f) in enumerate(ramp(len(layers)), 1))
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}{colours}{style}</style></head>
<body><main><h1>{title}</h1>
<small>{intro}</small>
{body}</main><div id="tip" hidden></div>
<script>{SCRIPT}</script></body></html>
"""
    if path is not None:
        with whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return text


def when(layer: int) -> str:
    """At which site tokens leave, in words; -1 is before the layers."""
    return "before layer 0" if layer < 0 else f"after layer {layer}"


def slider(layers: Sequence[int]) -> str:
    """The slider that fades what has left after each of the ``layers`` of a page."""
    names = escape(json.dumps(["nothing yet", *map(when, layers)]))
    return f"""<label>Fade what has left: <output></output>
<input type="range" min="0" max="{len(layers)}" value="0" data-names="{names}"></label>
"""


def article(trace: Trace, layers: Sequence[int]) -> str:
    """A text of ``slider(layers)``, coloured, with its prediction and legend."""
    spans = []
    for string, token, read in pieces(trace):
        if token is None:
            spans.append(escape(string) if read else f'<span class="cut" data-tip="{CUT}">{escape(string)}</span>')
            continue
        kind, where = "special" if token.part is None else "", "survives"
        if token.layer is not None:
            step, where = layers.index(token.layer) + 1, f"leaves after layer {token.layer}"
            kind = f'{kind} s{step}" data-step="{step}'
        score = "" if token.score is None else f", score {token.score:.2f}"
        tip = escape(f"{token.text}: {where}{score}")
        spans.append(f'<span class="{kind}" data-tip="{tip}">{escape(string)}</span>')
    legend = "".join(
        f'<li class="s{layers.index(layer) + 1}">layer {layer}: {left} left, {trace.layer_macs[layer]:.0%} MACs</li>'
        for layer, left in trace.left.items()
    )
    return f"""<article><p>{"".join(spans)}</p>
Prediction: <b>{escape(prediction(trace))}</b><ul>{legend}</ul><small>{_summary(trace)}</small></article>
"""
