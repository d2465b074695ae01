// The page: its data, the state in the address, filters, table and sections.

const records = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const NO_METHOD = "none"; // dense models, and architectures that are what they are

// -- data ----------------------------------------------------------------------------------------------

const profiles = records.filter((record) => record.kind === "profile");
const machines = [...new Set(profiles.map((record) => machineText(record.machine)))];

function machineText(machine) {
  const device = machine.device === machine.processor ? "" : `, ${machine.device}`;
  return `${machine.processor}, ${machine.cores} cores${device}`;
}

function conditionText(record) {
  const c = record.conditions, many = Array.isArray(c.images) && c.images.length > 1;
  const images = many ? `${c.images.length} pictures` : c.images; // a single text names or counts them
  const read = record.models.map((model) => model.handed).find((handed) => handed?.reader);
  const reader = read && `read by ${read.reader} with ${read.text} tokens of text`;
  const extras = [c.weights, reader, c.compile && "compiled", c.cuda_graphs && "CUDA graphs", machines.length > 1 && record.machine.processor];
  const place = c.device === "cpu" ? `${c.threads} thread${c.threads === 1 ? "" : "s"}` : c.device;
  const size = `${c.input_size[1]} × ${c.input_size[2]}`;
  return [`batch ${c.batch_size}`, c.dtype, place, size, images, ...extras.filter(Boolean)].join(", ");
}

const rows = profiles.flatMap((record) =>
  record.models.map((model, i) => ({
    ...model,
    methodName: model.method ?? NO_METHOD,
    hostName: model.host ?? model.name,
    condition: conditionText(record),
    title: model.host === null ? model.name : `${model.name} in ${model.host}`,
    baseline: record.models[0],
    isBaseline: i === 0,
    // The baseline's outputs are its own: where the others' were compared with them, their distance is 0.
    fidelity: model.fidelity ?? (i === 0 && record.models.some((m) => m.fidelity)
      ? { divergence: 0, feature_distance: 0 } : null),
  })),
);
const pictures = records.filter((record) => record.kind === "tokens").map((record) => ({
  ...record,
  methodName: record.method ?? NO_METHOD,
  hostName: record.host ?? record.model,
  title: record.host === null ? record.model : `${record.model} in ${record.host}`,
}));

const unique = (values) => [...new Set(values)];
const CHOICES = {
  method: unique([...rows, ...pictures].map((row) => row.methodName)),
  host: unique([...rows, ...pictures].map((row) => row.hostName)),
  condition: unique(rows.map((row) => row.condition)),
};
const COLOURS = 10; // --c0 to --c9
const FIELDS = { method: "methodName", host: "hostName", condition: "condition" };

function styleOf(row) { // colour by method, shape by host; after the last colour the first with shapes of their own
  const shapes = Object.keys(SHAPES);
  const method = CHOICES.method.filter((name) => name !== NO_METHOD).indexOf(row.methodName);
  const colour = method < 0 ? "var(--none)" : `var(--c${method % COLOURS})`;
  const again = Math.max(0, Math.floor(method / COLOURS)) * CHOICES.host.length;
  return { colour, shape: shapes[(CHOICES.host.indexOf(row.hostName) + again) % shapes.length] };
}

