// The page as a whole: its head, its sections, and what a test asks of it.

const LINKS = [];
function section(parent, id, title, note, more) {
  const grid = h("div", { class: "grid" });
  parent.append(h("section", { id, "aria-labelledby": `${id}-title` }, h("h2", { id: `${id}-title` }, title), note && h("p", {}, note), more, grid));
  LINKS.push([id, id[0].toUpperCase() + id.slice(1)]);
  return grid;
}

function head() {
  const top = document.getElementById("head"), runs = DATA.runs, one = runs.length === 1 && !DATA.study ? runs[0] : null;
  const what = DATA.study ? `Study: ${DATA.variants.length} variants, ${runs.length} runs` : one ? "Run" : `${runs.length} runs, ${DATA.variants.length} configurations`;
  top.append(h("p", { class: "eyebrow" }, `tidegate ${DATA.version} · ${what}`), h("h1", {}, DATA.title));
  const abouts = [...new Set(runs.map((r) => (r.about ? `${r.about.data} · ${r.about.machine} · tidegate ${r.about.version}` : null)).filter(Boolean))];
  abouts.slice(0, 3).forEach((a) => top.append(h("p", { class: "lead" }, a)));
  if (one?.about) top.append(h("p", { class: "lead" }, h("code", {}, one.about.command)));
  if (one && one.facts.length) top.append(h("dl", { class: "facts" }, one.facts.map((f) => h("div", {}, h("dt", {}, f.label), h("dd", {}, f.text, h("small", {}, f.note))))));
  for (const r of runs) if (r.stopped) top.append(h("p", { class: "note bad" }, `${runs.length > 1 ? `${r.name} stopped: ` : "The run stopped: "}${r.stopped}`));
  const notes = [...new Set([...(DATA.notes ?? []), ...runs.flatMap((r) => r.notes)])];
  if (notes.length > 3) top.append(h("details", { class: "note" }, h("summary", {}, `${notes.length} things are missing`), notes.map((n) => h("p", {}, n))));
  else notes.forEach((n) => top.append(h("p", { class: "note" }, n)));
}

function results(parent) {
  if (!DATA.tables?.length && !DATA.study) return;
  const box = section(parent, "results", DATA.study ? "Results" : "Runs");
  for (const t of DATA.tables) {
    box.append(h("div", { class: "wide" }, h("p", { style: "color:var(--soft);margin:0;font-size:13px;max-width:80ch" }, t.note), tableOf(t)));
  }
  const study = DATA.study?.results;
  if (!study) return;
  const baseline = (v) => v.baseline || study.baseline, base = (v) => study.variants.find((b) => b.name === baseline(v));
  const from = study.variants.every((v) => baseline(v) === study.baseline) ? study.baseline : "its baseline";
  const filled = study.columns.filter((c) => study.variants.some((v) => isNumber(v.summary[c.key]?.mean)));
  if (!filled.length) return;
  const options = { column: filled[0].key, difference: study.variants.some((v) => isNumber(v.summary[filled[0].key]?.difference?.mean)) };
  const redraw = figure(box, {
    id: "differences", wide: true, title: options.difference ? `Difference from ${from}` : "Variants side by side",
    note: "Large dots: means over seeds; bars: one standard error; small dots: single seeds.",
    controls: [
      select("of", filled.map((c) => [c.key, c.label]), options.column, (v) => { options.column = v; redraw(); }),
      options.difference ? check("as a difference from the baseline", true, (v) => { options.difference = v; redraw(); }) : null,
    ],
    draw: (svg, width) => {
      const column = filled.find((c) => c.key === options.column), value = (arm) => arm.values[column.key];
      const rows = study.variants.map((v, i) => {
        const summary = v.summary[column.key], shown = options.difference ? summary?.difference : summary, color = look(i).color;
        const of = (a) => (options.difference ? value(a) - value(base(v)?.arms.find((b) => b.seed === a.seed) ?? { values: {} }) : value(a));
        return { own: v.name === baseline(v), label: options.difference && baseline(v) !== study.baseline && baseline(v) !== v.name ? `${v.name} − ${baseline(v)}` : v.name, mean: shown?.mean, err: shown?.stderr, color, points: v.arms.filter((a) => isNumber(of(a))).map((a) => [`seed ${a.seed}`, of(a)]) };
      }).filter((r) => isNumber(r.mean) && !(options.difference && r.own));
      if (!rows.length) { svg.append(s("text", { x: 0, y: 20 }, "No variant has this yet.")); return { height: 34, picks: null }; }
      const better = { lower: " (lower is better)", higher: " (higher is better)" }[column.better] ?? "";
      return drawRows(svg, width, { rows, zero: options.difference, label: `${column.label}${options.difference ? `, difference from ${from}` : ""}${better}` });
    },
  });
}

