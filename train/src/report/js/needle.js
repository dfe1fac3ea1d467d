// Generated tasks: how often they were answered, and what became of a needle in the states on its way.

/** What is told apart: tasks, and difficulties of one. */
const TASKS = () => {
  const found = new Map();
  for (const t of DATA.runs.flatMap((r) => r.tasks ?? [])) {
    const levels = [...new Set(t.cells.map((c) => c.difficulty))].sort();
    for (const difficulty of levels) found.set(`${t.task}-${difficulty ?? ""}`, { task: t.task, difficulty, name: levels.length > 1 ? `${t.task}, difficulty ${difficulty}` : t.task, id: levels.length > 1 ? `${t.task}-${difficulty}` : t.task });
  }
  return [...found.values()];
};
const cellsIn = (r, of) => r.tasks?.find((t) => t.task === of.task)?.cells.filter((c) => c.difficulty === of.difficulty);
const short = (n) => (n >= 1024 && n % 1024 === 0 ? `${n / 1024}k` : String(n));

/** Cells of a task by variant: with the mean and the standard error over seeds of those that agree in `keys`. */
function cellsOf(of, keys) {
  return DATA.variants.map((v, i) => {
    const runs = DATA.runs.filter((r) => r.variant === i).map((r) => cellsIn(r, of)).filter((cells) => cells?.length), found = new Map();
    for (const cells of runs) {
      const own = new Map();
      for (const c of cells) {
        const key = JSON.stringify(keys.map((k) => c[k]));
        if (!own.has(key)) own.set(key, { ...c, answers: 0, correct: 0 });
        own.get(key).answers += c.answers;
        own.get(key).correct += c.correct;
      }
      for (const [key, c] of own) {
        if (!found.has(key)) found.set(key, { ...c, each: [] });
        if (c.answers) found.get(key).each.push(c.correct / c.answers);
      }
    }
    const all = [...found.values()].map((c) => {
      const m = mean(c.each), n = c.each.length;
      return { ...c, mean: m, err: n > 1 ? Math.sqrt(c.each.reduce((a, x) => a + (x - m) ** 2, 0) / (n - 1) / n) : null };
    });
    return { name: v.name, variant: i, cells: all };
  }).filter((v) => v.cells.length);
}

/** What cells of a task differ in: the axis of its lines, and the rows and columns of its map, if it has two. */
function axesOf(of) {
  const all = DATA.runs.flatMap((r) => cellsIn(r, of) ?? []);
  const values = (key) => [...new Set(all.map((c) => c[key]).filter(isNumber))].sort((a, b) => a - b);
  const by = values("pairs").length > 1 ? "pairs" : "length";
  return { values, by, map: values("depth").length > 1 ? ["length", "depth"] : by === "pairs" && values("length").length > 1 ? ["length", "pairs"] : null };
}

function answers(box, of) {
  const { values, by } = axesOf(of), unit = by === "pairs" ? "pairs" : "tokens", ticks = values(by).map((x) => [x, short(x)]);
  const trained = [...new Set(DATA.runs.map((r) => r.seq_len).filter(isNumber))];
  lines(box, {
    id: `accuracy-${of.id}`, title: `${of.name}: right answers by ${by === "pairs" ? "pairs to recall" : "length"}`,
    note: `Mean over seeds with one standard error.${trained.length === 1 ? ` Trained on ${whole(trained[0])} tokens.` : ""}`,
    of: () => ({
      height: 270, x: { label: unit, log: true, ticks, head: (x) => `${whole(x)} ${unit}` }, y: { label: "right answers", format: percent, domain: [0, 1] },
      series: cellsOf(of, [by]).map((v) => {
        const cells = v.cells.sort((a, b) => a[by] - b[by]), spread = cells.some((c) => isNumber(c.err));
        return { label: v.name, ...look(v.variant), dots: true, x: cells.map((c) => c[by]), y: cells.map((c) => c.mean), err: cells.map((c) => c.err), band: spread ? { lo: cells.map((c) => c.mean - (c.err ?? 0)), hi: cells.map((c) => c.mean + (c.err ?? 0)) } : null };
      }),
    }),
  });
}

function answerMap(box, of) {
  const { values, map } = axesOf(of);
  if (!map) return;
  const [rowKey, columnKey] = map, rows = values(rowKey), columns = values(columnKey), text = (x) => (columnKey === "depth" ? percent(x, 2).replace(" ", "") : String(x));
  figure(box, {
    id: `map-${of.id}`, wide: true, title: `${of.name}: right answers by length and ${columnKey}`, note: columnKey === "depth" ? "Where the needle lies: 0 % is at the beginning, 100 % right before the question." : null,
    draw: (svg, width) => drawHeat(svg, width, {
      domain: [0, 1], rowName: "length", columnName: columnKey, format: percent, unit: "right", columnText: (j) => text(columns[j]),
      panels: cellsOf(of, [rowKey, columnKey]).map((v) => ({ label: v.name, rows: rows.map((r) => ({ label: short(r), values: columns.map((c) => v.cells.find((x) => x[rowKey] === r && x[columnKey] === c)?.mean ?? null) })) })),
    }),
  });
}

