// The overview: every head as a cell, several statistics side by side, and the same heads as a list.

const PANELS = 4;
const LISTED = 200;

class Heads {
  constructor(app) {
    this.app = app;
    const { statistics } = app.open;
    const first = statistics.filter((one) => one.scores).concat(statistics.filter((one) => !one.scores));
    this.chosen = first.slice(0, PANELS).map((one) => one.name);
    this.sorted = { name: this.chosen[0], down: true };
    this.layers = [...new Set(app.open.heads.map(([layer]) => layer))];
    this.tall = 1 + Math.max(...app.open.heads.map(([, head]) => head));
    this.chips = make("div", { class: "chips", role: "group", "aria-label": "Statistics" });
    this.panels = make("div", { class: "panels" });
    this.list = make("div", { class: "list" });
    this.element = make("section", { class: "heads" }, this.chips, make("div", { class: "columns" }, this.panels, this.list));
    this.hovered = null;
  }

  statistic(name) {
    return this.app.open.statistics.find((one) => one.name === name);
  }

  /** The table of a statistic for the run that is shown. */
  table(one) {
    return one.tables[Math.min(this.app.run, one.tables.length - 1)];
  }

  isChange(one) {
    return this.app.run === 2 && one.tables.length === 3;
  }

  show() {
    const { statistics } = this.app.open;
    this.chips.replaceChildren(...statistics.map((one) => make("button", {
      class: "chip", "aria-pressed": String(this.chosen.includes(one.name)), title: one.unit,
      onclick: () => this.toggle(one.name),
    }, one.label)));
    this.panels.replaceChildren(...this.chosen.map((name) => this.panel(this.statistic(name))));
    if (!this.chosen.length) this.panels.append(make("p", { class: "soft" }, "Choose a statistic above."));
    this.drawAll();
    this.showList();
  }

  toggle(name) {
    if (this.chosen.includes(name)) this.chosen = this.chosen.filter((one) => one !== name);
    else this.chosen = [...this.chosen, name].slice(-PANELS);
    if (!this.chosen.includes(this.sorted.name)) this.sorted = { name: this.chosen[0], down: true };
    this.show();
  }

