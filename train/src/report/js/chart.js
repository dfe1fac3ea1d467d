// Figures: a title, what there is to choose, a drawing, and what it says under the pointer.

const REDRAW = [];
const redrawAll = () => REDRAW.forEach((f) => f());
// how wide a chart is, is known when all that stand beside it are there
let pending = 0, onPaper = false, built = false;
addEventListener("resize", () => { cancelAnimationFrame(pending); pending = requestAnimationFrame(redrawAll); });
// Before printing the page still has the window's width. A chart drawn for that and scaled down to paper would have labels too small to read.
for (const [event, on] of [["beforeprint", true], ["afterprint", false]]) addEventListener(event, () => { onPaper = on; redrawAll(); });
matchMedia("print").addEventListener("change", redrawAll);
/** About what A4 and Letter have between their margins, for a chart over all of it and for one of two. */
const PAPER = { wide: 700, half: 334 };
function widthOf(plot) {
  if (onPaper) return plot.closest(".wide") ? PAPER.wide : PAPER.half;
  return Math.max(240, Math.floor(plot.clientWidth || 640));
}

/** Adds a figure. `spec.draw(svg, width)` draws and returns { height, label, picks }; `spec.legend()` returns [{ label, color, dash, mark, key }]. */
function figure(parent, spec) {
  const title = () => (typeof spec.title === "function" ? spec.title() : spec.title), heading = h("h3", {});
  const plot = h("div", { class: "plot" }), legend = h("div", { class: "legend" }), hidden = new Set();
  const node = h("figure", { class: spec.wide ? "wide" : null, "data-figure": spec.id },
    h("figcaption", {}, heading, spec.note && h("p", {}, spec.note)),
    spec.controls?.length ? h("div", { class: "bar" }, spec.controls) : null, spec.legend ? legend : null, plot);
  parent.append(node);
  const redraw = () => {
    heading.textContent = title();
    if (spec.legend) legend.replaceChildren(...keys(spec.legend(), hidden, redraw));
    const width = widthOf(plot), svg = s("svg", { role: "img", tabindex: 0 }), tip = h("div", { class: "tip", role: "status", hidden: true });
    const { height, label, picks } = spec.draw(svg, width, hidden);
    fill(svg, { viewBox: `0 0 ${width} ${height}`, "aria-label": `${title()}. ${label ?? ""}` }, []);
    plot.replaceChildren(svg, tip);
    if (picks?.items.length) readOut(svg, tip, picks, width, height);
  };
  REDRAW.push(redraw);
  if (built) redraw();
  return redraw;
}

function keys(items, hidden, redraw) {
  // of very many lines the read-out tells which is which
  if (items.length < 2 || items.length > 16) return [];
  return items.map(({ label, color, dash, mark, key = label }) => h("button", {
    type: "button", "aria-pressed": String(!hidden.has(key)), title: "show or hide",
    onclick: () => { if (!hidden.delete(key)) hidden.add(key); redraw(); },
  }, s("svg", { width: 22, height: 10, "aria-hidden": "true" }, s("line", { x1: 1, x2: 21, y1: 5, y2: 5, stroke: color, "stroke-width": 3, "stroke-dasharray": dash }), mark && markAt(mark, 11, 5, color)), label));
}