// better: 1 where more is better, -1 where less is; relative: to the first model, so that hosts do not compare.
const METRICS = {
  images_per_second: { name: "images/s", better: 1, of: (m) => m.images_per_second,
    interval: (m) => m.interval.map((bound) => bound * m.baseline.images_per_second) },
  speedup: { name: "speed-up over the first model", better: 1, relative: true, of: (m) => m.speedup, interval: (m) => m.interval },
  macs: { name: "GMACs of an image", better: -1, of: (m) => m.macs / 1e9 },
  peak_memory: { name: "peak memory (MB)", better: -1, of: (m) => m.peak_memory && m.peak_memory / 1e6 },
  latency: { name: "latency of a batch, median (ms)", better: -1, of: (m) => m.latency.p50 * 1e3 },
  accuracy: { name: "accuracy (%)", better: 1, of: (m) => m.accuracy?.value },
  divergence: { name: "divergence from the dense outputs", better: -1, relative: true,
    of: (m) => m.fidelity?.divergence },
  handed: { name: "tokens handed over", better: -1, of: (m) => m.handed?.tokens },
  prefill: { name: "GMACs of reading them", better: -1,
    of: (m) => (m.handed?.prefill_macs == null ? null : m.handed.prefill_macs / 1e9) },
  cache: { name: "cache of reading them (MB)", better: -1,
    of: (m) => (m.handed?.cache_bytes == null ? null : m.handed.cache_bytes / 1e6) },
  feature_distance: { name: "distance of features from the dense ones", better: -1, relative: true,
    of: (m) => m.fidelity?.feature_distance },
};
const known = (key) => rows.some((row) => METRICS[key].of(row) != null);
const X_AXES = ["images_per_second", "speedup", "macs", "peak_memory", "latency", "handed"].filter(known);
const Y_AXES = ["accuracy", "divergence", "feature_distance", "prefill", "cache", "macs"].filter(known);
const axisTitle = (metric) => `${metric.name}, ${metric.better > 0 ? "more" : "less"} is better`;

// -- state: in the address, so that a view can be sent to others ------------------------------------------

let state = {};

function readState() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = Object.fromEntries(["x", "y", "sort", "theme", "bars"].map((key) => [key, given.get(key)]));
  for (const key of Object.keys(CHOICES)) {
    const chosen = given.getAll(key).filter((value) => value === "" || CHOICES[key].includes(value));
    state[key] = chosen.length ? chosen : [...CHOICES[key]];
  }
}

function writeState() {
  const given = new URLSearchParams();
  for (const key of Object.keys(CHOICES)) {
    if (state[key].length === CHOICES[key].length) continue;
    for (const value of state[key].length ? state[key] : [""]) given.append(key, value); // "": none of them
  }
  for (const key of ["x", "y", "sort", "theme", "bars"]) if (state[key]) given.set(key, state[key]);
  history.replaceState(null, "", `#${given}`);
}

function change(key, value) {
  state[key] = value;
  writeState();
  render();
}

const isShown = (row) =>
  Object.entries(FIELDS).every(([key, field]) => row[field] === undefined || state[key].includes(row[field]));

// -- sections ------------------------------------------------------------------------------------------

function swatch(row) {
  const { colour, shape } = styleOf(row);
  const mark = draw("path", { d: SHAPES[shape], transform: "scale(6)", style: `fill: ${colour}` });
  return draw("svg", { class: "swatch", viewBox: "-7 -7 14 14", "aria-hidden": "true" }, mark);
}

function renderFilters() {
  const titles = { method: "Method", host: "Host", condition: "Measured with" };
  byId("filters").replaceChildren();
  for (const [key, choices] of Object.entries(CHOICES)) {
    if (choices.length < 2) continue;
    const set = make("fieldset", {}, make("legend", {}, titles[key]));
    for (const value of choices) {
      const box = make("input", { type: "checkbox", name: key, value });
      box.checked = state[key].includes(value);
      box.toggleAttribute("checked", box.checked);
      box.addEventListener("change", () => {
        const chosen = choices.filter((other) => (other === value ? box.checked : state[key].includes(other)));
        change(key, chosen);
        document.querySelector(`input[name=${key}][value=${CSS.escape(value)}]`).focus();
      });
      const label = make("label", {}, box, value);
      const sample = [...rows, ...pictures].find((row) => row[FIELDS[key]] === value);
      if (key !== "condition") box.after(swatch(key === "host" ? { ...sample, methodName: NO_METHOD } :
        { ...sample, hostName: CHOICES.host[0] }));
      set.append(label);
    }
    byId("filters").append(set);
  }
}

function select(id, options, value, key) {
  const element = byId(id);
  element.replaceChildren(...options.map(([name, text]) => make("option", { value: name }, text)));
  element.value = options.some(([name]) => name === value) ? value : options[0][0];
  element.onchange = () => change(key, element.value);
  return element.value;
}