const PASSAGE = [["kept", "what is left of the needle", "part of what was written", false], ["undecayed", "what decay alone would leave", "part of what was written", false], ["half_life", "half-life", "tokens", true], ["beta", "write strength β", "β", false], ["rank", "effective rank of the state", "effective rank", false]];

function passing(box, watch) {
  const runs = DATA.runs.filter((r) => r.passage);
  const delta = runs.filter((r) => r.passage.layers.some((l) => l.at));
  figure(box, {
    id: "needle-read", wide: runs.length > 1, title: "What the question reads of the needle", note: "By layer and head: softmax attention's share on the needle's tokens; of the delta rule, the needle's part in the output.",
    draw: (svg, width) => drawHeat(svg, width, { domain: [0, 1], rowName: "layer", columnName: "head", format: percent, panels: runs.map((r) => ({ label: shortName(r), rows: r.passage.layers.map((l) => ({ label: String(l.layer), values: l.read })) })) }),
  });
  if (!delta.length) return;
  const of = (p) => `${whole(p.tokens)} tokens; the marks are the needle's ends.`;
  const marks = (p) => p.needle.map((x) => ({ x, color: "var(--ink)" }));
  const quantity = { key: "kept" }, q = () => PASSAGE.find((x) => x[0] === quantity.key);
  const redraw = lines(box, {
    id: "needle-kept", title: () => `The head that keeps it best: ${q()[1]}`, note: `Of each model, the head in whose state most of the needle is left at the end. ${of(delta[0].passage)}`,
    controls: [select("show", PASSAGE.map((x) => [x[0], x[1]]), quantity.key, (v) => { quantity.key = v; redraw(); })],
    of: () => ({
      height: 270, x: { label: "position" }, y: { label: q()[2], log: q()[3], zero: !q()[3] }, marks: marks(delta[0].passage),
      series: delta.map((r) => {
        const heads = r.passage.layers.filter((l) => l.at).flatMap((l) => l.kept.map((k, i) => ({ l, i, end: k.at(-1) })));
        const best = heads.reduce((a, b) => (b.end > a.end ? b : a));
        return { label: `${shortName(r)}, layer ${best.l.layer}, head ${best.i}`, key: shortName(r), ...look(r.variant), x: best.l.at, y: best.l[quantity.key]?.[best.i] ?? [] };
      }),
    }),
  });
  const one = () => (delta.includes(DATA.runs[state.run]) ? DATA.runs[state.run] : delta[0]);
  const layersOf = () => one().passage.layers.filter((l) => l.at), chosen = { key: "kept", at: 0 };
  const p = () => PASSAGE.find((x) => x[0] === chosen.key), place = h("div", {});
  box.append(place);
  const show = () => {
    const before = REDRAW.length;
    chosen.at = Math.min(chosen.at, Math.max(0, layersOf().length - 1));
    place.replaceChildren();
    const again = lines(place, {
      id: "needle-heads", title: () => `${shortName(one())}, head by head: ${p()[1]}`, note: of(one().passage),
      controls: [select("layer", layersOf().map((l, i) => [String(i), String(l.layer)]), String(chosen.at), (v) => { chosen.at = Number(v); again(); }), select("show", PASSAGE.map((x) => [x[0], x[1]]), chosen.key, (v) => { chosen.key = v; again(); })],
      of: () => {
        const l = layersOf()[chosen.at];
        return { height: 270, x: { label: "position" }, y: { label: p()[2], log: p()[3], zero: !p()[3] }, marks: marks(one().passage), series: (l?.[chosen.key] ?? []).map((y, i) => ({ label: `head ${i}`, color: `var(--c${i % 8})`, dash: i < 8 ? null : "7 3", x: l.at, y })) };
      },
    });
    // only the newest of these is redrawn with the window
    if (show.redraw) REDRAW.splice(REDRAW.indexOf(show.redraw), 1);
    show.redraw = REDRAW.at(before - (show.redraw ? 1 : 0));
  };
  watch.push(show);
  show();
}

function tasks(parent, watch) {
  if (!TASKS().length && !DATA.runs.some((r) => r.passage)) return;
  const box = section(parent, "tasks", "Generated tasks", "What is asked for lies in the text itself, so that what counts is what the model kept of it.");
  TASKS().forEach((t) => answers(box, t));
  TASKS().forEach((t) => answerMap(box, t));
  if (DATA.runs.some((r) => r.passage)) passing(box, watch);
}
