// Kinds of drawings: lines, heat maps, histograms, differences.

function pathOf(xs, ys, sx, sy) {
  let d = "", pen = false;
  xs.forEach((x, i) => {
    if (!isNumber(x) || !isNumber(ys[i])) { pen = false; return; }
    d += `${pen ? "L" : "M"}${sx(x).toFixed(1)} ${sy(ys[i]).toFixed(1)}`;
    pen = true;
  });
  return d;
}
function bandOf(xs, lo, hi, sx, sy) {
  const at = range(xs.length).filter((i) => isNumber(xs[i]) && isNumber(lo[i]) && isNumber(hi[i]));
  if (at.length < 2) return "";
  const line = (is, ys) => is.map((i) => `${sx(xs[i]).toFixed(1)} ${sy(ys[i]).toFixed(1)}`).join("L");
  return `M${line(at, hi)}L${line(at.reverse(), lo)}Z`;
}

/** A mark on a line: a dot, or a `ring` or a `diamond`, which are open. */
function markAt(kind, x, y, color) {
  const open = { fill: "var(--bg)", stroke: color, "stroke-width": 1.7 };
  if (kind === "diamond") return s("path", { d: `M${x - 5} ${y}L${x} ${y - 5}L${x + 5} ${y}L${x} ${y + 5}Z`, ...open });
  return s("circle", { cx: x, cy: y, r: 3, ...(kind === "ring" ? open : { fill: color }) });
}

/**
 * Lines. A series: { label, key, x, y, color, dash, thin, dots, mark, loose, band: { lo, hi }, quiet }; `loose` ones are marks without a line, `quiet` ones are
 * not read out.
 * Axes: { label, log, format, ticks, domain }. `spec.clip` leaves the y-axis to values behind that part of the x-axis.
 */
function drawLines(svg, width, spec) {
  const clean = (log, v) => (isNumber(v) && (!log || v > 0) ? v : null);
  const series = spec.series.map((l) => ({ ...l, x: l.x.map((v) => clean(spec.x.log, v)), y: l.y.map((v) => clean(spec.y.log, v)) })).filter((l) => numbers(l.y).length);
  const height = spec.height ?? 270;
  if (!series.length) {
    svg.append(s("text", { x: 0, y: 24 }, "All lines are hidden, or there is nothing to draw."));
    return { height: 40, label: "Nothing to draw.", picks: null };
  }
  let [x0, x1] = spec.x.domain ?? extent(series.flatMap((l) => l.x));
  const from = spec.clip ? x0 + (x1 - x0) * spec.clip : -Infinity;
  const seen = (l) => l.y.filter((_, i) => l.x[i] >= from || l.x.length < 12);
  const bands = series.flatMap((l) => (l.band && !l.wideBand ? [...l.band.lo, ...l.band.hi].filter((v, i) => clean(spec.y.log, v) !== null && l.x[i % l.x.length] >= from) : []));
  let [y0, y1] = spec.y.domain ?? extent([...series.flatMap(seen), ...bands]);
  const sole = x0 === x1 && !spec.x.ticks ? [[x0, fmt(x0)]] : spec.x.ticks;
  if (x0 === x1) [x0, x1] = spec.x.log ? [x0 / 2, x1 * 2] : [x0 - 1, x1 + 1];
  if (y0 === y1) [y0, y1] = spec.y.log ? [y0 / 2, y1 * 2] : [y0 - Math.max(Math.abs(y0) * 0.1, 1e-6), y1 + Math.max(Math.abs(y1) * 0.1, 1e-6)];
  if (!spec.y.domain) {
    if (spec.y.log) { const pad = (y1 / y0) ** 0.05; y0 /= pad; y1 *= pad; }
    else { const pad = (y1 - y0) * 0.05; y0 = spec.y.zero ? Math.min(0, y0) : y0 - pad; y1 += pad; }
  }
  const { sx, sy, area } = axes(svg, { width, height, x: { ...spec.x, ticks: sole, lo: x0, hi: x1 }, y: { ...spec.y, lo: y0, hi: y1 } });
  const clip = `clip${drawLines.count = (drawLines.count ?? 0) + 1}`;
  svg.append(s("clipPath", { id: clip }, s("rect", { x: area.left - 5, y: area.top - 5, width: area.right - area.left + 10, height: area.bottom - area.top + 6, "data-clip": true })));
  const inside = s("g", { "clip-path": `url(#${clip})` });
  svg.append(inside);
  for (const l of series) if (l.band) inside.append(s("path", { d: bandOf(l.x, l.band.lo, l.band.hi, sx, sy), fill: l.color, "fill-opacity": l.thin ? 0.1 : 0.18 }));
  for (const l of series) {
    if (!l.loose) inside.append(s("path", { d: pathOf(l.x, l.y, sx, sy), fill: "none", stroke: l.color, "stroke-width": l.thin ? 1 : 2, "stroke-opacity": l.thin ? 0.55 : 1, "stroke-dasharray": l.dash, "stroke-linejoin": "round" }));
    if (l.dots || numbers(l.y).length === 1) l.y.forEach((y, i) => { if (isNumber(y) && isNumber(l.x[i])) inside.append(markAt(l.mark, sx(l.x[i]), sy(y), l.color)); });
  }
  for (const m of spec.marks ?? []) {
    if (m.x < x0 || m.x > x1) continue;
    inside.append(s("path", { d: `M${sx(m.x) - 5} ${area.top}h10l-5 8z`, fill: m.color }), s("line", { x1: sx(m.x), x2: sx(m.x), y1: area.top, y2: area.bottom, stroke: m.color, "stroke-opacity": 0.35, "stroke-dasharray": "2 3" }));
  }
  const read = series.filter((l) => !l.quiet), columns = new Map();
  read.forEach((l) => l.x.forEach((x, i) => {
    if (!isNumber(x) || !isNumber(l.y[i])) return;
    const px = Math.round(sx(x) * 2) / 2;
    if (!columns.has(px)) columns.set(px, { x: px, head: (spec.x.head ?? spec.x.format ?? fmt)(x), lines: [], dots: [] });
    const c = columns.get(px);
    c.lines.push([l.label, (spec.y.format ?? fmt)(l.y[i]) + (l.err && isNumber(l.err[i]) ? ` ± ${fmt(l.err[i], 2)}` : "") + (l.note?.[i] ?? ""), l.color, l.y[i]]);
    if (sy(l.y[i]) >= area.top - 6) c.dots.push([sx(x), sy(l.y[i]), l.color]);
  }));
  const items = [...columns.values()].sort((a, b) => a.x - b.x);
  items.forEach((c) => { c.lines.sort((a, b) => b[3] - a[3]); if (c.lines.length > 14) c.lines = [...c.lines.slice(0, 7), ["…", "", null], ...c.lines.slice(-6)]; });
  const ends = read.slice(0, 6).map((l) => `${l.label} ends at ${(spec.y.format ?? fmt)(numbers(l.y).at(-1))}`).join("; ");
  return { height, label: `${spec.y.label} by ${spec.x.label}. ${ends}.`, picks: { kind: "x", items, top: area.top, bottom: area.bottom, left: area.left, right: area.right } };
}

