"use strict";
// What every other part uses: elements, numbers, colours. Text goes in as text, never as HTML.

addEventListener("error", (e) => { document.documentElement.dataset.error = `${e.message} (line ${e.lineno})`; });
addEventListener("unhandledrejection", (e) => { document.documentElement.dataset.error = String(e.reason); });

const DATA = JSON.parse(document.getElementById("data").textContent);

function fill(node, props, children) {
  for (const [key, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((c) => c !== null && c !== undefined && c !== false));
  return node;
}
/** An element. */
const h = (tag, props, ...children) => fill(document.createElement(tag), props, children);
/** An element of a drawing. */
const s = (tag, props, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);

const isNumber = (x) => typeof x === "number" && Number.isFinite(x);
const numbers = (list) => (list ?? []).filter(isNumber);
const mean = (list) => { const x = numbers(list); return x.length ? x.reduce((a, b) => a + b, 0) / x.length : null; };
const range = (n) => Array.from({ length: n }, (_, i) => i);
const extent = (list) => numbers(list).reduce(([a, b], x) => [Math.min(a, x), Math.max(b, x)], [Infinity, -Infinity]);

/** A number in four significant digits. */
function fmt(x, digits = 4) {
  if (!isNumber(x)) return "–";
  const size = Math.abs(x);
  if (x !== 0 && (size < 1e-4 || size >= 1e7)) return x.toExponential(2).replace("-", "−").replace("e+", "e");
  if (Number.isInteger(x)) return String(x).replace("-", "−");
  return String(Number(x.toPrecision(digits))).replace("-", "−");
}
const percent = (x, digits = 3) => (isNumber(x) ? `${fmt(100 * x, digits)} %` : "–");
const whole = (x) => (isNumber(x) ? Math.round(x).toLocaleString("en").replaceAll(",", "\u202f") : "–");

/** How many digits tell ticks of this size, a step apart, from one another. */
function digitsOf(size, step) {
  const place = Math.floor(Math.log10(step) + 1e-9), part = step / 10 ** place;
  return Math.max(1, Math.min(12, Math.floor(Math.log10(size) + 1e-9) - place + (Math.abs(part - Math.round(part)) < 1e-6 ? 1 : 2)));
}

/** A tick's text: short, with as many digits as neighbouring ticks need. */
function tickText(x, step) {
  const size = Math.abs(x), minus = x < 0 ? "−" : "";
  if (size === 0) return "0";
  if (size >= 1e12 || (size < 1e-3 && (!step || step < 1e-3))) {
    const [digits, power] = size.toExponential(step ? digitsOf(size, step) - 1 : 0).split("e");
    return `${minus}${Number(digits)}e${power.replace("+", "").replace("-", "−")}`;
  }
  if (size >= 1e4) {
    const [unit, name] = size >= 1e9 ? [1e9, "G"] : size >= 1e6 ? [1e6, "M"] : [1e3, "k"];
    return `${minus}${Number((size / unit).toPrecision(step ? digitsOf(size, step) : 4))}\u202f${name}`;
  }
  const places = step ? [0, 1, 2, 3, 4, 5, 6].find((p) => Math.abs(step * 10 ** p - Math.round(step * 10 ** p)) < 1e-6) ?? 6 : Math.max(0, 2 - Math.floor(Math.log10(size)));
  return minus + (step ? size.toFixed(Math.min(places, 6)) : String(Number(size.toFixed(Math.min(places, 6)))));
}

function ticksOf(lo, hi, count) {
  const raw = (hi - lo) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 2.5, 5, 10].find((m) => m * power >= raw * 0.999) ?? 10);
  const out = [];
  for (let i = Math.ceil(lo / step - 1e-9); i * step <= hi + step * 1e-9; i++) out.push([i * step, tickText(i * step, step)]);
  return out;
}

function logTicksOf(lo, hi, count) {
  const a = Math.floor(Math.log10(lo) + 1e-9), b = Math.ceil(Math.log10(hi) - 1e-9), out = [];
  const decades = Math.log10(hi / lo), every = Math.max(1, Math.ceil(decades / count));
  const within = decades < 1.2 ? [1, 2, 3, 5, 7] : decades < 2.5 ? [1, 2, 5] : decades < 4 ? [1, 3] : [1];
  for (let e = a; e <= b; e++) {
    if ((e - a) % every) continue;
    for (const m of within) {
      const x = m * 10 ** e;
      if (x >= lo * 0.999 && x <= hi * 1.001) out.push([x, tickText(x)]);
    }
  }
  return out.length > 1 ? out : ticksOf(lo, hi, count);
}

/** How a variant is drawn. */
const BASELINE = DATA.study ? DATA.study.results.variants.findIndex((v) => v.name === DATA.study.results.baseline) : -1;
function look(variant) {
  if (variant === BASELINE) return { color: "var(--ink)", dash: null };
  const slot = BASELINE >= 0 && variant > BASELINE ? variant - 1 : variant;
  return { color: `var(--c${slot % 8})`, dash: [null, "7 3", "2 3"][Math.floor(slot / 8) % 3] };
}
/** What runs train on and are scored by: tokens, or the labels of tasks. */
const SCORED = [...new Set(DATA.runs.map((r) => r.scored))].join(" or ");

/** Layers from pale to strong. */
const layerColor = (i, n) => `color-mix(in srgb, var(--heat) ${Math.round(100 - 74 * (n < 2 ? 0 : 1 - i / (n - 1)))}%, var(--c4))`;

/** A control that calls back with the chosen value. */
function select(label, options, value, change) {
  const list = h("select", { onchange: (e) => change(e.target.value) }, options.map(([v, text]) => h("option", { value: v, selected: v === value }, text)));
  return h("label", {}, label, list);
}
function check(label, value, change) {
  return h("label", {}, h("input", { type: "checkbox", checked: value, onchange: (e) => change(e.target.checked) }), label);
}
