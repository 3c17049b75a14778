"""Every token of a text is accounted for, in the trace, in the terminal and on the page."""

from __future__ import annotations

import io
import re
from html import unescape

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from support.families import FAMILIES
from support.tiny import tiny_model, tiny_tokenizer
from thresher import LTP, TopK, prune, unprune
from thresher.reports.trace import html, pieces, ramp, terminal, trace

TEXT = 'The farmer threshing wheat keeps  the grain, & <script>alert("chaff")</script>'


def traced(method=None, text: str = TEXT, pair: str | None = None, max_length: int | None = None, **options):
    return trace(tiny_model(method or TopK(keep=0.6), **options), tiny_tokenizer(), text, pair, max_length)


@pytest.mark.parametrize("method", [lambda: TopK(keep=0.6), lambda: LTP(init=1.3)], ids=["topk", "ltp"])
def test_every_token_is_accounted_for(method):
    shown = traced(method())
    expected = tiny_tokenizer()(TEXT)
    assert [token.text for token in shown.tokens] == expected.tokens()
    for layer, left in shown.left.items():
        assert left == sum(token.layer is None or token.layer > layer for token in shown.tokens)
    assert 0 < sum(token.layer is None for token in shown.tokens) < len(shown.tokens)
    assert shown.layer_macs.keys() == shown.left.keys() and min(shown.macs, *shown.layer_macs.values()) > 0
    assert sum(shown.prediction.values()) == pytest.approx(1) and shown.probabilities
    assert list(shown.prediction.values()) == sorted(shown.prediction.values(), reverse=True)


@pytest.mark.parametrize("layout", ["mask", "padded", "packed"])
def test_the_layout_does_not_matter(layout):
    reference, shown = traced(), traced(layout=layout)
    assert [token.layer for token in shown.tokens] == [token.layer for token in reference.tokens]
    for token, expected in zip(shown.tokens, reference.tokens, strict=True):
        assert token.score == pytest.approx(expected.score, abs=1e-4)


def test_tokens_tell_their_characters():
    shown = traced(pair="The grain & chaff.")
    for token in shown.tokens:
        if token.part is None:
            assert token.text in ("[CLS]", "[SEP]") and token.start is None and token.end is None
        elif token.text != "[UNK]":
            assert shown.texts[token.part][token.start : token.end].lower() == token.text.removeprefix("##")
    assert {token.part for token in shown.tokens} == {None, 0, 1}


@pytest.mark.parametrize("max_length", [None, 9])
@pytest.mark.parametrize("pair", [None, "Threshing  the chaff!"])
def test_the_text_reads_as_it_was_written(pair, max_length):
    shown = traced(pair=pair, max_length=max_length)
    parts = [string for string, token, _ in pieces(shown) if token is None or token.part is not None]
    assert "".join(parts) == TEXT + (pair or "")
    assert [token for _, token, _ in pieces(shown) if token] == list(shown.tokens)
    assert max_length is None or len(shown.tokens) == max_length


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_was_cut_does_not_look_like_what_survives(side):
    tokenizer = tiny_tokenizer()
    tokenizer.truncation_side = side
    shown = trace(tiny_model(TopK(keep=0.6)), tokenizer, f"  {TEXT}  ", max_length=9)
    (cut,) = (piece.string for piece in pieces(shown) if not piece.read)
    kept = [token for token in shown.tokens if token.part == 0]
    assert cut.strip() and len(kept) == 7
    whole = shown.texts[0]
    assert whole == (cut + whole[kept[0].start :] if side == "left" else whole[: kept[-1].end] + cut)
    page, text = html([shown]), terminal(shown)
    (grey,) = re.findall(r'<span class="cut" data-tip="[^"]*">(.*?)</span>', page, re.DOTALL)
    assert unescape(grey) == cut and f"{len(cut)} characters were cut" in page
    (dim,) = (text.plain[span.start : span.end] for span in text.spans if text.plain[span.start : span.end] == cut)
    assert dim == cut and "dim" in {str(span.style) for span in text.spans if text.plain[span.start : span.end] == cut}
    assert 'class="cut"' not in html([traced()]) and "were cut" not in html([traced()])


@pytest.mark.parametrize("columns, lines", [(60, 20), (80, 24), (120, 40)])
def test_a_long_text_fills_one_screen(columns, lines):
    shown = traced(text="\n".join([TEXT * 40] * 3), max_length=64)
    console = Console(width=columns, height=lines, file=io.StringIO())
    console.print(terminal(shown, console.size))
    printed = console.file.getvalue()
    assert len(printed.splitlines()) < lines and re.search(r"… [\d,]+ more lines", printed)
    assert "prediction" in printed and "layer  2" in printed
    short = [terminal(traced(), screen).plain.partition("\n\n")[0] for screen in (None, (columns, lines))]
    assert short[0] == short[1]


