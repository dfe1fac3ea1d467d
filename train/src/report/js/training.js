// Curves of training: losses, held-out evaluations, rates; each layer's scalars.

const AXES = { step: ["step", (x) => `step ${whole(x)}`], tokens: ["tokens", (x) => `${whole(x)} tokens`], seconds: ["minutes of training", (x) => `minute ${fmt(x, 3)}`] };
const SPIKES = { deviation: "7 σ from the mean of the last 1000 (OLMo 2)", median: "0.1 above the median of the last 201 (Qwen3.8)", none: "none" };
const state = { x: "step", spikes: "deviation", run: DATA.runs.findIndex((r) => r.shown && isNumber(r.measures?.gate_score)) };
if (state.run < 0) state.run = DATA.runs.findIndex((r) => r.shown && r.measures);
if (state.run < 0) state.run = DATA.runs.findIndex((r) => r.shown);

const along = (c) => (state.x === "seconds" ? c.seconds.map((t) => (isNumber(t) ? t / 60 : null)) : c[state.x]);
const xAxis = (log) => ({ label: AXES[state.x][0], head: AXES[state.x][1], log });
const several = DATA.variants.some((v) => v.runs.length > 1);
const logged = () => DATA.runs.filter((r) => r.fine);

/** A line for each run. */
function runLines(name) {
  return logged().filter((r) => r.fine.series[name]).map((r) => {
    const v = DATA.variants[r.variant], p = r.fine.series[name], ranged = p.min?.length && DATA.runs.length === 1;
    return { label: r.name, key: v.name, x: along(r.fine), y: p.mean, ...look(r.variant), thin: v.runs.length > 1, band: ranged ? { lo: p.min, hi: p.max } : null, wideBand: true };
  });
}

/** Loss: behind, what a run's steps have; in front, means over more steps, or over seeds with their standard error. */
function lossLines() {
  const behind = [], front = [];
  DATA.variants.forEach((v, i) => {
    const { color, dash } = look(i), runs = v.runs.map((r) => DATA.runs[r]).filter((r) => r.trend?.series.loss);
    for (const r of runs) {
      const p = r.fine.series.loss;
      if (!v.loss && DATA.runs.length < 4) behind.push({ label: r.name, key: v.name, x: along(r.fine), y: p.mean, color, thin: true, quiet: true, band: p.min?.length ? { lo: p.min, hi: p.max } : null, wideBand: true });
      (v.loss ? behind : front).push({ label: r.name, key: v.name, x: along(r.trend), y: r.trend.series.loss.mean, color, dash, thin: Boolean(v.loss), quiet: Boolean(v.loss) });
    }
    if (!v.loss || !runs.length) return;
    const longest = runs.reduce((a, b) => (b.trend.step.length > a.trend.step.length ? b : a)), { mean: m, stderr: e } = v.loss;
    const off = (sign) => m.map((y, k) => (isNumber(y) && isNumber(e[k]) ? y + sign * e[k] : null));
    front.push({ label: v.name, key: v.name, x: along(longest.trend), y: m, err: e, color, dash, band: { lo: off(-1), hi: off(1) } });
  });
  return [...behind, ...front];
}

function lossNote() {
  const run = logged()[0], trend = run.trend.width, fine = run.fine.width, out = [];
  const steps = (n) => (n === 1 ? "single steps" : `means of ${n} steps`);
  if (several) out.push(`Thin: one seed, ${steps(trend)}. Strong: the mean over seeds, its band one standard error.`);
  else if (DATA.runs.length < 4 && trend > 1) out.push(`Strong: ${steps(trend)}. Behind: ${steps(fine)}${fine > 1 ? ", with the band from the smallest to the largest" : ""}.`);
  else out.push(trend === 1 ? "Each step's loss." : `Lines are ${steps(trend)}.`);
  out.push("Triangles at the top mark loss spikes.");
  return out.join(" ");
}

