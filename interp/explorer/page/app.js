// The whole: which screen is shown, the bar above it, keys, themes, search.

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const REFINE_AFTER = 250; // ms of rest

class App {
  constructor(element, source, options = {}) {
    Object.assign(this, { element, source, page: options.page ?? false, height: options.height ?? 680 });
    Object.assign(this, { screen: "heads", run: 0, head: null, pool: "mass", kind: "log", history: [], hits: { shown: [], at: -1, text: "" } });
    element.classList.add("headscope-explorer");
    element.dataset.lmSuppressShortcuts = "true"; // as in make
    element.headscope = this; // for tests and measurements
    this.toolTip = make("div", { class: "tip", hidden: true });
    this.theme();
    element.replaceChildren(make("p", { class: "soft loading" }, "opening…"));
    this.closing = new AbortController();
    source.ask("open").then((open) => this.begin(open), (error) => this.fail(error));
  }

  fail(error) {
    this.element.replaceChildren(make("p", { class: "failed" }, `The explorer cannot open: ${error.message}`));
  }

  begin(open) {
    this.open = open;
    this.index = new Map(open.heads.map((head, i) => [head.join("/"), i]));
    this.edges = ["entropy", "sink_mass", "key_mass"].map((name) => open.edges.find((one) => one.name === name)).filter(Boolean);
    this.names = open.runs.map((one) => one.name);
    this.labels = ["A", "B", "B − A"];
    this.tokens = Math.max(...open.runs.map((one) => one.tokens.length));
    this.view = new View(this.tokens);
    this.sides = open.runs.length > 1 ? (open.compared ? [0, 1, 2] : [0, 1]) : [0];
    this.colourAgain();
    this.heads = new Heads(this);
    this.side = new Side(this);
    this.token = new Token(this);
    this.line = new Line(this);
    this.panes = this.sides.map((run) => new MapPane(this, run, this.view));
    this.maps = make("div", { class: "maps" });
    this.mapScreen = make("section", { class: "mapscreen" }, this.maps, this.side.element);
    this.bar = make("header", { class: "bar-top" });
    this.stage = make("main", { class: "stage" });
    this.foot = make("footer", { class: "foot soft small" });
    this.element.replaceChildren(this.bar, this.stage, this.foot, this.toolTip);
    if (!this.page) this.stage.style.height = `${this.height}px`;
    this.buildBar();
    this.about();
    const { signal } = this.closing;
    this.element.addEventListener("keydown", (event) => this.key(event), { signal });
    this.element.tabIndex = -1;
    if (this.page) {
      document.addEventListener("keydown", (event) => event.target === document.body && this.key(event), { signal });
    }
    this.resize = new ResizeObserver(() => this.layout());
    this.resize.observe(this.stage);
    this.go("heads");
    this.opened = performance.now(); // for measurements
  }

  // -- the bar above --------------------------------------------------------------------------------------------------

  buildBar() {
    this.crumbs = make("nav", { class: "crumbs", "aria-label": "Where you are" });
    this.controls = make("div", { class: "controls" });
    this.search = make("input", { type: "search", placeholder: "Search tokens, or L5H3  ( / )", "aria-label": "Search tokens", spellcheck: "false" });
    this.found = make("span", { class: "soft small found" });
    this.search.addEventListener("input", () => this.find(this.search.value));
    this.search.addEventListener("keydown", (event) => {
      if (event.key === "Enter") this.next(event.shiftKey ? -1 : 1);
      if (event.key === "Escape") {
        this.search.value = "";
        this.find("");
        this.focus();
      }
      event.stopPropagation();
    });
    this.bar.replaceChildren(this.crumbs, this.controls, make("div", { class: "searching" }, this.found, this.search));
  }

