// What is wrong with the page that is open; run by browser.py with the least contrast of texts and of large ones.
const seen = (e) => { const s = getComputedStyle(e), r = e.getBoundingClientRect();
  return s.visibility !== "hidden" && s.display !== "none" && +s.opacity > 0 && r.width > 1 && r.height > 1 };
const colour = (text) => { const c = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  c.fillStyle = text; c.fillRect(0, 0, 1, 1); const d = c.getImageData(0, 0, 1, 1).data; return [d[0], d[1], d[2], d[3] / 255] };
const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3]));
const light = (c) => { const [r, g, b] = c.map((v) => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b };
const cache = new Map(), known = (t) => cache.get(t) ?? cache.set(t, colour(t)).get(t);
const behind = (e) => { let found = [];
  for (; e; e = e.parentElement) { const c = known(getComputedStyle(e).backgroundColor); found.push(c); if (c[3] === 1) break }
  return found.reverse().reduce((under, c) => over(c, under), [255, 255, 255]) };
const faults = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), worst = new Map();
while (texts.nextNode()) { const node = texts.currentNode, e = node.parentElement;
  if (!node.data.trim() || e.closest("svg, script, style, noscript, [hidden]") || !seen(e)) continue;
  const s = getComputedStyle(e), under = behind(e), ink = over(known(s.color), under);
  if (!known(s.color)[3]) continue; // not shown until the slider has passed it
  const [a, b] = [light(ink), light(under)].sort((x, y) => y - x), ratio = (a + .05) / (b + .05);
  const large = parseFloat(s.fontSize) >= 24 || (parseFloat(s.fontSize) >= 18.66 && +s.fontWeight >= 700);
  if (ratio < (large ? arguments[1] : arguments[0])) {
    const name = e.tagName.toLowerCase() + [...e.classList].map((c) => "." + c).join("");
    if (!(worst.get(name)?.[0] < ratio)) worst.set(name, [ratio, node.data.trim().slice(0, 30)]) } }
for (const [name, [ratio, text]] of worst) faults.push(`contrast ${ratio.toFixed(2)} of ${name}: ${text}`);
for (const e of document.querySelectorAll("img:not([alt]), img[alt='']")) faults.push(`no alt text: ${e.src.slice(0, 80)}`);
for (const e of document.querySelectorAll("img"))
  if (e.complete && !e.naturalWidth) faults.push(`no such picture: ${e.src.slice(0, 80)}`);
const heads = [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].filter(seen).map((e) => +e.tagName[1]);
if (heads.filter((h) => h === 1).length !== 1) faults.push(`${heads.filter((h) => h === 1).length} headings of the first level`);
heads.forEach((h, i) => { if (i && h > heads[i - 1] + 1) faults.push(`a heading of level ${h} after one of ${heads[i - 1]}`) });
for (const e of document.querySelectorAll("input, button, a[href], select")) {
  const name = e.ariaLabel || e.title || e.textContent.trim() || [...(e.labels ?? [])].map((l) => l.textContent).join("")
    || e.placeholder || e.querySelector("img[alt], [aria-label]");
  if (!name && seen(e)) faults.push(`a ${e.tagName.toLowerCase()} without a name: ${e.outerHTML.slice(0, 80)}`) }
if (!document.documentElement.lang) faults.push("no language");
if (document.documentElement.scrollWidth > innerWidth) faults.push(`${document.documentElement.scrollWidth} pixels wide`);
const asked = performance.getEntriesByType("resource").map((r) => r.name).filter((n) => !n.startsWith(location.origin));
for (const name of asked) if (!name.startsWith("data:")) faults.push(`asks for ${name}`);
return faults;