function spikeMarks() {
  return DATA.runs.flatMap((r) => (r.spikes?.[state.spikes]?.steps ?? []).map((step) => {
    if (state.x === "step" || !r.fine) return { x: step, color: look(r.variant).color };
    const i = r.fine.step.findIndex((x) => isNumber(x) && x >= step), x = along(r.fine)[i < 0 ? r.fine.step.length - 1 : i];
    return { x, color: look(r.variant).color };
  }));
}

function training(parent) {
  if (!logged().length) return;
  const redraws = [], again = () => redraws.forEach((f) => f());
  const choice = h("div", { class: "bar" }, select("along", Object.keys(AXES).map((k) => [k, AXES[k][0]]), state.x, (v) => { state.x = v; again(); }));
  const box = section(parent, "training", "Training", null, choice);
  const opts = { whole: false, log: false, logx: false };
  const redraw = lines(box, {
    id: "loss", wide: true, title: "Training loss",
    note: lossNote(),
    controls: [
      select("spikes", Object.entries(SPIKES), state.spikes, (v) => { state.spikes = v; redraw(); }),
      check("whole range", opts.whole, (v) => { opts.whole = v; redraw(); }),
      check("logarithmic loss", opts.log, (v) => { opts.log = v; redraw(); }),
      check("logarithmic x-axis", opts.logx, (v) => { opts.logx = v; redraw(); }),
    ],
    of: () => ({ height: 340, x: xAxis(opts.logx), y: { label: `loss, nats per ${SCORED}`, log: opts.log }, clip: opts.whole || opts.logx ? 0 : 0.04, series: lossLines(), marks: spikeMarks() }),
  });
  redraws.push(redraw);
  evaluations(box, redraws);
  for (const [id, title, label, log, note] of [
    ["grad_norm", "Gradient norm", "global L2 norm before clipping", true, null],
    ["lr", "Learning rate", "learning rate", false, null],
    ["tokens_per_s", "Speed", "tokens per second", false, null],
  ]) {
    if (!logged().some((r) => numbers(r.fine.series[id]?.mean).length)) continue;
    redraws.push(lines(box, { id, title, note, of: () => ({ x: xAxis(), y: { label, log, zero: id === "tokens_per_s" }, series: runLines(id), height: 240 }) }));
  }
}

/** Whether a run's closing evaluation read other text than those before it: then it is no point of their line. */
const apart = (r, e) => e.closing && r.scored !== "label" && !(isNumber(e.scored) && r.evaluations.some((o) => !o.closing && o.scored === e.scored));

function evaluations(box, redraws) {
  const runs = DATA.runs.filter((r) => r.evaluations?.some((e) => isNumber(e.bits)));
  if (!runs.length) return;
  const closing = runs.some((r) => r.evaluations.some((e) => apart(r, e))), during = runs.some((r) => r.evaluations.some((e) => !e.closing));
  const note = !closing ? null : during
    ? "Lines: during the run, on a part of the held-out text. Diamonds: at the end, on all of it; that is other text, so a diamond above its line is no step back."
    : "Diamonds: at the end, on all of the held-out text.";
  const series = (r, tag, pick, more) => {
    const all = r.evaluations.filter(pick);
    return {
      label: r.name + tag, key: DATA.variants[r.variant].name, ...look(r.variant), dots: true, thin: DATA.variants[r.variant].runs.length > 1, ...more,
      x: all.map((e) => (state.x === "seconds" ? (isNumber(e.seconds) ? e.seconds / 60 : null) : e[state.x])), y: all.map((e) => e.bits),
      note: all.map((e) => (e.scored ? ` (${whole(e.scored)} ${r.scored}s)` : "")),
    };
  };
  redraws.push(lines(box, {
    id: "held-out", title: "Held-out evaluation", note,
    of: () => ({
      x: xAxis(), y: { label: [...new Set(runs.map((r) => r.unit))].join(" or ") }, clip: 0.04, height: 240,
      series: runs.flatMap((r) => [series(r, "", (e) => !apart(r, e)), series(r, ", at the end", (e) => apart(r, e), { loose: true, mark: "diamond" })]),
    }),
  }));
}

