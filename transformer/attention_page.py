"""What a model looks at, as one self-contained HTML page: no network, light and dark, any width."""

import base64
import json
from html import escape

import torch
from torch import Tensor

from fusedformer.transformer.look import Attention, Look, Prediction

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --paper: #ffffff;
  --card: #f6f8fa; --line: #d1d9e0; --heat: #b54a00; --cold: #0b62b5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117;
  --card: #151b23; --line: #3d444d; --heat: #ff9e5e; --cold: #6cb6ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 3rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; }
.soft { color: var(--soft); }
button { font: inherit; color: inherit; background: none; border: 1px solid var(--line);
  border-radius: .4rem; cursor: pointer; }
button:focus-visible, .scroll:focus-visible { outline: 2px solid var(--heat); outline-offset: 1px; }
button[aria-pressed=true] { border-color: var(--heat); box-shadow: 0 0 0 1px var(--heat); }
.choice { display: flex; flex-wrap: wrap; gap: .4rem; margin: .75rem 0; }
.choice button { padding: .25rem .75rem; }
.parts { display: grid; gap: 1.25rem; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr);
  align-items: start; }
.heads { display: grid; gap: 3px; font-size: .7rem; color: var(--soft); align-items: center;
  max-width: 34rem; }
.heads span { text-align: center; }
.heads button { padding: 2px; line-height: 0; min-width: 0; }
.heads canvas { width: 100%; aspect-ratio: 1; image-rendering: pixelated; }
.words { display: flex; flex-wrap: wrap; gap: .25rem; margin: .3rem 0 .8rem; }
.words > * { padding: .1rem .4rem; border-radius: .35rem; min-height: 1.8rem; }
.words .key { border: 1px solid transparent; text-align: center; }
.words .key small { display: block; opacity: .8; font-size: .7rem; line-height: 1;
  font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
svg { display: block; max-width: none; }
svg text { fill: var(--ink); font-size: var(--size, 12px); }
svg .soft { fill: var(--soft); }
svg image { image-rendering: pixelated; }
#map rect.pick { fill: none; stroke: var(--ink); stroke-width: 1.5; }
#exact { min-height: 1.5em; font-variant-numeric: tabular-nums; }
.steps { display: grid; gap: .75rem; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); }
.steps > li { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .6rem .75rem; min-width: 0; }
.steps h3 { font-size: .95rem; font-weight: 500; margin: 0 0 .4rem; overflow-wrap: anywhere; }
.steps mark { background: none; color: var(--heat); font-weight: 700; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .75rem; }
.pair h4 { font-size: .75rem; font-weight: 400; color: var(--soft); margin: 0 0 .2rem; }
.bar { display: grid; grid-template-columns: minmax(0, 1fr) auto; font-size: .85rem;
  line-height: 1.3; margin-bottom: .25rem; }
.bar span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bar b { font-weight: 400; font-size: .75rem; font-variant-numeric: tabular-nums;
  color: var(--soft); }
.bar i { grid-column: 1 / 3; height: 3px; border-radius: 2px; background: var(--cold); }
.bar.target span { color: var(--heat); font-weight: 700; }
.bar.target i { background: var(--heat); }
@media (max-width: 44rem) { .parts { grid-template-columns: minmax(0, 1fr); } }
"""

# Weights come as 16-bit fixed point, so that the page stays small and is exact to 1/65535.
_SCRIPT = """
const look = JSON.parse(document.getElementById("look").textContent);
const find = id => document.getElementById(id);
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgb = hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));

