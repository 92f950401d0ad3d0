// Colours: viridis for weights, blue to red for differences; both can be told apart by colour-blind readers.

const VIRIDIS = [
  "440154", "481467", "482576", "453781", "404688", "39558c", "33638d", "2d718e", "287d8e", "238a8d", "1f968b",
  "20a386", "29af7f", "3dbc74", "56c667", "75d054", "95d840", "bade28", "dde318", "fde725",
];
const DIVERGING = {
  light: ["053061", "2166ac", "4393c3", "92c5de", "d1e5f0", "f7f7f7", "fddbc7", "f4a582", "d6604d", "b2182b", "67001f"],
  dark: ["9ecbff", "5aa2e8", "2f78bf", "1f4f80", "182f4a", "1b2026", "4a2420", "853528", "c4533a", "f08262", "ffc2a8"],
};
const SPANS = ["#1f6f8b", "#c8553d", "#6b8f3c", "#8a5a9e", "#d19a2a", "#3c7dc4", "#b5487f", "#4d8f83"];
const POWERS = { 0.0001: "10⁻⁴", 0.001: "10⁻³", 1: "1", "-1": "−1", "-0.03": "−.03", 0.03: ".03", 0.5: ".5" };
const FLOOR = 1e-4; // where the logarithmic scale begins
const FLOOR_OF_CHANGE = 1e-3;

const channels = (hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16));

/** A colour between stops, t in 0..1, as [r, g, b]. */
function between(stops, t) {
  const at = clamp(t, 0, 1) * (stops.length - 1);
  const i = Math.min(Math.floor(at), stops.length - 2);
  const [a, b] = [channels(stops[i]), channels(stops[i + 1])];
  return a.map((x, c) => Math.round(x + (b[c] - x) * (at - i)));
}

/** How values become colours: `kind` "log", "linear" or "change" (signed), `high` the end of the scale. */
class Scale {
  constructor(kind, high, dark) {
    Object.assign(this, { kind, high, dark });
    this.stops = kind === "change" ? DIVERGING[dark ? "dark" : "light"] : VIRIDIS;
  }

  /** Where a value lies, 0..1. */
  place(x) {
    if (this.kind === "linear") return clamp(x / this.high, 0, 1);
    const floor = this.kind === "log" ? FLOOR : FLOOR_OF_CHANGE;
    const size = Math.abs(x) < floor ? 0 : clamp(Math.log(Math.abs(x) / floor) / Math.log(this.high / floor), 0, 1);
    return this.kind === "log" ? size : 0.5 + (Math.sign(x) * size) / 2;
  }

  css(x) {
    return `rgb(${between(this.stops, this.place(x)).join(" ")})`;
  }

  /** RGBA of places along the scale, in 512 steps. */
  get shades() {
    return (this._shades ??= Uint32Array.from({ length: 512 }, (_, i) => {
      const [r, g, b] = between(this.stops, i / 511);
      return (255 << 24) | (b << 16) | (g << 8) | r;
    }));
  }

  /** RGBA of every half by its bits; what is not a number is clear. */
  get table() {
    if (this._table) return this._table;
    const { shades } = this;
    const table = new Uint32Array(65536);
    for (let bits = 0; bits < 65536; bits++) {
      if (Number.isFinite(HALF[bits])) table[bits] = shades[Math.round(this.place(HALF[bits]) * 511)];
    }
    return (this._table = table);
  }

  /** Values that a legend names. */
  get marks() {
    if (this.kind === "linear") return [0, this.high / 2, this.high];
    if (this.kind === "log") return [1e-4, 1e-3, 1e-2, 1e-1, 1].filter((x) => x <= this.high * 1.001);
    return [-this.high, -0.03, 0, 0.03, this.high];
  }
}

/** An image of `columns` x `rows` pixels; `fill` writes their RGBA. */
function picture(columns, rows, fill) {
  const canvas = document.createElement("canvas");
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  fill(new Uint32Array(image.data.buffer));
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Halves as an image. */
function paint(bits, columns, rows, scale) {
  const { table } = scale;
  return picture(columns, rows, (pixels) => {
    for (let i = 0; i < pixels.length; i++) pixels[i] = table[bits[i]];
  });
}

/** Numbers of a row as an image one pixel high. */
function paintRow(values, scale) {
  const { shades } = scale;
  return picture(values.length, 1, (pixels) => values.forEach((x, i) => (pixels[i] = shades[Math.round(scale.place(x) * 511)])));
}

/** A legend: a bar of colour with its values. */
function legend(scale, label) {
  const bar = make("div", { class: "bar" });
  const stops = Array.from({ length: 12 }, (_, i) => `rgb(${between(scale.stops, i / 11).join(" ")})`);
  bar.style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
  const marks = scale.marks.map((x) => {
    const at = scale.place(x) * 100;
    const shift = at < 5 ? "0" : at > 95 ? "-100%" : "-50%";
    return make("span", { style: { left: `${at}%`, transform: `translateX(${shift})` } }, POWERS[x] ?? say(x));
  });
  return make("div", { class: "legend" }, make("div", { class: "what" }, label), bar, make("div", { class: "marks" }, ...marks));
}