/** A figure of lines; `spec.of()` returns what `drawLines` takes, so that controls can change it. */
function lines(parent, spec) {
  const all = () => spec.of();
  return figure(parent, {
    ...spec,
    legend: () => { const seen = new Map(); all().series.forEach((l) => { if (!seen.has(l.key ?? l.label)) seen.set(l.key ?? l.label, { label: l.key ?? l.label, color: l.color, dash: l.dash, mark: l.mark }); }); return [...seen.values()]; },
    draw: (svg, width, hidden) => { const d = all(); return drawLines(svg, width, { ...d, series: d.series.filter((l) => !hidden.has(l.key ?? l.label)) }); },
  });
}

/** A name in so many characters; names often differ at their ends alone. */
const cut = (name, n) => (name.length <= n ? name : `${name.slice(0, Math.ceil(n / 2) - 1)}…${name.slice(-Math.floor(n / 2))}`);

/** Heat maps side by side on one colour scale. A panel: { label, rows: [{ label, values }], cells(row, column) → text }. */
function drawHeat(svg, width, { panels, domain, rowName, columnName, format = fmt, unit, columnText = String }) {
  const [lo, hi] = domain ?? extent(panels.flatMap((p) => p.rows.flatMap((r) => r.values)));
  const most = Math.max(...panels.map((p) => Math.max(...p.rows.map((r) => r.values.length))));
  const gutter = 34, roomy = most <= 8 && panels.length < 4, cell = Math.min(roomy ? 54 : 30, (Math.min(width, most > 48 ? 1100 : 520) - gutter) / most), gap = cell > 5 ? 1 : 0, tall = Math.max(...panels.map((p) => p.rows.length)) > 16 ? 11 : roomy ? 28 : 22;
  const panelWidth = Math.max(gutter + cell * most, 130) + 26, across = Math.max(1, Math.min(panels.length, Math.floor((width + 26) / panelWidth))), room = Math.floor((panelWidth - 8) / 8);
  const titled = panels.length > 1, items = [], short = (v) => { const text = format(v, 2); return text.includes("e−") ? "≈ 0" : text; };
  let top = 30;
  // the colours' scale
  const id = `ramp${drawHeat.count = (drawHeat.count ?? 0) + 1}`;
  svg.append(s("linearGradient", { id }, [0.04, 1].map((o, i) => s("stop", { offset: i, "stop-color": "var(--heat)", "stop-opacity": o }))), s("rect", { x: gutter, y: 0, width: 160, height: 9, rx: 2, fill: `url(#${id})`, "data-scale": true }));
  svg.append(s("text", { x: gutter - 6, y: 9, "text-anchor": "end", class: "small" }, format(lo, 2)), s("text", { x: gutter + 166, y: 9, class: "small" }, `${format(hi, 2)}${unit ? ` ${unit}` : ""}`));
  for (let first = 0; first < panels.length; first += across) {
    const row = panels.slice(first, first + across), rows = Math.max(...row.map((p) => p.rows.length));
    row.forEach((p, k) => {
      const left = k * panelWidth, y0 = top + (titled ? 18 : 0);
      if (titled) svg.append(s("text", { x: left + gutter, y: top + 9, class: "strong" }, cut(p.label, room)));
      p.rows.forEach((r, i) => {
        if (tall > 15 || i % 4 === 0) svg.append(s("text", { x: left + gutter - 7, y: y0 + i * tall + tall / 2 + 4, "text-anchor": "end", class: "small" }, r.label));
        r.values.forEach((v, j) => {
          const part = isNumber(v) ? (hi > lo ? Math.max(0, Math.min(1, (v - lo) / (hi - lo))) : 0.5) : null, x = left + gutter + j * cell, y = y0 + i * tall;
          svg.append(s("rect", { x: x + gap / 2, y: y + 0.5, width: cell - gap, height: tall - 1, rx: gap * 2, fill: part === null ? "none" : "var(--heat)", stroke: part === null ? "var(--line)" : "none", "fill-opacity": part === null ? 0 : 0.04 + 0.96 * part }));
          if (cell >= 44 && part !== null) svg.append(s("text", { x: x + cell / 2, y: y + tall / 2 + 4, "text-anchor": "middle", class: "small", style: `fill:var(${part > 0.5 ? "--bg" : "--ink"})` }, short(v)));
          items.push({ x, y, w: cell, h: tall, head: titled ? p.label : `${rowName} ${r.label}, ${columnName} ${columnText(j)}`, lines: [[titled ? `${rowName} ${r.label}, ${columnName} ${columnText(j)}` : unit ?? "value", format(v)]] });
        });
      });
      const y1 = y0 + p.rows.length * tall, n = Math.max(...p.rows.map((r) => r.values.length));
      wholeTicks(range(n), n * cell, columnText).forEach(([j, t]) => svg.append(s("text", { x: left + gutter + (j + 0.5) * cell, y: y1 + 13, "text-anchor": "middle", class: "small" }, t)));
      svg.append(s("text", { x: left + gutter, y: y1 + 28, class: "small" }, `${columnName} (rows: ${rowName})`));
    });
    top += rows * tall + (titled ? 18 : 0) + 46;
  }
  return { height: top - 12, label: `Colours from ${format(lo)} to ${format(hi)}. ${panels.map((p) => `${p.label}: mean ${format(mean(p.rows.flatMap((r) => r.values)))}`).join("; ")}.`, picks: { kind: "cell", items, columns: most } };
}

