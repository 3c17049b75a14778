"""The README's picture: a text in a pruned model, a line for each layer, with the tokens that are left.

python examples/classify.py && python benchmarks/leaving.py runs/classify/model    docs/img/leaving.svg, as it is there
python benchmarks/leaving.py MODEL --name NAME --text "..." --out FILE             of any model that ``show`` follows
"""

from __future__ import annotations

import argparse
from html import escape
from itertools import accumulate
from pathlib import Path

LETTER, LINE, LEFT, RIGHT, TOP = 7.25, 27, 96, 150, 40  # pixels: of a letter, a line, the margins
STYLE = """
text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #1a1a1a }
.page { fill: #fff } .bar { fill: #21918c } .rail { fill: #e4e4e4 } .soft { fill: #595959 } .gone { fill: #d0d0d0 }
.left { font-weight: 700 }
@media (prefers-color-scheme: dark) {
  text { fill: #f2f2f2 } .page { fill: #16181b } .rail { fill: #3a3e44 } .soft { fill: #b0b4ba } .gone { fill: #43484f }
  .bar { fill: #35b779 } }
"""


def drawn(trace, name: str) -> str:
    """The picture, as SVG; ``trace`` is of ``thresher.reports.trace.trace``."""
    words = [token.text.removeprefix("##") if token.part is not None else token.text for token in trace.tokens]
    starts = [0, *accumulate(len(word) + 1 for word in words)]
    width, layers = LEFT + RIGHT + LETTER * starts[-1], [None, *trace.left]
    height = TOP + LINE * len(layers) + 30
    lines = []
    for row, layer in enumerate(layers):
        base = TOP + LINE * row + 12
        left = len(words) if layer is None else trace.left[layer]
        lines.append(f'<text class="soft" x="8" y="{base}">{"the text" if layer is None else f"layer {layer}"}</text>')
        for word, start, token in zip(words, starts, trace.tokens, strict=False):
            here = layer is None or token.layer is None or token.layer > layer
            if here or token.layer == layer:  # what leaves here is shown once more, pale
                kind = "left" if here else "gone"
                x = LEFT + LETTER * start
                lines.append(f'<text class="{kind}" x="{x:.1f}" y="{base}">{escape(word)}</text>')
        x, full = width - RIGHT + 12, RIGHT - 60
        share = f'<rect class="bar" x="{x:.1f}" y="{base - 9}" width="{full * left / len(words):.1f}" height="10"/>'
        lines.append(f'<rect class="rail" x="{x:.1f}" y="{base - 9}" width="{full}" height="10"/>{share}')
        lines.append(f'<text class="soft" x="{x + full + 8:.1f}" y="{base}">{left}</text>')
    answer, chance = next(iter(trace.prediction.items()), ("", 0.0))
    told = f"{answer}, {chance:.0%}, with {trace.macs:.0%} of the dense model's work" if answer else f"{trace.macs:.0%}"
    lines.append(f'<text x="{LEFT}" y="{height - 14}">{escape(told)}</text>')
    lines.append(f'<text class="soft" x="8" y="20">{escape(name)}, pruned by {escape(trace.method)}</text>')
    lines.append(f'<text class="soft" x="{width - RIGHT + 12:.1f}" y="20">tokens left</text>')
    size = f'viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="tokens left, layer by layer">'
        f'<style>{STYLE}</style><rect class="page" width="100%" height="100%" rx="6"/>\n'
        + "\n".join(lines)
        + "\n</svg>\n"
    )


def main() -> None:
    """Trace the first sentence of an article, or the text that is given."""
    from thresher.data.load import load_task
    from thresher.data.models import load
    from thresher.evaluation.rows import whole
    from thresher.reports.trace import trace

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--name", default="MiniLM-L6 on BBC News")
    parser.add_argument("--text")
    parser.add_argument("--row", type=int, default=0, help="article of the test part")
    parser.add_argument("--tokens", type=int, default=22)
    parser.add_argument("--out", default=str(Path(__file__).parents[1] / "docs" / "img" / "leaving.svg"))
    options = parser.parse_args()
    text = options.text
    if text is None:
        task = load_task("bbc-news")
        text = task.test[options.row][task.text_columns[0]]
    net, tokenizer = load(options.model)
    with whole(options.out) as temporary:
        traced = trace(net, tokenizer, text, max_length=options.tokens)
        temporary.write_text(drawn(traced, options.name), encoding="utf-8")


if __name__ == "__main__":
    main()
