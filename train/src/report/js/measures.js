// Measures of checkpoints: attention, gates, activations, states, experts, depth, context, text.

const KINDS = { attention: "attention output gate", value: "value gate", key: "key gate", query: "query gate", dense: "gate behind the output projection", delta_output: "delta rule's output gate", beta: "write strength β", shared_expert: "shared expert's gate" };
const kindName = (k) => KINDS[k] ?? k;
const measured = () => DATA.runs.filter((r) => r.measures);
const current = () => DATA.runs[state.run]?.measures ?? measured()[0].measures;
const shortName = (r) => DATA.variants[r.variant].name;
const ALL = measured().some((r) => r.scored === "label") ? "Over all tokens: of generated tasks a run has learned the labels alone." : "";
const ONE = several ? "From here on, one seed stands for each configuration." : "";

/** A line over layers for each run. */
function overLayers(box, id, title, note, label, pick, more = {}) {
  const runs = measured().filter((r) => pick(r.measures).length);
  if (!runs.length) return;
  lines(box, {
    id, title, note, ...more,
    of: () => {
      const series = runs.flatMap((r) => {
        const parts = more.parts ?? [["", (l) => l.value]], points = pick(r.measures);
        // the second of two parts is told by open marks, too: of a single layer there is no line
        return parts.map(([tag, of], second) => ({
          label: shortName(r) + tag, key: runs.length > 1 ? shortName(r) : tag.replace(/^, /, "") || shortName(r), ...look(r.variant), ...(second ? { dash: "2 3", mark: "ring" } : {}),
          ...(second && runs.length < 2 ? { color: "var(--c1)" } : {}), dots: true, x: points.map((l) => l.layer), y: points.map(of),
        }));
      });
      series.splice(0, series.length, ...series.filter((l) => numbers(l.y).length));
      const layers = [...new Set(series.flatMap((l) => l.x))].sort((a, b) => a - b);
      return { height: 250, x: { label: "layer", head: (x) => `layer ${x}`, domain: [layers[0] - 0.3, layers.at(-1) + 0.3], ticks: wholeTicks(layers, 420) }, y: { label, log: more.log, format: more.format, zero: more.zero }, series };
    },
  });
}

function heat(box, id, title, note, options) {
  const chosen = { key: options[0].key }, option = () => options.find((o) => o.key === chosen.key);
  const most = Math.max(...measured().flatMap((r) => options[0].rows(r.measures).map((x) => x.values.length)), 1);
  const redraw = figure(box, {
    id, title, note, wide: measured().length > 1 || most > 16,
    controls: options.length > 1 ? [select("show", options.map((o) => [o.key, o.label]), chosen.key, (v) => { chosen.key = v; redraw(); })] : [],
    draw: (svg, width) => {
      const o = option();
      const panels = measured().map((r) => ({ label: shortName(r), rows: o.rows(r.measures) })).filter((p) => p.rows.some((r) => numbers(r.values).length));
      return drawHeat(svg, width, { panels, domain: o.domain?.(panels), rowName: "layer", columnName: o.column ?? "head", format: o.format, unit: o.unit });
    },
  });
}
const any = (pick) => measured().some((r) => (pick(r.measures) ?? []).length);
const upTo = (panels) => [0, Math.max(...panels.flatMap((p) => p.rows.flatMap((r) => numbers(r.values))), 1e-9)];

function attention(parent) {
  if (!any((m) => m.attention?.layers)) return;
  const a = measured().find((r) => r.measures.attention).measures.attention;
  const box = section(parent, "attention", "Where attention looks", `Softmax attention only; layers of the delta rule have none. ${ONE}`);
  const rows = (key) => (m) => (m.attention?.layers ?? []).map((l) => ({ label: String(l.layer), values: l[key] }));
  heat(box, "first-token", "Attention that the first token gets", `Share of each head's attention, mean over all queries but the first. A head is a sink where a sample of ${a.sink_tokens} tokens gives its first token more than ${a.sink_epsilon}.`, [
    { key: "first_token", label: "share of the first token", rows: rows("first_token"), format: percent, domain: upTo, unit: "of attention" },
    { key: "sink_rate", label: "part of samples with a sink", rows: rows("sink_rate"), format: percent, domain: () => [0, 1], unit: "of samples" },
    { key: "entropy", label: "entropy of attention", rows: rows("entropy"), unit: "nats", domain: upTo },
    { key: "max_score", label: "largest score before the softmax", rows: rows("max_score"), unit: "q·k/√D" },
  ]);
  overLayers(box, "first-token-layers", "First-token attention by layer", "Mean over heads.", "share of attention", (m) => (m.attention?.layers ?? []).map((l) => ({ layer: l.layer, value: mean(l.first_token) })), { format: percent, zero: true });
  overLayers(box, "output-rank", "Rank of the value–output product by layer", "Effective rank of W_V W_O, mean over heads: exp of the entropy of its singular values.", "effective rank", (m) => (m.value_output_rank ?? []).map((l) => ({ layer: l.layer, value: mean(l.heads) })), { zero: true });
}

