"""Which token leaves where: trace a text through a pruned model, read it in the terminal or in a browser."""

from __future__ import annotations

import inspect
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
from .page import page, ramp, slider

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
        "its colour, a <b>bold</b> one survives; what is grey and slanted was cut and never read. Point at a token, "
        "or walk through a text with the arrow keys, for its layer and score."
    )
    body = slider(layers) + "".join(article(trace, layers) for trace in traces)
    return page("Which token leaves where", intro, body, layers, path)


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
    return f"""<article><p data-walk tabindex="0">{"".join(spans)}</p>
Prediction: <b>{escape(prediction(trace))}</b><ul>{legend}</ul>
<small>{_summary(trace)}</small>{_listed(trace)}</article>
"""


def _listed(trace: Trace) -> str:
    """What leaves where, as a table: for who cannot see the colours."""
    lines = []
    for layer, left in [*trace.left.items(), (None, None)]:
        words = " ".join(escape(token.text) for token in trace.tokens if token.layer == layer)
        where = "to the end" if layer is None else str(layer)
        macs = "" if layer is None else f"{trace.layer_macs[layer]:.0%}"
        cells = f"<td>{'' if left is None else left}</td><td>{macs}</td><td class=words>{words}</td>"
        lines.append(f"<tr><th scope=row class=first>{where}</th>{cells}</tr>")
    head = "".join(
        f"<th scope=col>{name}</th>" for name in ("after layer", "left", "MACs", "tokens that leave, or stay")
    )
    return f"""<details><summary>as a table</summary><table><thead><tr>{head}</tr></thead>
<tbody>{"".join(lines)}</tbody></table></details>"""