function configuration(parent) {
  const runs = DATA.runs.filter((r) => r.config);
  if (!runs.length) return;
  const box = section(parent, "configuration", "Configuration");
  for (const r of runs.slice(0, 12)) {
    const rows = r.config.map(([key, value, from]) => ({ head: key, cells: [{ text: value }, { text: from || "preset" }] }));
    box.append(h("details", { class: "wide", style: "margin:0" }, h("summary", {}, `${r.name}: ${r.config.filter((c) => c[2]).length} values set, ${r.config.length} in all`), tableOf({ title: "Configuration", first: "key", columns: [{ label: "value" }, { label: "from" }], rows, words: true })));
  }
}

function navigation(watch) {
  const shown = DATA.runs.map((r, i) => [String(i), r.name, r.shown && (r.coarse || r.measures || r.passage)]).filter((r) => r[2]);
  const choose = shown.length > 1 ? select("single run", shown.map(([i, n]) => [i, n]), String(state.run), (v) => { state.run = Number(v); watch.forEach((f) => f()); }) : null;
  document.getElementById("nav").append(h("div", {}, LINKS.map(([id, title]) => h("a", { href: `#${id}` }, title)), choose));
}

/** Sets the page as paper would have it. */
function asPrinted() {
  for (const rule of [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules])) if (rule.media?.mediaText === "print") rule.media.mediaText = "all";
  dispatchEvent(new Event("beforeprint"));
}

/** What a test asks: script errors, what is in each figure, what is wider than the window or, of tables, than their box. */
function inspect(printed) {
  // a path that only moves the pen leaves no mark
  const seen = (e) => e.tagName !== "path" || /[LhHZ]/.test(e.getAttribute("d"));
  const of = (f) => {
    const svg = f.querySelector(".plot > svg"), marks = [...svg.querySelectorAll("path, rect:not([data-clip]):not([data-scale]), circle")].filter(seen);
    return {
      id: f.dataset.figure, marks: marks.length, open: marks.filter((e) => e.getAttribute("fill") === "var(--bg)").length, scale: svg.clientWidth / svg.viewBox.baseVal.width,
      note: f.querySelector("figcaption p")?.textContent ?? "", texts: [...svg.querySelectorAll("text")].map((e) => e.textContent),
    };
  };
  const inBox = (e) => { for (let p = e.parentElement; p; p = p.parentElement) if (p.matches(`${printed ? "" : ".scroll, "}nav > div, clipPath, [clip-path]`)) return true; return false; };
  const wide = [...document.body.querySelectorAll("*")].filter((e) => !inBox(e) && !e.matches("clipPath *, script, .tip") && e.getBoundingClientRect().right > innerWidth + 1);
  return {
    error: document.documentElement.dataset.error ?? null, width: innerWidth, scroll: document.documentElement.scrollWidth, figures: [...document.querySelectorAll("figure")].map(of),
    wide: wide.slice(0, 5).map((e) => `${e.tagName}.${e.getAttribute("class") ?? ""}: ${e.textContent.slice(0, 40)}`),
    tables: [...document.querySelectorAll(".scroll")].map((e) => ({ title: e.getAttribute("aria-label"), over: e.scrollWidth - e.clientWidth })),
    sections: LINKS.map((l) => l[0]),
  };
}

const WATCH = [], MAIN = document.getElementById("main");
head();
results(MAIN);
training(MAIN);
byLayer(MAIN, WATCH);
tasks(MAIN, WATCH);
if (measured().length) for (const part of [attention, gates, activations, recurrence, experts, depth, texts]) part(MAIN, WATCH);
configuration(MAIN);
navigation(WATCH);
built = true;
redrawAll();
document.getElementById("foot").append(h("p", {}, `Made by tidegate ${DATA.version}. Means and differences are those of the files named above; what is missing there is missing here.`));
if (location.hash === "#check" || location.hash === "#check-print") {
  const printed = location.hash === "#check-print";
  if (printed) asPrinted();
  const found = JSON.stringify(inspect(printed));
  document.documentElement.dataset.check = found;
  if (parent !== window) parent.postMessage(found, "*");
}