function gates(parent, watch) {
  if (!any((m) => m.gates) && !any((m) => m.sdpa_output)) return;
  const box = section(parent, "gates", "What gates let through");
  const order = Object.keys(KINDS), kinds = [...new Set(measured().flatMap((r) => (r.measures.gates ?? []).map((g) => g.kind)))].sort((a, b) => order.indexOf(a) - order.indexOf(b));
  const headed = kinds.filter((k) => measured().some((r) => (r.measures.gates ?? []).some((g) => g.kind === k && g.heads.length)));
  if (headed.length) {
    heat(box, "gate-score", "Gate score by layer and head", "Mean of each head's gate over tokens and dimensions.", headed.map((k) => ({
      key: k, label: kindName(k), rows: (m) => (m.gates ?? []).filter((g) => g.kind === k && g.heads.length).map((g) => ({ label: String(g.layer), values: g.heads })),
      domain: (panels) => { const [lo, hi] = extent(panels.flatMap((p) => p.rows.flatMap((r) => r.values))); return lo < 0 ? [lo, hi] : [0, Math.max(hi, 1e-9)]; },
    })));
  }
  if (kinds.length) {
    const chosen = { kind: kinds[0] };
    const redraw = figure(box, {
      id: "gate-histograms", wide: true, title: "Distribution of gates, by layer", note: "How often a gate has which value; each layer's highest bar reaches the top.",
      controls: kinds.length > 1 ? [select("gate", kinds.map((k) => [k, kindName(k)]), chosen.kind, (v) => { chosen.kind = v; redraw(); })] : [],
      draw: (svg, width) => {
        const list = (current().gates ?? []).filter((g) => g.kind === chosen.kind);
        if (!list.length) { svg.append(s("text", { x: 0, y: 20 }, `This run has no ${kindName(chosen.kind)}.`)); return { height: 34, picks: null }; }
        return drawHistograms(svg, width, list.map((g) => ({ label: `layer ${g.layer}`, sub: `mean ${fmt(g.mean, 3)}, ${percent(g.below_01)} below 0.1`, ...g.histogram, color: "var(--c0)" })));
      },
    });
    watch.push(redraw);
  }
  overLayers(box, "sdpa-output", "Attention's output before and after its gate", "Mean magnitude. Filled dots, solid: after the gate, as the output projection reads it; open, dotted: before.", "mean magnitude", (m) => m.sdpa_output ?? [], {
    log: true, parts: [[", after the gate", (l) => l.after.mean_abs], [", before the gate", (l) => l.before?.mean_abs ?? null]],
  });
  overLayers(box, "sdpa-sparse", "Attention's outputs near zero", "Part of magnitude below 0.01. Filled dots, solid: after the gate; open, dotted: before.", "part below 0.01", (m) => m.sdpa_output ?? [], {
    format: percent, zero: true, parts: [[", after the gate", (l) => l.after.below_1e2], [", before the gate", (l) => l.before?.below_1e2 ?? null]],
  });
}

function activations(parent, watch) {
  if (!any((m) => m.activations?.layers)) return;
  const box = section(parent, "activations", "How large activations become", "The residual stream after each layer.");
  overLayers(box, "activation-profile", "Largest and median activation by layer", "Filled dots, solid: the largest magnitude; open, dotted: the median.", "magnitude", (m) => m.activations?.layers ?? [], {
    log: true, parts: [[", largest", (l) => l.max], [", median", (l) => l.median]],
  });
  overLayers(box, "activation-ratio", "Largest over median, by layer", "An activation is massive above 100 and 1000 times the median.", "ratio", (m) => m.activations?.layers ?? [], { log: true, parts: [["", (l) => l.ratio]] });
  const place = h("div", { class: "wide" });
  box.append(place);
  const show = () => {
    const peaks = (current().activations?.layers ?? []).flatMap((l) => l.top.slice(0, 1).map((p) => ({ ...p, layer: l.layer, ratio: l.ratio, massive: l.massive })));
    const rows = peaks.map((p) => ({ head: `layer ${p.layer}`, cells: [fmt(p.value), fmt(p.ratio, 3), String(p.channel), String(p.position), p.text === undefined ? `#${p.token}` : `"${p.text}"`, p.massive ? "yes" : "no"].map((text) => ({ text })) }));
    place.replaceChildren(h("h3", {}, "Where each layer's largest activation sits"), tableOf({ title: "Largest activations", first: "after", columns: ["value", "over the median", "channel", "position", "token", "massive"].map((label) => ({ label })), rows }));
  };
  watch.push(show);
  show();
}

