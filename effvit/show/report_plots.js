// Elements, tooltips and the three plots.

const SVG = document.getElementById("pareto").namespaceURI;
const SHAPES = { // of side 2 around the origin
  circle: "M-1,0a1,1 0 1,0 2,0a1,1 0 1,0 -2,0z",
  square: "M-.87,-.87h1.74v1.74h-1.74z",
  diamond: "M0,-1.2L1.2,0L0,1.2L-1.2,0z",
  triangle: "M0,-1.15L1.1,.85H-1.1z",
  down: "M0,1.15L1.1,-.85H-1.1z",
  plus: "M-.4,-1.1h.8v.7h.7v.8h-.7v.7h-.8v-.7h-.7v-.8h.7z",
};
const DASHES = ["", "7 4", "2 4", "10 3 2 3", "4 2"];
const PARTS = { __proto__: null, attention: "--c0", mlp: "--c1", reduction: "--c2" };
const OTHER_PARTS = ["--c5", "--c4", "--c3", "--c6", "--c7"];

function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const number = (value, digits = 3) => {
  if (value === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(value)));
  if (size < -3) return value.toExponential(digits - 1);
  return value.toFixed(Math.min(6, Math.max(0, digits - 1 - size)));
};
const range = (bounds) => `${bounds[0].toFixed(2)}–${bounds[1].toFixed(2)}`;

// -- the tooltip: on hover, focus and tap ---------------------------------------------------------------

const tip = document.getElementById("tip");