function pointText(row) {
  const lines = [row.title, row.condition];
  for (const metric of Object.values(METRICS)) {
    const value = metric.of(row);
    if (value != null) lines.push(`${metric.name}: ${number(value, 4)}`);
  }
  if (!row.isBaseline && !row.resolved) lines.push("the speed-up is not resolved");
  return lines.join("\n");
}

function renderTradeOff(shown) {
  const names = (keys) => keys.map((key) => [key, METRICS[key].name]);
  const x = METRICS[select("x", names(X_AXES), state.x, "x")], y = METRICS[select("y", names(Y_AXES), state.y, "y")];
  const points = shown.filter((row) => x.of(row) != null && y.of(row) != null).map((row) => {
    const [low, high] = x.interval?.(row) ?? [];
    return { x: x.of(row), y: y.of(row), low, high, row, text: pointText(row) };
  });
  byId("pareto").parentElement.hidden = !points.length;
  if (points.length) scatter(byId("pareto"), points, x, y);
  const missing = shown.length - points.length;
  const each = x.relative || y.relative ? "host and set of conditions" : "set of conditions";
  const notes = [points.length ? `Dashed: the models no other beats in both, for each ${each}. Hover, tap or focus a `
    + "point for its numbers." : "No model shown here has both numbers."];
  if (points.length && missing) notes.push(`${missing} of ${shown.length} models lack one of the two numbers.`);
  byId("pareto-note").textContent = notes.join(" ");
}

const text = (value, digits) => (value == null ? "–" : number(value, digits));
// name, value to sort by, text; columns that no model has anything in are left out.
const COLUMNS = [
  ["model", (m) => m.title],
  ["images/s", (m) => m.images_per_second],
  ["speed-up", (m) => m.speedup, (m) => (m.isBaseline ? "1" :
    `${m.speedup.toFixed(2)} (${range(m.interval)})`)],
  ["ideal", (m) => m.ideal_speedup],
  ["efficiency", (m) => m.efficiency, (m) => (m.efficiency == null ? "–" :
    `${m.efficiency.toFixed(2)}${m.efficiency_interval ? ` (${range(m.efficiency_interval)})` : ""}`)],
  ["GMACs", (m) => m.macs / 1e9],
  ["MAC ratio", (m) => m.mac_ratio],
  ["tokens left", (m) => m.tokens?.at(-1)],
  ["handed over", (m) => METRICS.handed.of(m)],
  ["prefill GMACs", (m) => METRICS.prefill.of(m)],
  ["cache (MB)", (m) => METRICS.cache.of(m)],
  ["params (M)", (m) => m.parameters / 1e6],
  ["p50 (ms)", (m) => m.latency.p50 * 1e3],
  ["p99 (ms)", (m) => m.latency.p99 * 1e3],
  ["memory (MB)", (m) => m.peak_memory && m.peak_memory / 1e6],
  ["accuracy (%)", (m) => m.accuracy?.value, (m) => (m.accuracy ?
    `${Number(m.accuracy.value.toFixed(2))} (${m.accuracy.metric}, ${m.accuracy.data}, ${m.accuracy.origin})` : "–")],
  ["divergence", (m) => m.fidelity?.divergence],
  ["measured with", (m) => (CHOICES.condition.length > 1 ? m.condition : null)],
];