function recurrence(parent) {
  if (!any((m) => m.delta)) return;
  const box = section(parent, "recurrence", "What states remember", "Layers of the delta rule, by value head.");
  const quantities = [["half_life", "half-life", "tokens until half is forgotten", true], ["beta", "write strength β", "mean of β", false], ["state_norm", "norm of the state", "Frobenius norm after a window", true], ["state_rank", "effective rank of the state", "effective rank after a window", false]];
  const chosen = { key: "half_life" }, q = () => quantities.find((x) => x[0] === chosen.key);
  const redraw = lines(box, {
    id: "half-life", title: "Memory of each head", note: "A dot is a head; the half-life is the median over tokens of ln 2 / −ln α.",
    controls: [select("show", quantities.map((x) => [x[0], x[1]]), chosen.key, (v) => { chosen.key = v; redraw(); })],
    of: () => {
      const runs = measured().filter((r) => r.measures.delta?.length), layers = [...new Set(runs.flatMap((r) => r.measures.delta.map((d) => d.layer)))].sort((a, b) => a - b), [key, , label, log] = q();
      const series = runs.map((r, k) => {
        const shift = (k - (runs.length - 1) / 2) * (0.5 / Math.max(1, runs.length)), points = r.measures.delta.flatMap((d) => d[key].map((v) => [layers.indexOf(d.layer) + shift, v]));
        return { label: shortName(r), ...look(r.variant), loose: true, dots: true, x: points.map((p) => p[0]), y: points.map((p) => p[1]) };
      });
      return { height: 280, x: { label: "layer", domain: [-0.6, layers.length - 0.4], head: (x) => `layer ${layers[Math.round(x)]}`, ticks: wholeTicks(range(layers.length), 420, (i) => String(layers[i])) }, y: { label, log, zero: !log }, series };
    },
  });
  heat(box, "half-life-heads", "Half-life by layer and head", null, [{ key: "half_life", label: "half-life", unit: "tokens", rows: (m) => (m.delta ?? []).map((d) => ({ label: String(d.layer), values: d.half_life })), domain: upTo }]);
}

function experts(parent) {
  if (!any((m) => m.router)) return;
  const box = section(parent, "experts", "Who does the work", "Where the router sends tokens, in the measured checkpoint.");
  heat(box, "expert-load", "Load of each expert", "Over the mean load: 1 is even, 0 is an expert that no token was sent to.", [{ key: "load", label: "load", column: "expert", unit: "× the mean load", rows: (m) => (m.router ?? []).map((r) => ({ label: String(r.layer), values: r.load.map((x) => (isNumber(x) ? x * r.load.length : null)) })), domain: upTo }]);
  overLayers(box, "router-entropy", "Router entropy by layer", "Of the router's probabilities, mean over tokens.", "nats", (m) => (m.router ?? []).map((r) => ({ layer: r.layer, value: r.entropy })), { zero: true });
  overLayers(box, "router-balance", "Busiest expert by layer", "Its load over the mean load.", "× the mean load", (m) => (m.router ?? []).map((r) => ({ layer: r.layer, value: r.max_over_mean })), { zero: true });
}

function depth(parent) {
  if (!any((m) => m.logit_lens) && !any((m) => m.loss_by_position)) return;
  const box = section(parent, "depth", "Loss over depth and context");
  overLayers(box, "logit-lens", "Logit lens", `The loss if the final norm and output projection came after that layer. ${ALL}`, "loss, nats per token", (m) => (m.logit_lens ?? []).map((value, layer) => ({ layer, value })));
  const runs = measured().filter((r) => r.measures.loss_by_position?.length);
  if (!runs.length) return;
  lines(box, {
    id: "positions", title: "Loss by position", note: `Mean over windows longer than those of training (${[...new Set(runs.map((r) => r.measures.data.seq_len))].join(", ")} tokens). A point is the mean over positions around it. ${ALL}`,
    of: () => ({
      height: 250, x: { label: "position in the window", log: true, head: (x) => `around position ${whole(x)}` }, y: { label: "loss, nats per token" },
      series: runs.map((r) => ({ label: shortName(r), ...look(r.variant), dots: true, x: r.measures.loss_by_position.map((p) => Math.sqrt(Math.max(1, p.from) * p.to)), y: r.measures.loss_by_position.map((p) => p.loss), note: r.measures.loss_by_position.map((p) => ` (${whole(p.from)} to ${whole(p.to)}, ${whole(p.tokens)} tokens)`) })),
    }),
  });
}