/** Histograms, small, side by side. A panel: { label, sub, from, to, counts, color }. */
function drawHistograms(svg, width, panels) {
  const across = Math.max(1, Math.min(panels.length, Math.floor((width + 20) / 190))), w = Math.min(300, (width + 20) / across - 20), tall = 74, items = [];
  panels.forEach((p, i) => {
    const left = (i % across) * (w + 20), top = Math.floor(i / across) * (tall + 66), base = top + 36 + tall;
    const total = p.counts.reduce((a, b) => a + b, 0) || 1, most = Math.max(...p.counts, 1), step = w / p.counts.length;
    svg.append(s("text", { x: left, y: top + 11, class: "strong" }, p.label), s("text", { x: left, y: top + 26, class: "small" }, p.sub));
    svg.append(s("line", { x1: left, x2: left + w, y1: base, y2: base, class: "base" }));
    p.counts.forEach((c, j) => {
      const high = (c / most) * tall, at = p.from + ((p.to - p.from) * j) / p.counts.length, end = p.from + ((p.to - p.from) * (j + 1)) / p.counts.length;
      if (c > 0) svg.append(s("rect", { x: left + j * step, y: base - Math.max(high, 0.7), width: Math.max(step - 0.6, 0.5), height: Math.max(high, 0.7), fill: p.color }));
      items.push({ x: left + j * step, y: base - tall, w: step, h: tall, head: p.label, lines: [[`${fmt(at, 3)} to ${fmt(end, 3)}`, percent(c / total)]] });
    });
    [[p.from, "start"], [(p.from + p.to) / 2, "middle"], [p.to, "end"]].forEach(([v, anchor], k) => svg.append(s("text", { x: left + (w * k) / 2, y: base + 14, "text-anchor": anchor, class: "small" }, fmt(v, 2))));
  });
  return { height: Math.ceil(panels.length / across) * (tall + 66) - 4, label: panels.map((p) => `${p.label}: ${p.sub}`).join("; "), picks: { kind: "cell", items } };
}