  showBar() {
    const link = (text, action, here) => make("button", { class: "crumb", onclick: action, "aria-current": here ? "page" : undefined }, text);
    const crumbs = [link(this.open.title, () => this.go("heads"), this.screen === "heads")];
    if (this.head) crumbs.push(link(nameOf(this.head), () => this.go("map"), this.screen === "map"));
    if (this.screen === "token") crumbs.push(link(`token ${this.token.position}`, () => {}, true));
    if (this.screen === "line") crumbs.push(link("answer", () => {}, true));
    this.crumbs.replaceChildren(...crumbs.flatMap((one, i) => (i ? [make("span", { class: "soft" }, "›"), one] : [one])));
    const toggle = (text, pressed, action, title) => make("button", { class: "chip", "aria-pressed": String(pressed), onclick: action, title }, text);
    const controls = [];
    if (this.screen === "map") {
      if (this.open.runs.length > 1) {
        const all = this.open.compared ? [0, 1, 2] : [0, 1];
        for (const run of all) controls.push(toggle(this.labels[run], this.sides.includes(run), () => this.showRun(run), run === 2 ? `${this.names[1]} less ${this.names[0]}` : this.names[run]));
        controls.push(make("span", { class: "gap" }));
      }
      for (const [pool, text] of [["mass", "mass"], ["max", "max"]]) controls.push(toggle(text, this.pool === pool, () => this.set({ pool }), "what a block of a far view shows"));
      controls.push(make("span", { class: "gap" }));
      for (const kind of ["log", "linear"]) controls.push(toggle(kind, this.kind === kind, () => this.set({ kind }), "colour scale"));
      controls.push(make("span", { class: "gap" }));
      for (const [text, factor, name] of [["−", 0.5, "zoom out"], ["+", 2, "zoom in"]]) controls.push(make("button", { class: "chip", "aria-label": name, title: name, onclick: () => this.zoom(factor) }, text));
      controls.push(make("button", { class: "chip", title: "the whole map (0)", onclick: () => this.whole() }, "fit"));
    } else if (this.open.runs.length > 1) {
      const all = this.open.compared ? [0, 1, 2] : [0, 1];
      for (const run of all) controls.push(toggle(this.labels[run], this.run === run, () => this.set({ run }), run === 2 ? `${this.names[1]} less ${this.names[0]}` : this.names[run]));
    }
    if (this.open.runs.some((one) => one.answer !== null) && this.screen !== "line") controls.push(make("button", { class: "chip", onclick: () => this.go("line") }, "answer"));
    this.controls.replaceChildren(...controls);
  }

  showRun(run) {
    const sides = this.sides.includes(run) ? this.sides.filter((one) => one !== run) : [...this.sides, run].sort();
    if (!sides.length) return;
    this.sides = sides;
    this.panes = sides.map((one) => new MapPane(this, one, this.view));
    this.go("map", true);
  }

  set(changes) {
    Object.assign(this, changes);
    this.colourAgain();
    this.go(this.screen, true);
  }

  // -- screens --------------------------------------------------------------------------------------------------------

  go(screen, again = false) {
    if (screen === "map" && !this.head) return;
    if (screen === "line" && !this.head) this.head = this.heads.order()[0][0];
    if (!again && screen !== this.screen) this.history.push(this.screen);
    this.screen = screen;
    this.tip(null);
    this.element.dataset.screen = screen;
    this.note.textContent = "";
    const shownElement = { heads: this.heads.element, map: this.mapScreen, token: this.token.element, line: this.line.element }[screen];
    if (this.stage.firstChild !== shownElement) this.stage.replaceChildren(shownElement);
    if (screen === "map") {
      const elements = this.panes.map((one) => one.element);
      const there = [...this.maps.children]; // put back, an element would lose the focus
      if (elements.length !== there.length || elements.some((one, i) => one !== there[i])) this.maps.replaceChildren(...elements);
      this.maps.dataset.count = this.panes.length;
    }
    this.showBar();
    this.layout();
    if (screen === "map") this.side.show();
    if (screen === "line") this.line.show();
  }