def test_a_character_of_several_tokens_is_shown_once():
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model = tiny_model(TopK(keep=0.5), vocab_size=256)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64)
    shown = trace(model, tokenizer, "a 😀 b")
    assert len(shown.tokens) == 8
    assert "".join(string for string, _, _ in pieces(shown)) == "a 😀 b"


def test_the_page_is_self_contained_and_escapes_the_text(tmp_path):
    shown = traced()
    page = html([shown, traced(text="wheat")], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert not re.search(r"https?://|\bsrc=|<link|@import|url\(", page)
    assert page.count("<script>") == page.count("</script>") == 1
    article = re.search(r"<article><p[^>]*>(.*?)</p>", page, re.DOTALL).group(1)
    assert unescape(re.sub(r"<[^>]*>", "", article)) == f"[CLS]{TEXT}[SEP]"
    assert article.count("<span") == article.count("data-tip=") == len(shown.tokens)
    assert article.count("data-step=") == sum(token.layer is not None for token in shown.tokens)
    for token in shown.tokens:
        where = "survives" if token.layer is None else f"leaves after layer {token.layer}"
        assert f"{token.text}: {where}, score {token.score:.2f}" in unescape(article)
    assert "prefers-color-scheme: dark" in page and 'type="range"' in page and 'max="3"' in page


def test_the_page_says_without_colours_what_leaves_where():
    """For keyboards and screen readers: a named slider, a text that can be focused, and a table of what leaves."""
    shown = traced()
    page = html([shown])
    assert 'for="fade"' in page and 'id="fade" type="range"' in page and 'role="status"' in page
    assert page.count("data-walk tabindex") == 1
    rows = re.findall(r"<tr><th scope=row class=first>(.*?)</th><td>(.*?)</td>.*?class=words>(.*?)</td></tr>", page)
    assert [name for name, _, _ in rows] == [*map(str, shown.left), "to the end"]
    for (_, left, words), layer in zip(rows, [*shown.left, None], strict=True):
        gone = [token.text for token in shown.tokens if token.layer == layer]
        assert unescape(words) == " ".join(gone) and left == ("" if layer is None else str(shown.left[layer]))


def test_the_terminal_shows_text_legend_and_prediction():
    shown = traced()
    result = terminal(shown)
    first, _, legend = result.plain.partition("\n\n")
    assert first == f" [CLS] {TEXT} [SEP] "
    styles = [str(span.style) for span in result.spans if span.end <= len(first)]
    assert styles.count("bold") == sum(token.layer is None for token in shown.tokens)
    assert sum(" on #" in style for style in styles) == sum(token.layer is not None for token in shown.tokens)
    for layer, left in shown.left.items():
        assert re.search(rf"layer +{layer}: +{left} left", legend)
    assert all(f"{label} {value:.1%}" in legend for label, value in shown.prediction.items())


@pytest.mark.parametrize("steps", [1, 2, 5, 24])
def test_colours_rise_in_lightness_and_contrast_with_their_text(steps):
    def luminance(colour: str) -> float:
        values = (value / 255 for value in bytes.fromhex(colour[1:]))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in values]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    pairs = [(luminance(background), luminance(text)) for background, text in ramp(steps)]
    assert [background for background, _ in pairs] == sorted({background for background, _ in pairs})
    assert all((max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5 for pair in pairs)


def test_regression_and_empty_texts():
    shown = traced(text="", num_labels=1)
    assert [token.text for token in shown.tokens] == ["[CLS]", "[SEP]"]
    assert not shown.probabilities and len(shown.prediction) == 1
    assert "%" not in terminal(shown).plain.rpartition("prediction")[2]
    assert "[SEP]" in html([shown])


def test_models_without_a_head_and_training_mode():
    model = prune(FAMILIES["bert"].build().bert, TopK(keep=0.6)).train()
    shown = trace(model, tiny_tokenizer(), "the wheat")
    assert shown.prediction == {} and "prediction: none" in terminal(shown).plain
    assert model.training and model.token_pruner.training


def test_what_cannot_be_shown():
    model, tokenizer = tiny_model(TopK()), tiny_tokenizer()
    with pytest.raises(ValueError, match="dense"):
        trace(unprune(model), tokenizer, "wheat")
    with pytest.raises(ValueError, match="fast tokenizer"):
        trace(prune(model, TopK()), object(), "wheat")
    with pytest.raises(ValueError, match="no text"):
        html([])


def test_the_positions_limit_the_text():
    torch.manual_seed(0)
    config = BertConfig(**FAMILIES["bert"].options, max_position_embeddings=16)
    model = prune(BertForSequenceClassification(config), TopK(keep=0.6))
    assert len(trace(model, tiny_tokenizer(), TEXT * 3).tokens) == 16