function texts(parent, watch) {
  if (!measured().some((r) => r.measures.trace?.series.length)) return;
  const box = section(parent, "text", "Gates along a text", "Point at a token, touch it, or go from token to token with the arrow keys.");
  const place = h("div", { class: "wide" });
  box.append(place);
  const first = Math.max(0, current().trace?.series.findLastIndex((x) => x.kind === "attention") ?? 0);
  const chosen = { series: first, head: -1, by: "gate" };
  const show = () => {
    const m = current(), t = m.trace;
    if (!t?.series.length) { place.replaceChildren(h("p", { class: "note" }, m.trace_cut ? `In this report ${m.trace_cut}.` : "This run's measures hold no text.")); return; }
    chosen.series = Math.min(chosen.series, t.series.length - 1);
    const line = t.series[chosen.series];
    if (chosen.head >= line.heads.length) chosen.head = -1;
    const gate = chosen.head < 0 ? line.values : line.heads[chosen.head], values = chosen.by === "gate" ? gate : t.loss;
    const [lo, hi] = extent(values), read = h("p", { class: "read", role: "status" }, "\u00a0");
    const tell = (i) => {
      read.replaceChildren(h("b", { class: "mono" }, JSON.stringify(t.tokens[i])), ` position ${i}: gate `, h("b", {}, fmt(gate[i])), ", loss ", h("b", {}, isNumber(t.loss[i]) ? fmt(t.loss[i]) : "–"), " nats");
    };
    const tokens = t.tokens.map((text, i) => {
      const part = isNumber(values[i]) && hi > lo ? (values[i] - lo) / (hi - lo) : 0, shown = text === "" ? "·" : text.replaceAll("\t", "⇥\t");
      const node = h("span", { class: "tok", tabindex: i ? -1 : 0, "aria-label": `${text} ${fmt(values[i])}`, onpointerenter: () => tell(i), onpointerdown: () => tell(i), onfocus: () => tell(i) }, shown.includes("\n") ? [h("span", { class: "mark" }, "↵"), shown] : shown);
      node.style.setProperty("--v", `${(82 * part).toFixed(1)}%`);
      if (part > 0.62) node.style.color = "var(--bg)";
      return node;
    });
    const text = h("div", { class: "text", onkeydown: (e) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 20, ArrowUp: -20 }[e.key], at = tokens.indexOf(document.activeElement);
      if (!step || at < 0) return;
      e.preventDefault();
      tokens[Math.max(0, Math.min(tokens.length - 1, at + step))].focus();
    } }, tokens);
    const bar = h("div", { class: "bar" },
      select("gate", t.series.map((x, i) => [String(i), `layer ${x.layer}: ${kindName(x.kind)}`]), String(chosen.series), (v) => { chosen.series = Number(v); show(); }),
      line.heads.length > 1 ? select("head", [["-1", "mean"], ...line.heads.map((_, i) => [String(i), String(i)])], String(chosen.head), (v) => { chosen.head = Number(v); show(); }) : null,
      select("colour by", [["gate", "the gate"], ["loss", "the loss"]], chosen.by, (v) => { chosen.by = v; show(); }),
      h("span", {}, `${fmt(lo, 3)} `, h("span", { class: "ramp" }), ` ${fmt(hi, 3)}`));
    const chart = h("div", { style: "margin-top:26px" });
    place.replaceChildren(bar, read, text, m.trace_cut ? h("p", { class: "note" }, `Here ${m.trace_cut}.`) : "", chart);
    const before = REDRAW.length;
    lines(chart, {
      id: "trace", title: "The same as a curve", of: () => ({ height: 200, x: { label: "position", head: (i) => `${JSON.stringify(t.tokens[i] ?? "")}, position ${i}` }, y: { label: chosen.by === "gate" ? "gate" : "loss, nats" }, series: [{ label: chosen.by, color: "var(--c0)", x: range(values.length), y: values }] }),
    });
    // only the newest of these is redrawn with the window
    if (show.redraw) REDRAW.splice(REDRAW.indexOf(show.redraw), 1);
    show.redraw = REDRAW.at(before - (show.redraw ? 1 : 0));
  };
  watch.push(show);
  show();
}