  openHead(head, at) {
    this.head = head;
    if (at) this.view.selected = at;
    this.go("map");
    if (at) this.view.centre(at.query, at.key, Math.max(this.view.scale, Math.min(16, FINEST)), this.panes[0].size);
    this.focus();
    this.draw();
  }

  openToken(kind, position, run = this.run) {
    this.go("token");
    this.token.show(kind, position, run);
    this.showBar();
  }

  back() {
    const before = this.history.pop();
    if (before) this.go(before, true);
    this.focus();
  }

  focus() {
    const target = this.screen === "map" ? this.panes[0].canvas : this.element;
    target.focus({ preventScroll: true });
  }

  // -- layout and drawing ---------------------------------------------------------------------------------------------

  layout() {
    if (this.screen === "heads") return this.heads.show();
    if (this.screen === "token") return this.token.draw();
    if (this.screen === "line") return this.line.draw();
    const box = this.maps.getBoundingClientRect();
    if (!box.width) return;
    const count = this.panes.length;
    const height = (this.page ? Math.max(420, globalThis.innerHeight - 150) : this.height) - 34;
    const fitted = this.view.scale === 0;
    const least = this.panes[0].size ? Math.min(this.panes[0].size.width, this.panes[0].size.height) / this.tokens : 0;
    const whole = fitted || Math.abs(this.view.scale / least - 1) < 1e-6;
    for (const pane of this.panes) {
      pane.caption.textContent = count > 1 ? `${this.labels[pane.run]}  ${pane.run === 2 ? "the difference" : this.names[pane.run]}` : "";
      pane.layout(Math.floor((box.width - 12 * (count - 1)) / count), height, count > 1);
    }
    const { size } = this.panes[0];
    if (whole) this.view.fit(size.width, size.height);
    else this.view.keep(size);
    this.draw();
  }

  draw() {
    if (this.screen !== "map" || this.drawing) return;
    this.drawing = true;
    requestAnimationFrame(() => {
      this.drawing = false;
      if (this.screen !== "map") return;
      for (const pane of this.panes) pane.draw();
      this.status();
      clearTimeout(this.resting);
      this.resting = setTimeout(() => this.rest(), REFINE_AFTER);
    });
  }

  /** Nothing moves: say what is heaviest, and make estimates exact. */
  rest() {
    if (this.screen !== "map" || !this.source.idle) return;
    this.side.showHeavy();
    const next = this.panes.flatMap((pane) => pane.unfinished())[0];
    if (!next) return;
    this.source.ask(next.question, () => this.screen === "map").then(() => this.draw(), () => {});
  }

  /** A tile was painted: the oldest pictures go. */
  painted(answer) {
    const all = (recent.painted ??= new Set());
    all.delete(answer);
    all.add(answer);
    for (const oldest of all) {
      if (all.size <= PAINTED) break;
      oldest.image = oldest.painted = null;
      all.delete(oldest);
    }
  }

  status() {
    const [pane] = this.panes;
    const level = pane.heldLevel(pane.shownLevel);
    const parts = [level ? `a cell is ${2 ** level} × ${2 ** level} tokens` : "single weights"];
    const open = pane.unfinished();
    if (open.length) {
      const { rows, of } = open[0].answer;
      parts.push(this.source.saved ? "" : `estimated from ${rows} of ${of} rows of each block, becoming exact`);
    }
    if (this.panes.some((one) => one.missing)) parts.push("finer tiles of this head are not in this file: the nearest coarser ones are shown");
    this.note.textContent = parts.filter(Boolean).join(" · ");
  }