/** Shows what a drawing says at the pointer, or at the arrow keys. Picks: { kind: "x" | "cell", items: [{ x, y, w, h, head, lines: [[label, text, color]], dots }] }. */
function readOut(svg, tip, picks, width, height) {
  const over = s("g", { "pointer-events": "none", class: "over" });
  svg.append(over);
  let at = -1;
  const hide = () => { at = -1; tip.hidden = true; over.replaceChildren(); };
  const show = (i) => {
    at = i;
    const p = picks.items[i];
    const marks = picks.kind === "x"
      ? [s("line", { x1: p.x, x2: p.x, y1: picks.top, y2: picks.bottom, class: "base" }), (p.dots ?? []).map(([x, y, c]) => s("circle", { cx: x, cy: y, r: 3.5, fill: c, stroke: "var(--bg)", "stroke-width": 1.5 }))]
      : [s("rect", { x: p.x, y: p.y, width: p.w, height: p.h, fill: "none", stroke: "var(--ink)", "stroke-width": 1.6 })];
    over.replaceChildren(...marks.flat());
    tip.replaceChildren(h("b", {}, p.head), ...p.lines.map(([label, text, color]) => {
      const dot = color ? h("i", {}) : null;
      if (dot) dot.style.background = color;
      return h("div", {}, dot, label, h("span", {}, text));
    }));
    tip.hidden = false;
    const scale = svg.clientWidth / width || 1, px = (p.x + (p.w ?? 0) / 2) * scale, room = svg.clientWidth;
    const left = px > room / 2 ? px - tip.offsetWidth - 14 : px + 14;
    tip.style.left = `${Math.max(0, Math.min(left, room - tip.offsetWidth))}px`;
    tip.style.top = `${Math.max(0, (picks.kind === "x" ? picks.top : Math.min(p.y + p.h + 6, height - 20)) * scale)}px`;
  };
  const find = (e) => {
    const box = svg.getBoundingClientRect(), x = ((e.clientX - box.left) / box.width) * width, y = ((e.clientY - box.top) / box.height) * height;
    if (picks.kind === "cell") return picks.items.findIndex((p) => x >= p.x && x <= p.x + p.w && y >= p.y && y <= p.y + p.h);
    if (x < picks.left - 12 || x > picks.right + 12) return -1;
    let best = 0;
    picks.items.forEach((p, i) => { if (Math.abs(p.x - x) < Math.abs(picks.items[best].x - x)) best = i; });
    return best;
  };
  const move = (e) => { const i = find(e); if (i < 0) hide(); else if (i !== at) show(i); };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (e) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: picks.columns ?? 10, ArrowUp: -(picks.columns ?? 10), Home: -1e9, End: 1e9 }[e.key];
    if (e.key === "Escape") hide();
    if (step === undefined) return;
    e.preventDefault();
    show(Math.max(0, Math.min(picks.items.length - 1, at < 0 ? 0 : at + step)));
  });
}

/** Draws axes into `svg`; returns the scales and the area. An axis: { lo, hi, log, label, ticks }. */
function axes(svg, { width, height, x, y, left = 0, top = 0 }) {
  const yTicks = y.ticks ?? (y.log ? logTicksOf(y.lo, y.hi, 6) : ticksOf(y.lo, y.hi, Math.max(2, Math.min(6, height / 45))));
  if (y.format === percent) yTicks.forEach((t) => { t[1] = percent(t[0], 6); });
  const gutter = left || Math.max(...yTicks.map(([, t]) => t.length), 2) * 7 + 12;
  const area = { left: gutter, right: width - 12, top: top + (y.label ? 24 : 8), bottom: top + height - (x.label ? 40 : 24) };
  const scale = (a, from, to) => {
    const f = a.log ? Math.log10 : (v) => v, lo = f(a.lo), span = f(a.hi) - lo || 1;
    return (v) => from + ((f(v) - lo) / span) * (to - from);
  };
  const sx = scale(x, area.left, area.right), sy = scale(y, area.bottom, area.top);
  for (const [v, text] of yTicks) {
    svg.append(s("line", { x1: area.left, x2: area.right, y1: sy(v), y2: sy(v), class: "gridline" }),
      s("text", { x: area.left - 8, y: sy(v) + 4, "text-anchor": "end" }, text));
  }
  svg.append(s("line", { x1: area.left, x2: area.right, y1: area.bottom, y2: area.bottom, class: "base" }));
  const count = Math.max(2, Math.floor((area.right - area.left) / 90));
  for (const [v, text] of x.ticks ?? (x.log ? logTicksOf(x.lo, x.hi, count) : ticksOf(x.lo, x.hi, count))) {
    svg.append(s("line", { x1: sx(v), x2: sx(v), y1: area.bottom, y2: area.bottom + 4, class: "base" }),
      s("text", { x: sx(v), y: area.bottom + 18, "text-anchor": "middle" }, text));
  }
  if (y.label) svg.append(s("text", { x: 0, y: top + 11 }, y.label));
  if (x.label) svg.append(s("text", { x: area.right, y: area.bottom + 35, "text-anchor": "end" }, x.label));
  return { sx, sy, area };
}

/** Ticks at whole numbers, not too dense. */
function wholeTicks(values, room, text = String) {
  const every = Math.max(1, Math.ceil(values.length / Math.max(1, Math.floor(room / 26))));
  return values.filter((_, i) => i % every === 0).map((v) => [v, text(v)]);
}