function make(tag, attributes, parent, text) {
  const svg = ["svg", "g", "rect", "text", "image"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
                   : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function unpack(held) {
  const bytes = atob(held);
  return Float32Array.from({length: bytes.length / 2},
    (_, i) => (bytes.charCodeAt(2 * i) + 256 * bytes.charCodeAt(2 * i + 1)) / 65535);
}
for (const map of [...look.attentions, look.positions]) map.values = unpack(map.values);

// Paints rows x columns values, one pixel each; from 0 to 1, or from -1 to 1 in two colours.
function paint(canvas, values, rows, columns) {
  canvas.width = columns; canvas.height = rows;
  const [paper, heat, cold] = ["--paper", "--heat", "--cold"].map(name => rgb(colour(name)));
  const pixels = new ImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++) {
    const share = Math.abs(values[i]) ** 0.6, end = values[i] < 0 ? cold : heat;
    for (let c = 0; c < 3; c++)
      pixels.data[4 * i + c] = paper[c] + (end[c] - paper[c]) * share;
    pixels.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function image(values, rows, columns) {
  const canvas = document.createElement("canvas");
  paint(canvas, values, rows, columns);
  return canvas.toDataURL();
}

// The last word first: in a causal model the first one has no choice.
const state = {map: 0, layer: 0, head: 0, query: look.attentions[0].queries.length - 1};
const map = () => look.attentions[state.map];
function weights(layer, head) {
  const {values, heads, queries, keys} = map(), size = queries.length * keys.length;
  return values.subarray((layer * heads + head) * size, (layer * heads + head + 1) * size);
}
const percent = share => (100 * share).toFixed(share < 0.0995 ? 1 : 0) + "%";

function choices() {
  find("maps").replaceChildren();
  if (look.attentions.length < 2) return;
  look.attentions.forEach((one, i) => {
    const button = make("button", {"aria-pressed": i === state.map}, find("maps"), one.title);
    button.onclick = () => {
      Object.assign(state, {map: i, query: one.queries.length - 1});
      choices();
      heads();
    };
  });
}

function heads() {
  const one = map(), grid = find("heads");
  state.layer = Math.min(state.layer, one.layers - 1);
  state.head = Math.min(state.head, one.heads - 1);
  grid.replaceChildren();
  grid.style.gridTemplateColumns = `max-content repeat(${one.heads}, minmax(0, 1fr))`;
  make("span", {}, grid);
  for (let head = 0; head < one.heads; head++) make("span", {}, grid, head + 1);
  for (let layer = 0; layer < one.layers; layer++) {
    make("span", {}, grid, layer + 1);
    for (let head = 0; head < one.heads; head++) {
      const chosen = layer === state.layer && head === state.head;
      const button = make("button", {"aria-pressed": chosen,
        "aria-label": `layer ${layer + 1}, head ${head + 1}`}, grid);
      paint(make("canvas", {}, button), weights(layer, head), one.queries.length, one.keys.length);
      button.onclick = () => { Object.assign(state, {layer, head}); pick(grid, button); detail(); };
    }
  }
  detail();
}

function pick(group, button) {
  for (const other of group.querySelectorAll("button")) other.ariaPressed = other === button;
}

function detail() {
  const {queries, keys, title} = map(), values = weights(state.layer, state.head);
  find("which").textContent =
    `${title}, layer ${state.layer + 1}, head ${state.head + 1}`;
  const asked = find("queries");
  asked.replaceChildren();
  queries.forEach((word, i) => {
    const button = make("button", {"aria-pressed": i === state.query}, asked, word);
    button.onclick = () => { state.query = i; pick(asked, button); sentence(); };
  });
  heatmap(find("map"), values, queries, keys);
  sentence();
}

function sentence() {
  const {queries, keys} = map(), values = weights(state.layer, state.head);
  const answer = find("keys");
  answer.replaceChildren();
  keys.forEach((word, i) => {
    const share = values[state.query * keys.length + i];
    const key = make("span", {class: "key"}, answer, word);
    key.style.background = `color-mix(in srgb, var(--heat) ${70 * share ** 0.6}%, transparent)`;
    make("small", {}, key, share < 0.0005 ? "\\u00b7" : percent(share));
  });
  const row = find("map").querySelector(".pick");
  row.setAttribute("y", row.dataset.top * 1 + row.dataset.cell * state.query);
}

function heatmap(place, values, queries, keys) {
  const widest = words => Math.min(9, Math.max(...words.map(word => word.length)));
  const cut = word => word.length > 9 ? word.slice(0, 8) + "\\u2026" : word;
  const left = 12 + 7.6 * widest(queries), top = 12 + 7.6 * widest(keys);
  const room = Math.min(560, place.clientWidth - 4) - left;
  const cell = Math.max(9, Math.min(28, room / keys.length));
  const width = keys.length * cell, height = queries.length * cell;
  const svg = make("svg", {width: left + width + 2, height: top + height + 2, role: "img",
    "aria-label": "each row: what one word looks at", style: `--size: ${Math.min(12, cell)}px`});
  make("image", {href: image(values, queries.length, keys.length), x: left, y: top, width, height,
    preserveAspectRatio: "none"}, svg);
  queries.forEach((word, i) => make("text", {x: left - 6, y: top + cell * (i + .5),
    "text-anchor": "end", "dominant-baseline": "central"}, svg, cut(word)));
  keys.forEach((word, i) => make("text", {"dominant-baseline": "central",
    transform: `translate(${left + cell * (i + .5)} ${top - 6}) rotate(-90)`}, svg, cut(word)));
  const row = make("rect", {class: "pick", x: left, width, height: cell}, svg);
  Object.assign(row.dataset, {top, cell});
  const point = event => {
    const box = svg.getBoundingClientRect();
    const i = Math.floor((event.clientY - box.top - top) / cell);
    const j = Math.floor((event.clientX - box.left - left) / cell);
    if (!(i in queries && j in keys)) return;
    find("exact").textContent = `\\u201c${queries[i]}\\u201d looks at ` +
      `\\u201c${keys[j]}\\u201d: ${values[i * keys.length + j].toFixed(4)}`;
    if (event.type === "click") {
      state.query = i;
      pick(find("queries"), find("queries").children[i]);
      sentence();
    }
  };
  svg.onpointermove = svg.onclick = point;
  place.replaceChildren(svg);
}

function positions() {
  const {values, rows, columns} = look.positions, place = find("positions");
  const left = 34, top = 8, width = 640, height = Math.max(120, Math.min(360, 4 * rows));
  const svg = make("svg", {width: left + width + 24, height: top + height + 34, role: "img",
    "aria-label": "the positional encoding: a row for each position"});
  make("image", {href: image(values.map(value => 2 * value - 1), rows, columns), x: left, y: top,
    width, height, preserveAspectRatio: "none"}, svg);
  const mark = (x, y, anchor, text) =>
    make("text", {x, y, "text-anchor": anchor, class: "soft"}, svg, text);
  for (const i of [0, rows >> 1, rows - 1])
    mark(left - 6, top + height * (i + .5) / rows + 4, "end", i);
  for (const j of [0, columns >> 1, columns - 1])
    mark(left + width * (j + .5) / columns, top + height + 16, "middle", j);
  mark(left + width / 2, top + height + 31, "middle", "dimension");
  place.replaceChildren(svg);
}

function draw() {
  choices();
  heads();
  positions();
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
"""


def page(look: Look) -> str:
    """The whole page; its pictures are drawn by its own script."""
    data = {
        "attentions": [_attention(one) for one in look.attentions],
        "positions": _positions(look.positions),
    }
    parts = [
        f"<h1>{escape(look.title)}</h1>",
        f'<p class="soft">{escape(look.about)}</p>',
        _ATTENTION,
        _predictions(look.predictions) if look.predictions else "",
        _POSITIONS.format(about=escape(look.positions_about)),
        # A word of the text might end or open a script: JSON can do without "<".
        f'<script type="application/json" id="look">'
        f"{json.dumps(data, ensure_ascii=False).replace('<', _LESS)}</script>",
        f"<script>{_SCRIPT}</script>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(look.title)}</title>\n"
        f"<style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


_LESS = "\\u003c"

_ATTENTION = """
<h2>Which word looks at which</h2>
<p>Each square is a head: a row for each word, and in it the weights, which add up to 1, of the
words that it looks at. Choose a head, then a word.</p>
<div class="choice" id="maps"></div>
<div class="parts">
<div><p class="soft">Layers from top to bottom, heads from left to right</p>
<div class="heads" id="heads"></div></div>
<div><p><strong id="which"></strong></p>
<p class="soft">This word</p><div class="words" id="queries"></div>
<p class="soft">looks at</p><div class="words" id="keys"></div>
<p id="exact" class="soft">Point at a square for its exact weight.</p>
<div class="scroll" id="map" tabindex="0" role="region" aria-label="the weights of this head"></div>
</div></div>
<noscript><p>This page draws with JavaScript; the PNG files beside it need none.</p></noscript>"""

_POSITIONS = """
<h2>Positions</h2>
<p>{about} A row for each position, a column for each dimension; one colour is negative, the other
positive.</p>
<div class="scroll" id="positions" tabindex="0" role="region" aria-label="positions"></div>"""


def _packed(values: Tensor) -> str:
    """Values from 0 to 1 as base64 of little-endian 16-bit fixed point."""
    fixed = (values.double().clamp(0, 1) * 65535).round().to(torch.int32).flatten()
    both = torch.stack([fixed & 255, fixed >> 8], dim=-1).to(torch.uint8)
    return base64.b64encode(bytes(both.flatten().tolist())).decode("ascii")


def _attention(one: Attention) -> dict:
    layers, heads = one.weights.shape[:2]
    return {
        "title": one.title,
        "layers": layers,
        "heads": heads,
        "queries": one.queries,
        "keys": one.keys,
        "values": _packed(one.weights),
    }


def _positions(positions: Tensor) -> dict:
    rows, columns = positions.shape
    largest = float(positions.abs().max()) or 1.0
    return {
        "rows": rows,
        "columns": columns,
        "values": _packed((positions / largest + 1) / 2),
    }


def _predictions(predictions: list[Prediction]) -> str:
    steps = "".join(
        f"<li><h3>{escape(one.read)} → <mark>{escape(one.target)}</mark></h3>"
        f'<div class="pair">{_bars("untrained", one.target, one.before, one.target_before)}'
        f"{_bars('trained', one.target, one.after, one.target_after)}</div></li>"
        for one in predictions
    )
    return (
        "<h2>What comes next</h2>\n"
        "<p>At each step: what the model has just read, its target, and the words that it holds "
        "for the likeliest, with random weights and as trained. The target is marked.</p>\n"
        f'<ol class="steps">{steps}</ol>'
    )


def _bars(
    title: str, target: str, likeliest: list[tuple[str, float]], target_prob: float
) -> str:
    if target not in (word for word, _ in likeliest):
        likeliest = [*likeliest, (target, target_prob)]
    bars = "".join(
        f'<div class="bar{" target" if word == target else ""}"><span>{escape(word)}</span>'
        f'<b>{prob:.1%}</b><i style="width:{max(prob, 0.004):.1%}"></i></div>'
        for word, prob in likeliest
    )
    return f"<div><h4>{title}</h4>{bars}</div>"
