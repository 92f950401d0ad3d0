// Elements, numbers and texts. Text reaches the page as text alone (textContent, fillText), never as markup.

const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

const FOCUSED = new Set(["canvas", "button", "input", "tr", "summary"]);

/** An element: `make("div", { class: "x", onclick: f }, "text", child)`. */
function make(tag, settings = {}, ...children) {
  const element = document.createElement(tag);
  if (FOCUSED.has(tag)) element.dataset.lmSuppressShortcuts = "true"; // JupyterLab leaves keys that are pressed here alone
  for (const [name, value] of Object.entries(settings)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

/** A number in few digits. */
function say(x) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (x < 0) return `−${say(-x)}`;
  const size = x;
  if (size === 0) return "0";
  if (size >= 1000) return Math.round(x).toLocaleString("en");
  if (size >= 100) return x.toFixed(0);
  if (size >= 10) return x.toFixed(1);
  if (size >= 0.01) return x.toFixed(size >= 1 ? 2 : 3);
  return x.toExponential(1).replace("e-", "e−");
}

const nameOf = ([layer, head]) => `L${layer}H${head}`;
const MARKS = { "\n": "⏎", "\r": "␍", "\t": "⇥", " ": "·", "▁": "·", "Ġ": "·", "Ċ": "⏎" };
const UNPRINTABLE = /[\p{C}\p{Zl}\p{Zp}]/u;

/** A token with every character visible: spaces, line breaks, controls and direction marks too. */
function shown(text, limit = 24) {
  let visible = "";
  for (const one of String(text ?? "").slice(0, 4 * limit)) {
    const code = one.codePointAt(0).toString(16);
    visible += MARKS[one] ?? (UNPRINTABLE.test(one) ? `\\u${code.padStart(4, "0")}` : one);
  }
  const letters = [...visible];
  return letters.length > limit ? letters.slice(0, limit - 1).join("") + "…" : visible || "∅";
}

/** Nearest step from 1, 2, 5, 10 … at which labels stand at least `least` pixels apart. */
function stepOf(pixels, least) {
  const need = Math.max(1, least / pixels);
  const scale = 10 ** Math.floor(Math.log10(need));
  return [1, 2, 5, 10].map((x) => x * scale).find((x) => x >= need * 0.999);
}

/** Every half-precision number by its bits. */
const HALF = (() => {
  const table = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const rest = bits & 1023;
    if (exponent === 31) table[bits] = rest ? NaN : sign * Infinity;
    else table[bits] = sign * (exponent ? 2 ** (exponent - 15) * (1 + rest / 1024) : (2 ** -14 * rest) / 1024);
  }
  return table;
})();

/** What was used last, up to `limit` bytes; shared by all explorers of a page. */
class Recent {
  constructor(limit) {
    this.limit = limit;
    this.bytes = 0;
    this.held = new Map();
  }

  get(key) {
    const found = this.held.get(key);
    if (!found) return undefined;
    this.held.delete(key);
    this.held.set(key, found);
    return found.value;
  }

  put(key, value, bytes) {
    this.drop(key);
    this.held.set(key, { value, bytes });
    this.bytes += bytes;
    for (const oldest of this.held.keys()) {
      if (this.bytes <= this.limit) break;
      this.drop(oldest);
    }
  }

  drop(key) {
    const found = this.held.get(key);
    if (!found) return;
    this.bytes -= found.bytes;
    this.held.delete(key);
  }
}

const CACHE_BYTES = 32e6; // answers; painted tiles take 6 MB more at most
const PAINTED = 96;
const recent = (globalThis[Symbol.for("headscope.recent")] ??= new Recent(CACHE_BYTES));