function renderTable(shown) {
  const columns = COLUMNS.filter(([, value]) => rows.some((row) => value(row) != null));
  const [, sorted, direction] = /^(.*) (up|down)$/.exec(state.sort ?? "") ?? [];
  const by = columns.find(([name]) => name === sorted);
  const ordered = [...shown];
  if (by) {
    const sign = direction === "up" ? 1 : -1, value = by[1];
    const missing = (row) => value(row) == null;
    const order = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
    ordered.sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 : sign * order(value(a), value(b))));
  }
  const head = columns.map(([name]) => {
    const button = make("button", { type: "button" }, name);
    const up = sorted === name && direction === "up";
    button.addEventListener("click", () => {
      change("sort", `${name} ${up ? "down" : "up"}`);
      [...byId("table").querySelectorAll("button")].find((other) => other.textContent === name).focus();
    });
    const sort = sorted === name ? { "aria-sort": up ? "ascending" : "descending" } : {};
    return make("th", { scope: "col", class: name === "model" ? "text" : "", ...sort }, button);
  });
  const body = ordered.map((row) => {
    const cells = columns.slice(1).map(([name, value, write]) => {
      const raw = value(row), content = write ? write(row) : typeof raw === "string" ? raw : text(raw, 4);
      const unresolved = name === "speed-up" && !row.resolved && !row.isBaseline;
      return make("td", { class: typeof raw === "string" ? "text" : unresolved ? "unresolved" : "" }, content);
    });
    const attributes = { "data-method": row.methodName, "data-host": row.hostName };
    const place = row.host === null ? [] : [make("span", { class: "faint" }, ` in ${row.host}`)];
    return make("tr", attributes, make("th", { scope: "row", class: "text" }, swatch(row), row.name, ...place), ...cells);
  });
  byId("table").replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body));
}

function renderTokens(shown) {
  const counted = [...new Map(shown.filter((row) => row.tokens?.length) // once, in however many conditions measured
    .map((row) => [`${row.title} ${row.tokens}`, row])).values()];
  byId("tokens").hidden = !counted.length;
  if (counted.length) linePlot(byId("lines"), byId("lines-legend"), counted);
}

function renderBreakdown(shown) {
  const timed = shown.filter((row) => row.breakdown);
  byId("breakdown").hidden = !timed.length;
  if (!timed.length) return;
  const conditions = unique(timed.map((row) => row.condition));
  const full = (row) => (conditions.length > 1 ? `${row.title}, ${row.condition}` : row.title);
  const options = [...conditions.map((text) => `all models, ${text}`), ...timed.map(full)].map((text) => [text, text]);
  const chosen = select("bars-of", options, state.bars, "bars");
  const sum = (row) => {
    const parts = Object.create(null); // a part may have any name
    for (const { seconds } of row.breakdown) {
      for (const [part, s] of Object.entries(seconds)) parts[part] = (parts[part] ?? 0) + s;
    }
    return parts;
  };
  const one = timed.find((row) => full(row) === chosen);
  const named = (block) => (typeof block === "number" ? `block ${block}` : block);
  stackedBars(byId("bars"), byId("bars-legend"), one
    ? one.breakdown.map(({ block, seconds }) => ({ name: named(block), parts: seconds }))
    : timed.filter((row) => chosen === `all models, ${row.condition}`)
      .map((row) => ({ name: row.title, parts: sum(row) })));
}

const cards = pictures.map((record) => [record, tokenCard(record)]);

function renderPictures() {
  byId("pictures").hidden = !cards.some(([record]) => isShown(record));
  for (const [record, card] of cards) card.hidden = !isShown(record);
}