  about() {
    this.note = make("span", {});
    const parts = [this.note];
    const { saved } = this.source;
    if (saved) {
      const rows = Object.entries(saved.contents).map(([what, [done, of]]) => make("li", {}, `${what}: ${done === of ? "all" : done} of ${of.toLocaleString("en")}`));
      parts.push(make("details", {}, make("summary", {}, "what this file holds, and what it leaves out"), make("ul", {}, ...rows), make("p", {}, "Weights are rounded to 0.8 %. For every zoom of every head, open the explorer in Python.")));
      parts.push(make("details", {}, make("summary", {}, "provenance"), make("pre", {}, JSON.stringify(saved.facts, null, 1))));
    }
    parts.push(make("span", { class: "keys" }, "arrows move · + − zoom · 0 whole · [ ] heads · / search · Esc back"));
    this.foot.replaceChildren(...parts);
  }

  tip(event, ...children) {
    this.toolTip.hidden = !event;
    if (!event) return;
    this.toolTip.replaceChildren(...children);
    const box = this.element.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    this.toolTip.style.left = `${x > box.width - 260 ? x - this.toolTip.offsetWidth - 14 : x + 16}px`;
    this.toolTip.style.top = `${y > box.height - 120 ? y - this.toolTip.offsetHeight - 10 : y + 14}px`;
  }

  // -- keys and search ------------------------------------------------------------------------------------------------

  zoom(factor) {
    const { size } = this.panes[0];
    this.view.zoom(factor, size.width / 2, size.height / 2, size);
    this.draw();
  }

  whole() {
    const { size } = this.panes[0];
    this.view.fit(size.width, size.height);
    this.draw();
  }

  neighbour(step) {
    const at = this.head ? this.index.get(this.head.join("/")) : 0;
    this.head = this.open.heads[(at + step + this.open.heads.length) % this.open.heads.length];
    this.go(this.screen, true);
    this.focus();
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target instanceof HTMLInputElement) return;
    const { key } = event;
    const move = MOVES[key];
    if (key === "/") this.search.focus();
    else if (key === "Escape") this.back();
    else if (key === "[" || key === "]") this.neighbour(key === "]" ? 1 : -1);
    else if (this.screen === "line" && (key === "ArrowUp" || key === "ArrowDown")) this.neighbour(move[1]);
    else if (this.screen === "token" && (key === "ArrowLeft" || key === "ArrowRight")) {
      const { tokens } = this.open.runs[this.token.run === 2 ? 1 : this.token.run];
      this.token.show(this.token.kind, clamp(this.token.position + move[0], 0, tokens.length - 1), this.token.run);
      this.showBar();
    } else if (this.screen === "map" && move) this.move(move, event.shiftKey);
    else if (this.screen === "map" && (key === "+" || key === "=")) this.zoom(2);
    else if (this.screen === "map" && key === "-") this.zoom(0.5);
    else if (this.screen === "map" && key === "0") this.whole();
    else if (this.screen === "map" && key === "Enter" && this.view.selected) this.openToken("query", this.view.selected.query, this.panes[0].run);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** Arrows move the view; with Shift, the selected cell. */
  move([x, y], selection) {
    const { view } = this;
    const { size } = this.panes[0];
    if (selection) {
      const at = view.selected ?? { query: Math.round(view.y), key: Math.round(view.x) };
      view.selected = { query: clamp(at.query + y, 0, this.tokens - 1), key: clamp(at.key + x, 0, this.tokens - 1) };
      this.side.select(this.panes[0]);
    } else {
      view.x += (x * size.width) / 8 / view.scale;
      view.y += (y * size.height) / 8 / view.scale;
      view.keep(size);
    }
    this.draw();
  }