  panel(one) {
    const canvas = make("canvas", { class: "grid", tabindex: 0, role: "img", "aria-label": `${one.label} of every head` });
    canvas.statistic = one;
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      const i = Math.floor((event.clientX - box.left - canvas.left) / canvas.cell);
      const head = Math.floor((event.clientY - box.top) / canvas.cellHeight);
      const layer = this.layers[i];
      return this.app.index.has(`${layer}/${head}`) ? [layer, head] : null;
    };
    canvas.addEventListener("mousemove", (event) => this.hover(at(event), event));
    canvas.addEventListener("mouseleave", () => this.hover(null));
    canvas.addEventListener("click", (event) => {
      const head = at(event);
      if (head) this.app.openHead(head);
    });
    const scale = make("div", { class: "scale" });
    canvas.scaleElement = scale;
    const title = this.isChange(one) ? `Change of ${one.label}` : one.label[0].toUpperCase() + one.label.slice(1);
    return make("figure", { class: "panel" }, make("figcaption", {}, make("b", {}, title), make("span", { class: "soft" }, ` ${one.unit}`)), canvas, scale);
  }

  drawAll() {
    for (const canvas of this.panels.querySelectorAll("canvas")) this.draw(canvas);
  }

  draw(canvas) {
    const one = canvas.statistic;
    const { values } = this.table(one);
    const known = values.filter((x) => x !== null);
    const change = this.isChange(one) || known.some((x) => x < 0);
    const most = Math.max(...known.map(Math.abs), 1e-12);
    const low = change ? -most : Math.min(...known, most);
    const high = change ? most : Math.max(...known);
    const width = Math.max(220, canvas.parentElement.clientWidth || 300);
    canvas.left = 26;
    canvas.cell = (width - canvas.left - 2) / this.layers.length;
    canvas.cellHeight = clamp(Math.min(200 / this.tall, canvas.cell * 1.8), 4, 26);
    const height = canvas.cellHeight * this.tall + 20;
    const context = sized(canvas, width, height);
    const colours = this.app.colours;
    const stops = change ? DIVERGING[this.app.dark ? "dark" : "light"] : VIRIDIS;
    const gap = canvas.cell > 7 ? 1 : 0.25;
    this.app.open.heads.forEach(([layer, head], i) => {
      const x = canvas.left + this.layers.indexOf(layer) * canvas.cell;
      const y = head * canvas.cellHeight;
      const value = values[i];
      context.fillStyle = value === null ? colours.rule : `rgb(${between(stops, high > low ? (value - low) / (high - low) : 0).join(" ")})`;
      context.fillRect(x, y, canvas.cell - gap, canvas.cellHeight - gap);
    });
    context.font = `10.5px ${FONT}`;
    context.fillStyle = colours.soft;
    context.textBaseline = "middle";
    context.textAlign = "right";
    const down = stepOf(canvas.cellHeight, 13);
    for (let head = 0; head < this.tall; head += down) context.fillText(head, canvas.left - 5, (head + 0.5) * canvas.cellHeight);
    context.textAlign = "center";
    const across = stepOf(canvas.cell, 24);
    for (let i = 0; i < this.layers.length; i += across) context.fillText(this.layers[i], canvas.left + (i + 0.5) * canvas.cell, height - 8);
    for (const mark of [this.hovered, this.app.head]) {
      if (!mark) continue;
      context.strokeStyle = mark === this.hovered ? colours.ink : colours.accent;
      context.lineWidth = 2;
      context.strokeRect(canvas.left + this.layers.indexOf(mark[0]) * canvas.cell - 1, mark[1] * canvas.cellHeight - 1, canvas.cell + 1, canvas.cellHeight + 1);
    }
    const shades = Array.from({ length: 10 }, (_, i) => `rgb(${between(stops, i / 9).join(" ")})`);
    canvas.scaleElement.replaceChildren(make("span", {}, say(low)), make("i", { style: { background: `linear-gradient(90deg, ${shades.join(", ")})` } }), make("span", {}, say(high)));
  }

  hover(head, event) {
    const before = this.hovered;
    this.hovered = head;
    if (String(before) !== String(head)) this.drawAll();
    if (!head) return this.app.tip(null);
    const at = this.app.index.get(head.join("/"));
    const lines = this.chosen.map((name) => {
      const one = this.statistic(name);
      const { values, low, high, n } = this.table(one);
      const range = low && low[at] !== null && high[at] !== null ? ` [${say(low[at])}, ${say(high[at])}]` : "";
      return make("div", {}, make("span", { class: "soft" }, one.label), make("b", {}, ` ${say(values[at])}`), range, range && n?.[at] ? ` n = ${n[at].toLocaleString("en")}` : "");
    });
    const said = this.chosen.map((name) => this.statistic(name)).filter((one) => one.about && !this.isChange(one));
    const abouts = new Set(said.map((one) => (this.table(one).low?.[at] == null ? one.about : `[ ] ${one.about}`)));
    this.app.tip(event, make("b", {}, `Layer ${head[0]}, head ${head[1]}`), ...lines, ...[...abouts].map((text) => make("div", { class: "soft small" }, text)));
  }

  order() {
    const one = this.statistic(this.sorted.name);
    const heads = this.app.open.heads.map((head, i) => [head, i]);
    if (!one) return heads;
    const { values } = this.table(one);
    const size = (i) => (values[i] === null ? -Infinity : values[i]);
    return heads.sort(([, a], [, b]) => (this.sorted.down ? size(b) - size(a) : size(a) - size(b)) || a - b);
  }

  showList() {
    const shownStatistics = this.chosen.map((name) => this.statistic(name));
    const heading = (label, name) => make("th", {
      scope: "col", "aria-sort": this.sorted.name === name ? (this.sorted.down ? "descending" : "ascending") : "none",
      onclick: () => {
        this.sorted = { name, down: this.sorted.name === name ? !this.sorted.down : true };
        this.showList();
      },
    }, label);
    const spans = shownStatistics.map((one) => {
      const known = this.table(one).values.filter((x) => x !== null);
      return Math.max(...known.map(Math.abs), 1e-12);
    });
    const rows = this.order().slice(0, LISTED).map(([head, i]) => make("tr", {
      tabindex: 0, onclick: () => this.app.openHead(head),
      onkeydown: (event) => event.key === "Enter" && this.app.openHead(head),
      onmouseenter: (event) => this.hover(head, event), onmouseleave: () => this.hover(null),
    }, make("th", { scope: "row" }, nameOf(head)), ...shownStatistics.map((one, k) => {
      const value = this.table(one).values[i];
      const share = value === null ? 0 : clamp(Math.abs(value) / spans[k], 0, 1) * 100;
      return make("td", { style: { backgroundSize: `${share}% 2px` } }, say(value));
    })));
    const count = this.app.open.heads.length;
    this.list.replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, make("th", {}, "Head"), ...shownStatistics.map((one) => heading(one.label, one.name)))), make("tbody", {}, ...rows)),
      make("p", { class: "soft small" }, `the first ${LISTED} of ${count}; type L5H3 into the search for any other`));
    if (count <= LISTED) this.list.querySelector("p")?.remove();
  }
}

/** A canvas of that size in CSS pixels, sharp on any screen. */
function sized(canvas, width, height) {
  const ratio = globalThis.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) {
    canvas.width = w;
    canvas.height = h;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";