function tuneTable(record) {
  const c = record.conditions, t = record.target;
  const aim = t.speedup ? `speed-up ${t.speedup}` : t.macs ? `${number(t.macs / 1e9)} GMACs`
    : t.tokens ? `at most ${t.tokens} tokens handed over` : "no aim";
  const place = c.device === "cpu" ? `${c.threads} thread${c.threads === 1 ? "" : "s"}` : c.device;
  const labelled = record.dense != null, free = record.free;
  const heads = ["method", "settings", "GMACs", "speed-up", ...(labelled ? ["loss", "top-1 (%)"] : []),
    "divergence", "same class (%)"];
  const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
  const row = (found) => {
    const settings = Object.entries(found.settings).map(([name, value]) => `${name}=${JSON.stringify(value)}`).join(", ");
    const unresolved = found.interval[0] <= 1 && found.interval[1] >= 1;
    const best = record.best !== null && same(found, record.best);
    return make("tr", { "data-best": best, style: best ? "font-weight: bold" : "" },
      make("th", { scope: "row", class: "text" }, found.method), make("td", { class: "text" }, settings || "defaults"),
      make("td", {}, number(found.macs / 1e9, 4)),
      make("td", { class: unresolved ? "unresolved" : "" }, `${found.speedup.toFixed(2)} (${range(found.interval)})`),
      ...(labelled ? [found.classified?.loss, found.classified?.top1].map((value) => make("td", {}, text(value, 4))) : []),
      make("td", {}, number(found.fidelity.divergence, 4)),
      make("td", {}, found.fidelity.agreement == null ? "–" : number(100 * found.fidelity.agreement, 3)));
  };
  const scrolled = (label, rows) => {
    const head = heads.map((name, i) => make("th", { scope: "col", class: i < 2 ? "text" : "" }, name));
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows.map(row)));
    return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, table);
  };
  const size = `${c.input_size[1]} × ${c.input_size[2]}`, left = (record.untried ?? []).map((what) => `not tried: ${what}`);
  const said = [`${record.host}, ${aim}: batch ${c.batch_size}, ${c.dtype}, ${place}, ${size}; ${machineText(record.machine)}`,
    `${record.tried.length} settings measured`, ...(record.best === null ? ["none is named"] : []), ...left];
  if (c.data) said.push(`chosen by the ${c.measure} on ${c.data}`);
  if (labelled) said.push(`the dense model has a loss of ${number(record.dense.loss, 4)}, top-1 ${number(record.dense.top1, 4)} %`);
  const beside = !free ? [] : [make("p", {}, ["The choice beside what needs no search", ...(record.said ?? [])].join("; ")),
    scrolled(`What the choice on ${record.host} is held against`, [free.choice, ...free.random, ...free.defaults])];
  return [make("p", {}, said.join("; ")), scrolled(`Search on ${record.host}`, record.front), ...beside];
}

function errorText(accuracy) {
  const share = accuracy.value / 100, n = accuracy.images;
  return accuracy.value.toFixed(2) + (n ? ` ± ${(100 * Math.sqrt(share * (1 - share) / n)).toFixed(2)}` : "");
}