const EACH = [
  [/attn\.gate_mean$/, "gate, mean", "mean of the output gate"],
  [/attn\.gate_low$/, "gate, part below 0.1", "part of magnitude below 0.1"],
  [/attn\.gate_high$/, "gate, part above 0.9", "part of magnitude above 0.9"],
  [/alpha_mean$/, "decay α, mean", "mean decay"],
  [/beta_mean$/, "write strength β, mean", "mean write strength"],
  [/shared_gate_mean$/, "shared expert's gate, mean", "mean of the shared expert's gate"],
  [/router_entropy$/, "router entropy", "nats, mean over tokens"],
  [/router_dead$/, "experts without a token", "experts"],
  [/resid_post_max$/, "largest activation", "largest magnitude after the layer"],
];
const layerOf = (name) => Number(name.split(".")[1]);

/** Lines of one scalar of all layers of the chosen run. */
function layerLines(run, pattern, tag) {
  const names = Object.keys(run.coarse.series).filter((n) => pattern.test(n)), layers = names.map(layerOf).sort((a, b) => a - b);
  return names.sort((a, b) => layerOf(a) - layerOf(b)).map((n) => {
    // steps between observations have no value: a line goes from one to the next
    const x = along(run.coarse), y = run.coarse.series[n].mean, seen = range(y.length).filter((i) => isNumber(y[i]));
    return { label: `layer ${layerOf(n)}${tag ?? ""}`, x: seen.map((i) => x[i]), y: seen.map((i) => y[i]), color: layerColor(layers.indexOf(layerOf(n)), layers.length), dash: null, dots: seen.length < 12 };
  });
}

function byLayer(parent, watch) {
  const has = (r, p) => r?.coarse && Object.keys(r.coarse.series).some((n) => p.test(n));
  const offered = EACH.filter(([p]) => DATA.runs.some((r) => r.shown && has(r, p)));
  if (!offered.length) return;
  const box = section(parent, "layers", "Each layer over training", "Observed in the step's first micro-batch. Pale lines are the first layers, strong ones the last.");
  const chosen = range(Math.min(2, offered.length)).map((i) => offered[i][1]);
  if (offered.some((o) => o[1] === "largest activation") && chosen.length > 1) chosen[1] = "largest activation";
  chosen.forEach((first, i) => {
    const current = { name: first }, item = () => offered.find((o) => o[1] === current.name);
    const redraw = lines(box, {
      id: `layers-${i}`, title: () => `${current.name[0].toUpperCase()}${current.name.slice(1)}, by layer`,
      controls: [select("show", offered.map((o) => [o[1], o[1]]), first, (v) => { current.name = v; redraw(); })],
      of: () => {
        const run = DATA.runs[state.run], series = has(run, item()[0]) ? layerLines(run, item()[0]) : [];
        return { x: xAxis(), y: { label: item()[2], log: /largest/.test(item()[1]) }, series, height: 250 };
      },
    });
    watch.push(redraw);
  });
  if (DATA.runs.some((r) => r.shown && has(r, /router_load_max$/))) {
    watch.push(lines(box, {
      id: "load", wide: true, title: "Expert load over training", note: "Tokens of the busiest (solid) and the idlest expert (dotted) of each layer, over the mean: 1 is even.",
      of: () => {
        const run = DATA.runs[state.run];
        if (!has(run, /router_load_max$/)) return { x: xAxis(), y: { label: "load over the mean load" }, series: [] };
        const low = layerLines(run, /router_load_min$/, ", idlest").map((l) => ({ ...l, key: l.label.split(",")[0], dash: "2 3" }));
        return { x: xAxis(), y: { label: "load over the mean load", zero: true }, height: 260, series: [...layerLines(run, /router_load_max$/, ", busiest").map((l) => ({ ...l, key: l.label.split(",")[0] })), ...low] };
      },
    }));
  }
}