  /** Places where the text stands, over as many tokens as it takes. */
  find(text) {
    const named = /^\s*[lL](\d+)[hH](\d+)\s*$/.exec(text);
    this.hits = { shown: [], at: -1, text, head: named && [Number(named[1]), Number(named[2])] };
    if (text.trim() && !named) {
      const { tokens } = this.open.runs[this.run === 1 ? 1 : 0];
      const starts = [];
      let whole = "";
      for (const one of tokens) {
        starts.push(whole.length);
        whole += one.toLowerCase();
      }
      const wanted = text.toLowerCase();
      const tokenAt = (place) => {
        let [low, high] = [0, starts.length - 1];
        while (low < high) {
          const middle = (low + high + 1) >> 1;
          if (starts[middle] <= place) low = middle;
          else high = middle - 1;
        }
        return low;
      };
      for (let place = whole.indexOf(wanted); place >= 0 && this.hits.shown.length < 2000; place = whole.indexOf(wanted, place + 1)) {
        this.hits.shown.push([tokenAt(place), tokenAt(place + wanted.length - 1) + 1]);
      }
    }
    this.sayFound();
    this.draw();
  }

  sayFound() {
    const { shown: all, at, text, head } = this.hits;
    if (head) this.found.textContent = this.index.has(head.join("/")) ? "Enter opens the head" : "no such head";
    else this.found.textContent = text.trim() ? (all.length ? `${at < 0 ? "" : `${at + 1} of `}${all.length.toLocaleString("en")} found` : "not found") : "";
  }

  next(step) {
    const { hits } = this;
    if (hits.head) return this.index.has(hits.head.join("/")) ? this.openHead(hits.head) : undefined;
    if (!hits.shown.length) return;
    hits.at = (hits.at + step + hits.shown.length) % hits.shown.length;
    this.sayFound();
    const [place] = hits.shown[hits.at];
    if (this.screen === "map") {
      this.view.selected = { query: place, key: this.view.selected?.key ?? place };
      this.view.centre(place, place, Math.max(this.view.scale, 14), this.panes[0].size);
      this.side.select(this.panes[0]);
      this.draw();
    } else this.openToken("query", place);
  }

  // -- themes ---------------------------------------------------------------------------------------------------------

  /** Follow the notebook's theme where it says one, else the system's. */
  theme() {
    const { body, documentElement: root } = document;
    const said = body.dataset.jpThemeLight ?? body.dataset.vscodeThemeKind ?? root.getAttribute("theme") ?? "";
    const names = `${said} ${body.className} ${root.className} ${root.dataset.theme ?? ""}`;
    let dark = matchMedia("(prefers-color-scheme: dark)").matches;
    if (said === "true" || /\b(vscode-light|light)\b/.test(names)) dark = false;
    if (said === "false" || /\b(vscode-dark|vscode-high-contrast|dark)\b/.test(names)) dark = true;
    this.dark = dark;
    this.element.dataset.theme = dark ? "dark" : "light";
    if (!this.watching) {
      this.watching = new MutationObserver(() => this.theme());
      this.watching.observe(body, { attributes: true });
      this.watching.observe(root, { attributes: true });
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.theme());
    }
    if (this.open && this.scales.dark !== dark) {
      this.colourAgain();
      this.go(this.screen, true);
    }
  }

  colourAgain() {
    const style = getComputedStyle(this.element);
    const names = ["page", "panel", "ink", "soft", "rule", "accent", "contrast", "wait", "found"];
    this.colours = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
    this.scales = { weight: new Scale(this.kind, 1, this.dark), change: new Scale("change", 1, this.dark), dark: this.dark };
  }

  close() {
    this.closing.abort();
    this.resize?.disconnect();
    this.watching?.disconnect();
    this.source.close();
  }
}

/** What anywidget calls for every view of a widget. */
function render({ model, el }) {
  const app = new App(make("div"), liveSource(model), { height: model.get("height") });
  el.append(app.element);
  return () => app.close();
}

/** A saved page. */
async function openPage(page) {
  const head = JSON.parse(new TextDecoder().decode(await unzipped(bytesOf(page.getElementById("head").textContent))));
  const data = page.getElementById("data");
  const bytes = bytesOf(data.textContent);
  data.remove();
  new App(page.getElementById("explorer"), savedSource(head, bytes), { page: true });
}

export default { render };