function explain(element, text) {
  const show = () => {
    tip.textContent = text;
    tip.hidden = false;
    const box = element.getBoundingClientRect();
    const left = Math.min(box.right + 8, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(8, left) + window.scrollX}px`;
    tip.style.top = `${(above < 0 ? box.bottom + 8 : above) + window.scrollY}px`;
  };
  element.setAttribute("tabindex", "0");
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", text);
  for (const event of ["mouseenter", "focus", "click"]) element.addEventListener(event, show);
  for (const event of ["mouseleave", "blur"]) element.addEventListener(event, hideTip);
  return element;
}

function hideTip() {
  tip.hidden = true;
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});

// -- axes ----------------------------------------------------------------------------------------------

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= rough);
  const first = Math.ceil(low / step - 1e-9);
  const found = [];
  for (let i = 0; i <= 2 * count + 2; i++) { // where numbers are too large to tell steps apart, adding never ends
    const value = (first + i) * step;
    if (!(value <= high + step * 1e-9)) break;
    found.push(value);
  }
  return found;
}

function spanOf(values, share = 0.06) {
  const low = Math.min(...values), high = Math.max(...values);
  const pad = (high - low || Math.abs(high) || 1) * share;
  return [low < 0 ? low - pad : Math.max(0, low - pad), high + pad];
}

// An empty frame in the svg; x and y are {title, span}. Returns the two scales, data to pixels.
function frame(svg, x, y, height) {
  const width = Math.max(240, svg.parentElement.clientWidth - 16);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  const yTicks = ticks(...y.span, 5).map((value) => [value, tickText(value, y.span)]);
  const left = 14 + 7 * Math.max(...yTicks.map(([, text]) => text.length)), top = 26, bottom = height - 42;
  const right = width - 12;
  const across = (value) => left + ((value - x.span[0]) / (x.span[1] - x.span[0])) * (right - left);
  const up = (value) => bottom - ((value - y.span[0]) / (y.span[1] - y.span[0])) * (bottom - top);
  for (const [value, text] of yTicks) {
    svg.append(
      draw("line", { class: "grid", x1: left, x2: right, y1: up(value), y2: up(value) }),
      draw("text", { class: "faint", x: left - 6, y: up(value) + 4, "text-anchor": "end" }, text),
    );
  }
  for (const value of ticks(...x.span, Math.max(2, Math.floor(width / 70)))) {
    const text = tickText(value, x.span);
    svg.append(
      draw("line", { class: "grid", x1: across(value), x2: across(value), y1: top, y2: bottom }),
      draw("text", { class: "faint", x: across(value), y: bottom + 16, "text-anchor": "middle" }, text),
    );
  }
  svg.append(
    draw("text", { x: 0, y: 14 }, y.title),
    draw("text", { x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, x.title),
  );
  return { across, up, left, right, top, bottom };
}

const tickText = (value, span) => {
  const size = Math.max(Math.abs(span[0]), Math.abs(span[1]));
  if (value !== 0 && size < 1e-3) return value.toExponential(1);
  return String(Number(value.toPrecision(6)));
};

// -- points with their Pareto fronts -------------------------------------------------------------------

// The points no other beats in both directions, from left to right; points are {x, y}.
function paretoFront(points, xBetter, yBetter) {
  const beats = (a, b) =>
    xBetter * (a.x - b.x) >= 0 && yBetter * (a.y - b.y) >= 0 && (a.x !== b.x || a.y !== b.y);
  return points.filter((p) => !points.some((q) => beats(q, p))).sort((a, b) => a.x - b.x || a.y - b.y);
}

// points: {x, y, low, high, row, text}; low and high bound x where it has an interval.
function scatter(svg, points, xMetric, yMetric) {
  const xs = points.flatMap((p) => [p.x, p.low ?? p.x, p.high ?? p.x]);
  const plane = frame(
    svg,
    { title: axisTitle(xMetric), span: spanOf(xs) },
    { title: axisTitle(yMetric), span: spanOf(points.map((p) => p.y)) },
    Math.max(300, Math.min(430, svg.parentElement.clientWidth * 0.62)),
  );
  const named = new Set(points.length <= 8 ? points : []); // of many points only the fronts' are named
  const group = ({ row }) => (xMetric.relative || yMetric.relative ? `${row.hostName}, ${row.condition}` : row.condition);
  for (const key of new Set(points.map(group))) {
    const own = points.filter((p) => group(p) === key);
    const front = paretoFront(own, xMetric.better, yMetric.better);
    const path = front.map((p, i) => `${i ? "L" : "M"}${plane.across(p.x)},${plane.up(p.y)}`).join("");
    svg.append(draw("path", { class: "front", d: path }));
    front.forEach((p) => named.add(p));
  }
  const taken = [];
  const labels = [];
  for (const p of points) {
    const { across, up } = plane;
    const [x, y] = [across(p.x), up(p.y)];
    const style = styleOf(p.row);
    if (p.low !== undefined) {
      const ends = { x1: across(p.low), x2: across(p.high), y1: y, y2: y };
      svg.append(draw("line", { class: "interval", ...ends, style: `stroke: ${style.colour}` }));
    }
    const mark = draw("path", {
      class: "point", d: SHAPES[style.shape], transform: `translate(${x},${y}) scale(6.5)`,
      "vector-effect": "non-scaling-stroke", style: `fill: ${style.colour}`,
    });
    svg.append(explain(mark, p.text));
    taken.push([x - 8, y - 8, x + 8, y + 8]);
    if (named.has(p)) labels.push([x, y, p.row.name]);
  }
  for (const [x, y, text] of labels) placeLabel(svg, x, y, text, taken, plane);
}

// The label beside its point where it covers no other, else nowhere: the tooltip and the table name every point.
function placeLabel(svg, x, y, text, taken, plane) {
  const long = 6.6 * text.length;
  const middle = x - long / 2;
  for (const [left, base] of [[middle, y - 12], [middle, y + 20], [x + 11, y + 4], [x - 11 - long, y + 4]]) {
    const box = [left, base - 11, left + long, base + 3];
    const overlaps = taken.some((t) => box[0] < t[2] && t[0] < box[2] && box[1] < t[3] && t[1] < box[3]);
    if (overlaps || box[0] < plane.left || box[2] > plane.right || box[1] < plane.top || box[3] > plane.bottom) continue;
    taken.push(box);
    svg.append(draw("text", { class: "halo", x: left, y: base, "aria-hidden": "true" }, text));
    return;
  }
}

// -- lines of token counts -----------------------------------------------------------------------------

function linePlot(svg, legend, rows) {
  const depth = Math.max(...rows.map((row) => row.tokens.length));
  const most = Math.max(...rows.map((row) => row.tokens[0]), ...rows.flatMap((row) => row.tokens));
  const plane = frame(
    svg,
    { title: "block", span: [-0.3, Math.max(1, depth - 0.7)] },
    { title: "patch tokens that leave it", span: [0, most * 1.06 || 1] },
    300,
  );
  const seen = Object.create(null);
  legend.replaceChildren();
  for (const row of rows) {
    const { colour, shape } = styleOf(row);
    const dash = DASHES[(seen[row.methodName] = (seen[row.methodName] ?? -1) + 1) % DASHES.length];
    const line = { class: "line", "stroke-dasharray": dash, style: `stroke: ${colour}` };
    const at = row.tokens.map((count, block) => [plane.across(block), plane.up(count)]);
    svg.append(draw("path", { ...line, d: at.map(([x, y], i) => `${i ? "L" : "M"}${x},${y}`).join("") }));
    at.forEach(([x, y], block) => {
      if (block && row.tokens[block] === row.tokens[block - 1]) return;
      const mark = draw("path", {
        class: "point", d: SHAPES[shape], transform: `translate(${x},${y}) scale(4)`,
        "vector-effect": "non-scaling-stroke", style: `fill: ${colour}`,
      });
      svg.append(explain(mark, `${row.name}\nblock ${block}: ${number(row.tokens[block], 4)} tokens`));
    });
    const sample = draw("svg", { class: "swatch", viewBox: "0 0 26 14" }, draw("path", { ...line, d: "M0,7H26" }));
    legend.append(make("li", {}, sample, row.title));
  }
}

// -- stacked bars --------------------------------------------------------------------------------------

// bars: {name, parts: {part: seconds}}, from top to bottom.
function stackedBars(svg, legend, bars) {
  const parts = [...new Set(bars.flatMap((bar) => Object.keys(bar.parts)))];
  const others = parts.filter((part) => !(part in PARTS));
  const colours = parts.map((part) => PARTS[part] ?? OTHER_PARTS[others.indexOf(part) % OTHER_PARTS.length]);
  const totals = bars.map((bar) => Object.values(bar.parts).reduce((sum, s) => sum + s, 0));
  const width = Math.max(240, svg.parentElement.clientWidth - 16), each = 40;
  svg.setAttribute("viewBox", `0 0 ${width} ${bars.length * each}`);
  svg.replaceChildren();
  bars.forEach((bar, i) => {
    const top = i * each;
    let left = 0;
    svg.append(
      draw("text", { x: 0, y: top + 13 }, bar.name),
      draw("text", { class: "faint", x: width, y: top + 13, "text-anchor": "end" }, `${number(1e3 * totals[i])} ms`),
    );
    parts.forEach((part, k) => {
      const seconds = bar.parts[part] ?? 0, wide = (seconds / Math.max(...totals)) * width;
      if (!wide) return;
      const text = `${bar.name}\n${part}: ${number(1e3 * seconds)} ms, ${Math.round((100 * seconds) / totals[i])} %`;
      const box = { class: "point", x: left, y: top + 18, width: wide, height: 15, style: `fill: var(${colours[k]})` };
      svg.append(explain(draw("rect", box), text));
      left += wide;
    });
  });
  const keys = parts.map((part, k) => {
    const box = draw("rect", { width: 14, height: 14, rx: 2, style: `fill: var(${colours[k]})` });
    return make("li", {}, draw("svg", { class: "swatch", viewBox: "-6 0 26 14" }, box), part);
  });
  legend.replaceChildren(...keys);
}