function evaluationTable(record) {
  const c = record.conditions, first = record.models[0], published = record.models.some((model) => model.published);
  const figures = published ? ["published (%)", "difference"] : [];
  const heads = ["model", `${first.accuracy.metric} (%)`, ...figures, "images", "GMACs", "MAC ratio", "tokens left"];
  const body = record.models.map((model) => {
    const known = model.published, gap = known && model.accuracy.value - known.value;
    const cells = published ? [known ? known.value.toFixed(2) : "–", known ? `${gap < 0 ? "" : "+"}${gap.toFixed(2)}` : "–"] : [];
    const title = known ? { title: `${known.data}; ${known.source}` } : {};
    return make("tr", title, make("th", { scope: "row", class: "text" }, model.name),
      ...[errorText(model.accuracy), ...cells, model.accuracy.images ?? "–", number(model.macs / 1e9, 4),
        text(model.mac_ratio, 3), text(model.tokens?.at(-1), 4)].map((cell) => make("td", {}, String(cell))));
  });
  const head = heads.map((name, i) => make("th", { scope: "col", class: i < 1 ? "text" : "" }, name));
  const size = `${c.input_size[1]} × ${c.input_size[2]}`, extras = c.weights ? [c.weights] : [];
  const how = [first.accuracy.data, first.accuracy.origin, `batch ${c.batch_size}`, c.dtype, c.device, size, ...extras];
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body));
  return [make("p", {}, `${how.join(", ")}; ${machineText(record.machine)}`),
    make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Accuracy of ${first.name}` }, table)];
}

function renderEvaluations() {
  const evaluations = records.filter((record) => record.kind === "accuracy");
  byId("evaluated").hidden = !evaluations.length;
  byId("evaluations").replaceChildren(...evaluations.flatMap(evaluationTable));
}

function renderSearches() {
  const searches = records.filter((record) => record.kind === "tune");
  byId("tuned").hidden = !searches.length;
  byId("searches").replaceChildren(...searches.flatMap(tuneTable));
}

function plainTable(label, heads, body) { // rows of texts; the first column names the row
  const head = heads.map((name) => make("th", { scope: "col", class: "text" }, name));
  const rows = body.map(([name, ...cells]) => make("tr", {}, make("th", { scope: "row", class: "text" }, name),
    ...cells.map((cell) => make("td", { class: "text" }, cell))));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, table);
}

function renderMetrics() {
  const found = records.filter((record) => record.kind === "metrics");
  byId("metrics").hidden = !found.length;
  byId("metric-tables").replaceChildren(...found.flatMap((record) => [
    make("p", {}, `${record.config}, ${record.checkpoint ?? "weights that the config names"}`),
    plainTable(`Metrics of ${record.config}`, ["metric", "value"],
      Object.entries(record.metrics).map(([name, value]) => [name, text(value, 4)])),
  ]));
}

function renderInstallations() {
  const found = records.filter((record) => record.kind === "doctor");
  const versions = (packages) => packages.map((own) => `${own.name} ${own.found ?? "missing"}`).join(", ");
  byId("installed").hidden = !found.length;
  byId("installations").replaceChildren(...found.flatMap((record) => [
    make("p", {}, [`effvit ${record.effvit}, Python ${record.python}, ${record.system}`,
      ...Object.entries(record.devices).map(([device, name]) => `${device}: ${name}`)].join("; ")),
    plainTable("What is installed", ["part", "packages", "problems"], [
      ["core", versions(record.core.packages), record.core.problem ?? "none"],
      ...Object.values(record.extras).map((own) => [`${own.name}: ${own.purpose}`, versions(own.packages),
        own.problems.join("; ") || "none"])]),
  ]));
}

function renderFacts() {
  const table = make("table");
  for (const record of profiles) {
    const m = record.machine, rounds = record.models[0]?.seconds.length;
    const versions = `${m.system}; Python ${m.python}, torch ${m.torch}, timm ${m.timm}, effvit ${m.effvit}`;
    const images = Array.isArray(record.conditions.images) ? `; ${record.conditions.images.join(", ")}` : "";
    table.append(make("tr", {},
      make("th", { scope: "row" }, record.models[0]?.name ?? "–"),
      make("td", {}, `${conditionText(record)}; ${rounds} rounds, ${record.conditions.clock} clock${images}`),
      make("td", {}, `${machineText(m)}; ${versions}`)));
  }
  byId("facts").replaceChildren(table);
  const count = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
  byId("measured").querySelector("summary").textContent =
    `${count(rows.length, "measured model")} on ${machines.join(" and ")}: how they were measured`;
  byId("measured").hidden = !profiles.length;
  byId("pictures-note").textContent = "Move a slider through the blocks. Merged patches have the mean colour of their "
    + "group, dropped ones dark red, fused ones violet; where patches are mixtures of tokens, a colour is the token "
    + "with the largest share. Point at a patch to see its group.";
}

function render() {
  hideTip();
  if (state.theme) document.documentElement.dataset.theme = state.theme;
  else delete document.documentElement.dataset.theme;
  const shown = rows.filter(isShown);
  renderFilters();
  renderPictures();
  for (const id of ["trade-off", "costs", "tokens", "breakdown"]) byId(id).hidden = !rows.length;
  if (!rows.length) return;
  renderTradeOff(shown);
  renderTable(shown);
  renderTokens(shown);
  renderBreakdown(shown);
}

byId("theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.documentElement).getPropertyValue("color-scheme").trim() === "dark"
    || (!state.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  change("theme", dark ? "light" : "dark");
});
window.addEventListener("hashchange", () => {
  readState();
  render();
});
let width = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth === width) return; // phones resize on every scroll
  width = window.innerWidth;
  render();
});

byId("cards").replaceChildren(...cards.map(([, card]) => card));
renderFacts();
renderEvaluations();
renderSearches();
renderMetrics();
renderInstallations();
readState();
render();
