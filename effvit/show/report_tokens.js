// Pictures of tokens, painted as effvit.visualize paints them.

const STATE_TEXT = {
  dropped: "dropped", alone: "kept", merged: "merged", fused: "fused", soft: "largest share of",
};
const TINTS = { dropped: [[120, 46, 40], 0.66], fused: [[96, 84, 152], 0.62] };
const [SOFT_SHARE, HUE_STEP] = [0.5, 0.618034];

function hueColour(label) { // hsv(hue, 0.75, 1)
  const hue = ((label * HUE_STEP) % 1) * 6;
  return [5, 3, 1].map((shift) => {
    const k = (shift + hue) % 6;
    return 255 * (1 - 0.75 * Math.max(0, Math.min(k, 4 - k, 1)));
  });
}

function stateOf(stage, label) {
  if (stage.soft) return "soft";
  if (label < 0) return "dropped";
  if (stage.fusedIds.has(label)) return "fused";
  return stage.members.get(label) > 1 ? "merged" : "alone";
}

function prepared(stage) {
  const members = new Map();
  for (const label of stage.labels.flat()) members.set(label, (members.get(label) ?? 0) + 1);
  return { ...stage, members, fusedIds: new Set(stage.fused) };
}

// The stage painted over pixels (RGBA, width x height); chosen is a label to show alone, or undefined.
function paint(pixels, width, height, stage, chosen) {
  const rows = stage.labels.length, columns = stage.labels[0].length;
  const labelAt = (x, y) => stage.labels[Math.floor((y * rows) / height)][Math.floor((x * columns) / width)];
  const sums = new Map();
  const out = new Uint8ClampedArray(pixels);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const i = 4 * (y * width + x), sum = sums.get(labelAt(x, y)) ?? [0, 0, 0, 0];
      for (let c = 0; c < 3; c++) sum[c] += pixels[i + c];
      sum[3]++;
      sums.set(labelAt(x, y), sum);
    }
  }
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const i = 4 * (y * width + x), label = labelAt(x, y), state = stateOf(stage, label);
      const grey = (pixels[i] + pixels[i + 1] + pixels[i + 2]) / 3;
      const grouped = state === "merged" || state === "soft";
      const differs = (u, v) => u >= 0 && v >= 0 && u < width && v < height && labelAt(u, v) !== label;
      const mix = (colour, share) => colour.map((value) => (1 - share) * grey + share * value);
      let colour = null;
      if (grouped && (differs(x - 1, y) || differs(x + 1, y) || differs(x, y - 1) || differs(x, y + 1))) {
        colour = [255, 255, 255];
      } else if (state in TINTS) {
        colour = mix(...TINTS[state]);
      } else if (state === "soft") {
        colour = mix(hueColour(label), SOFT_SHARE);
      } else if (state === "merged") {
        const sum = sums.get(label);
        colour = sum.slice(0, 3).map((value) => value / sum[3]);
      }
      for (let c = 0; c < 3; c++) {
        const value = colour ? colour[c] : pixels[i + c];
        out[i + c] = chosen === undefined || chosen === label ? value : 0.35 * value;
      }
    }
  }
  return new ImageData(out, width, height);
}

function tokenCard(record) {
  const canvas = make("canvas", { role: "img", width: 224, height: 224 });
  const slider = make("input", { type: "range", min: 0, max: record.stages.length, value: record.stages.length });
  const output = make("output", { class: "note" });
  const stages = record.stages.map(prepared);
  const image = new Image();
  let pixels = null;

  function show(chosen) {
    const stage = stages[slider.value - 1];
    const handed = stage?.handed_over ? "handed over behind " : "";
    const where = stage ? `${handed}block ${stage.block}: ${stage.tokens} tokens` : "the picture as the model sees it";
    output.textContent = where;
    slider.setAttribute("aria-valuetext", where);
    canvas.setAttribute("aria-label", `${record.name}, ${record.title}, ${where}`);
    if (pixels === null) return;
    const { width, height } = canvas;
    const view = stage ? paint(pixels, width, height, stage, chosen) : new ImageData(pixels, width, height);
    canvas.getContext("2d").putImageData(view, 0, 0);
  }

  function point(event) {
    const stage = stages[slider.value - 1];
    if (!stage) return;
    const box = canvas.getBoundingClientRect(), rows = stage.labels.length, columns = stage.labels[0].length;
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const label = stage.labels[row]?.[column];
    if (label === undefined) return;
    const state = stateOf(stage, label), size = stage.members.get(label);
    show(label);
    const token = state === "dropped" ? "" : ` token ${label}`;
    const shared = state === "dropped" || size < 2 ? "" : `, with ${size - 1} other${size > 2 ? "s" : ""}`;
    output.textContent += ` — patch (${row}, ${column}) ${STATE_TEXT[state]}${token}${shared}`;
  }

  image.addEventListener("load", () => {
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    show();
  });
  image.src = record.picture;
  slider.addEventListener("input", () => show());
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("pointerleave", () => show());
  show();
  const heading = make("h3", {}, `${record.name}: ${record.title}`);
  const note = record.note ? [make("p", { class: "note" }, record.note)] : [];
  return make("figure", { class: "card" }, heading, canvas, make("label", {}, "Block", slider), output, ...note);
}
