"""The frame of every page: one look in light and dark, a slider, tips for pointer and keyboard, tables that sort.

A page holds all that it needs. What a pointer or the arrow keys find is an element with ``data-tip`` within one with
``data-walk``; what the slider fades has ``data-step``; a head of a column that sorts is a button.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from html import escape

from ..evaluation.rows import whole

# viridis: even steps of lightness, told apart by the colour-blind as well (Smith and van der Walt, 2015)
VIRIDIS = ("440154", "482475", "414487", "355f8d", "2a788e", "21918c", "22a884", "44bf70", "7ad151", "bddf26")
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --soft: #595959; --line: #ccc; --card: #f7f7f5;
  --mark: #21697c; --worse: #b34a00 }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --ink: #f2f2f2; --soft: #b0b4ba; --line: #3a3e44; --card: #1e2125; --mark: #56b4c9;
    --worse: #ff8f4d } }
body { margin: 0; background: var(--page); color: var(--ink); font: 17px/1.5 system-ui, "Segoe UI", Roboto, sans-serif }
main { max-width: 50rem; margin: auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 1.6rem 0 .3rem }
small { display: block; color: var(--soft); font-size: .88rem }
:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px }
.slider { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .8rem; padding: .7rem 0 }
.slider { background: var(--page) } .slider input { flex: 1 1 14rem; accent-color: #21918c } output { min-width: 7rem }
article { margin-bottom: 1.3rem; padding: 1rem 1.2rem; background: var(--card); border-radius: .6rem }
article, p .special { border: 1px solid var(--line) }
p { font-size: 1.1rem; line-height: 2; margin: 0 0 .6rem; white-space: pre-wrap; overflow-wrap: anywhere }
p span { padding: .12em 0; border-radius: .2em; font-weight: 700 } p [data-step] { font-weight: 400 }
p .special { font-size: .75em; padding: .2em .4em; margin: 0 .2em }
[data-walk] :hover, [data-walk] .here { outline: 2px solid var(--ink) }
p .cut { font-weight: 400; font-style: italic; color: color-mix(in srgb, var(--soft) 88%, var(--card)) }
p .cut::before { content: "\\2702\\00a0"; font-style: normal }
p .gone { background: none; color: color-mix(in srgb, var(--soft) 85%, var(--card)) }
ul { display: flex; flex-wrap: wrap; gap: .35rem; list-style: none; margin: .7rem 0 .4rem; padding: 0 }
li, #tip { padding: .1rem .5rem; border-radius: .3rem; font-size: .82rem }
#tip { position: fixed; z-index: 2; background: var(--ink); color: var(--page); white-space: pre-line }
table { border-collapse: collapse; width: 100%; font-size: .85rem; margin: .6rem 0 } .wide { overflow-x: auto }
th, td { padding: .25rem .45rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 600 }
th.first, td.first { text-align: left; color: inherit; font-weight: inherit }
thead th, thead th.first { vertical-align: bottom; color: var(--soft); font-weight: 600 }
td { white-space: nowrap }
td.words { text-align: left; white-space: normal; overflow-wrap: anywhere }
th button { all: unset; cursor: pointer; text-decoration: underline dotted }
th button:focus-visible { outline: 2px solid }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
details { margin: .4rem 0 0; font-size: .88rem } summary { cursor: pointer; color: var(--soft) }
svg.interval { width: 9rem; height: 1.1rem; vertical-align: middle }
svg .zero, svg .whole { stroke: var(--soft) } svg .whole { opacity: .6 }
svg .span { stroke: var(--mark); stroke-width: 2 } svg .at { fill: var(--mark) } .worse .span { stroke: var(--worse) }
.worse svg .at { fill: var(--worse) }
"""
SCRIPT = """
const all = (what, within = document) => [...within.querySelectorAll(what)];
const slider = document.querySelector(".slider input"), tip = document.querySelector("#tip");
const fade = () => {
  const name = JSON.parse(slider.dataset.names)[slider.value];
  document.querySelector("output").textContent = name;
  slider.setAttribute("aria-valuetext", name);
  for (const token of all("[data-step]")) token.classList.toggle("gone", +token.dataset.step <= +slider.value);
};
if (slider) { slider.oninput = fade; fade(); }
const show = (token) => {
  for (const other of all(".here")) other.classList.remove("here");
  tip.hidden = !token;
  if (!token) return;
  const box = token.getClientRects()[0];
  tip.textContent = token.dataset.tip;
  const below = box.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.top = `${below ? box.bottom + 6 : box.top - 6 - tip.offsetHeight}px`;
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
};
document.onpointerover = ({ target }) => show(target.closest("[data-tip]"));
document.onfocusout = () => show(null);
document.onkeydown = (event) => {
  const place = event.target.closest("[data-walk]"), row = +(place?.dataset.walk || 0) || 12;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: row, ArrowUp: -row }[event.key];
  if (event.key === "Escape") show(null);
  if (!place || !step) return;
  event.preventDefault();
  const tokens = all("[data-tip]", place), at = tokens.findIndex((one) => one.classList.contains("here"));
  const next = tokens[Math.max(0, Math.min(tokens.length - 1, at < 0 ? 0 : at + step))];
  next.scrollIntoView({ block: "nearest" });
  show(next);
  next.classList.add("here");
};
for (const button of all("th button")) button.onclick = () => {
  const head = button.closest("th"), body = head.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") !== "descending";
  for (const other of all("th", head.parentElement)) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent;
  const order = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const less = isNaN(x) || isNaN(y) ? y.localeCompare(x) : y - x;
    return down ? less : -less;
  };
  body.append(...[...body.rows].sort(order));
};
for (const choice of all("[data-shows]")) choice.onchange = () => {
  for (const other of all(`[name="${choice.name}"]`))
    document.getElementById(other.dataset.shows).toggleAttribute("hidden", !other.checked);
};
"""


def page(
    title: str,
    intro: str,
    body: str,
    layers: Sequence[int],
    path: str | os.PathLike | None = None,
    style: str = "",
) -> str:
    """Frame ``body`` as a page, with the colours of its ``layers``; ``intro`` and ``body`` are HTML.

    Written aside and moved to ``path``, if there is one.
    """
    colours = "".join(f".s{i} {{ background: {b}; color: {f} }}\n" for i, (b, f) in enumerate(ramp(len(layers)), 1))
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}{colours}{style}</style></head>
<body><main><h1>{title}</h1>
<small>{intro}</small>
{body}</main><div id="tip" role="status" hidden></div>
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
    return f"""<label class="slider" for="fade">Fade what has left: <output></output>
<input id="fade" type="range" min="0" max="{len(layers)}" value="0" data-names="{names}"></label>
"""


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


def interval(at: float, ends: tuple[float, float], scale: tuple[float, float], whole_at: float | None = None) -> str:
    """Draw a value and its interval on a scale that holds 0; dashed: ``whole_at``. The figures stand beside it."""
    low, high = scale
    place = lambda value: round(3 + 194 * (value - low) / ((high - low) or 1), 1)  # noqa: E731
    dashed = "" if whole_at is None else f'<path class="whole" stroke-dasharray="3" d="M{place(whole_at)} 0V20"/>'
    return (
        f'<svg class="interval" viewBox="0 0 200 20" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="zero" d="M{place(0)} 0V20"/>{dashed}'
        f'<path class="span" d="M{place(ends[0])} 10H{place(ends[1])}"/>'
        f'<circle class="at" cx="{place(at)}" cy="10" r="3.5"/></svg>'
    )