/** Rows with a mean, its error and single values. A row: { label, mean, err, points: [[label, value]], color }. */
function drawRows(svg, width, { rows, label, zero }) {
  const gutter = Math.min(200, width * 0.36, Math.max(...rows.map((r) => r.label.length)) * 7 + 16), tall = 30, items = [];
  let [lo, hi] = extent(rows.flatMap((r) => [r.mean - (r.err ?? 0), r.mean + (r.err ?? 0), ...r.points.map((p) => p[1])]));
  if (zero) [lo, hi] = [Math.min(lo, 0), Math.max(hi, 0)];
  if (lo === hi) [lo, hi] = [lo - 1, hi + 1];
  const pad = (hi - lo) * 0.06, bottom = rows.length * tall + 8;
  lo -= pad; hi += pad;
  const sx = (v) => gutter + ((v - lo) / (hi - lo)) * (width - gutter - 14);
  for (const [v, t] of ticksOf(lo, hi, Math.max(2, (width - gutter) / 90))) svg.append(s("line", { x1: sx(v), x2: sx(v), y1: 0, y2: bottom, class: v === 0 && zero ? "base" : "gridline" }), s("text", { x: sx(v), y: bottom + 16, "text-anchor": "middle" }, t));
  rows.forEach((r, i) => {
    const y = i * tall + tall / 2 + 4, fits = Math.floor(gutter / 7);
    svg.append(s("text", { x: gutter - 12, y: y + 4, "text-anchor": "end", style: "fill:var(--ink)" }, cut(r.label, fits)));
    r.points.forEach(([, v]) => { if (isNumber(v)) svg.append(s("circle", { cx: sx(v), cy: y, r: 2.5, fill: r.color, "fill-opacity": 0.45 })); });
    if (isNumber(r.err)) svg.append(s("line", { x1: sx(r.mean - r.err), x2: sx(r.mean + r.err), y1: y, y2: y, stroke: r.color, "stroke-width": 2.5, "stroke-linecap": "round" }));
    if (isNumber(r.mean)) svg.append(s("circle", { cx: sx(r.mean), cy: y, r: 5, fill: r.color, stroke: "var(--bg)", "stroke-width": 1.5 }));
    items.push({ x: 0, y: y - tall / 2, w: width, h: tall, head: r.label, lines: [["mean", fmt(r.mean) + (isNumber(r.err) ? ` ± ${fmt(r.err, 2)}` : "")], ...r.points.map(([n, v]) => [n, fmt(v)])] });
  });
  svg.append(s("text", { x: width - 14, y: bottom + 34, "text-anchor": "end" }, label));
  return { height: bottom + 40, label: rows.map((r) => `${r.label} ${fmt(r.mean)}`).join("; "), picks: { kind: "cell", items, columns: 1 } };
}

/** A name that may be broken behind its dots, dashes and underscores. */
const breakable = (name) => name.split(/(?<=[._\-/])/).flatMap((part, i) => (i ? [h("wbr", {}), part] : [part]));
/** A figure that is broken in front of its error, if anywhere. */
const bound = (figure) => figure.replaceAll(/ (?!±)/g, "\u00a0");
function dotOf(slot) {
  if (slot === null || slot === undefined) return null;
  const dot = h("i", {});
  dot.style.background = look(slot).color;
  return dot;
}

/** A table as the report worked it out. */
function tableOf(t) {
  const head = h("tr", {}, h("th", { scope: "col" }, t.first), t.columns.map((c) => h("th", { scope: "col", class: c.paper ? "paper" : null }, c.paper ? h("small", {}, "paper") : null, dotOf(c.slot), breakable(c.label), c.note ? h("small", {}, c.note) : null)));
  const rows = t.rows.map((r) =>
    h("tr", {}, h("th", { scope: "row" }, dotOf(r.slot), breakable(r.head), r.about ? h("small", {}, r.about) : null),
      r.cells.map((c, i) => h("td", { class: [t.columns[i]?.paper ? "paper" : "", c.mark].join(" ").trim() || null }, t.words ? breakable(c.text) : bound(c.text), c.sub ? h("small", { class: c.sub.includes("±") ? "figure" : null }, c.sub.includes("±") || c.sub.length < 18 ? bound(c.sub) : c.sub, { better: "\u00a0✓", worse: "\u00a0✗" }[c.mark] ?? "") : null))));
  return h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": t.title }, h("table", { class: t.words ? "words" : null }, h("thead", {}, head), h("tbody", {}, rows)));
}
