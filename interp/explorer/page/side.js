// Beside the map: what lies under the pointer, the heaviest cells in sight, the picture.

const HEAVIEST = 12;

class Side {
  constructor(app) {
    this.app = app;
    this.reading = make("div", { class: "card reading", "aria-live": "off" });
    this.actions = make("div", { class: "card" });
    this.heavy = make("div", { class: "card" });
    this.picture = make("div", { class: "card picture" });
    this.legend = make("div", { class: "card" });
    this.plain = true; // leave out the first tokens and the diagonal
    this.element = make("aside", { class: "side" }, this.legend, this.reading, this.actions, this.picture, this.heavy);
  }

  show() {
    const { app } = this;
    const parts = [];
    const what = app.pool === "mass" ? "attention (a block: mass on its keys)" : "attention (a block: its largest)";
    if (app.panes.some((pane) => pane.run !== 2)) parts.push(legend(app.scales.weight, what));
    if (app.panes.some((pane) => pane.run === 2)) parts.push(legend(app.scales.change, `${app.names[1]} less ${app.names[0]}`));
    this.legend.replaceChildren(...parts);
    this.read(null);
    this.select(app.panes[0]);
  }

  read(pane, at) {
    const { app } = this;
    if (!pane || at.zone === "none") {
      const hint = "Point at the map. Drag to move, wheel to zoom, click a token on an axis to see every head.";
      this.reading.replaceChildren(make("p", { class: "soft" }, hint));
      return;
    }
    const lines = [];
    const token = (name, position) => {
      const width = at.zone === "map" ? pane.value(at.query, at.key).width : 1;
      const first = Math.floor(position / width) * width;
      const { tokens } = pane.text;
      if (width === 1) return row(name, shown(tokens[position], 30), position.toLocaleString("en"));
      const last = Math.min(first + width, tokens.length) - 1;
      return row(name, `${shown(tokens[first], 11)} … ${shown(tokens[last], 11)}`, `${first.toLocaleString("en")}–${last.toLocaleString("en")}`);
    };
    const row = (name, text, more) => make("div", { class: "row" }, make("span", { class: "soft" }, name), make("b", {}, text), make("span", { class: "soft number" }, more));
    if (at.query !== undefined) lines.push(token("query", at.query));
    if (at.key !== undefined) lines.push(token("key", at.key));
    if (at.zone === "map") {
      for (const one of app.panes) {
        const { value, width, rows, of } = one.value(at.query, at.key);
        const name = app.panes.length > 1 ? app.labels[one.run] : width === 1 ? "weight" : app.pool === "max" ? "largest" : "mass";
        const more = rows < of ? `${rows} of ${of} rows` : width > 1 ? `${width} × ${width} block` : "";
        lines.push(row(name, Number.isNaN(value) ? "not visible" : value.toPrecision(3), more));
      }
    }
    for (const edge of [...pane.rowEdges, ...pane.keyEdges]) {
      const position = edge.axis === "query" ? at.query : at.key;
      if (position === undefined) continue;
      const found = this.edgeValue(pane, edge, position);
      if (found !== null) lines.push(row(edge.label, say(found), edge.unit === "mass" ? "share" : edge.unit.startsWith("mass,") ? "sum" : edge.unit));
    }
    const spans = pane.text.spans.filter((span) => span.places.some(([a, b]) => at.key >= a && at.key < b));
    if (spans.length) lines.push(row("span", spans.map((span) => span.name).join(", "), ""));
    this.reading.replaceChildren(...lines);
  }

  edgeValue(pane, edge, position) {
    const level = pane.edgeLevel(edge, pane.shownLevel ?? 0);
    const width = this.app.open.strip * 2 ** level;
    const piece = Math.floor(position / width);
    const [layer, head] = this.app.head;
    const values = this.app.source.have(`edge/${pane.run}/${layer}/${head}/${edge.name}/${level}/${piece}`)?.values;
    return values ? values[Math.floor((position - piece * width) / 2 ** level)] ?? null : null;
  }

  select(pane) {
    const { app } = this;
    const at = pane.view.selected;
    if (!at) {
      this.actions.replaceChildren(make("p", { class: "soft" }, "Click a cell to hold it here."));
    } else {
      const button = (kind, position, text) => make("button", { class: "wide", onclick: () => app.openToken(kind, position, pane.run) }, text);
      const { tokens } = pane.text;
      this.actions.replaceChildren(
        button("query", at.query, `Where every head looks from “${shown(tokens[at.query], 16)}” ${at.query}`),
        button("key", at.key, `Who looks at “${shown(tokens[at.key], 16)}” ${at.key}`),
      );
    }
    this.showPicture();
  }

  /** The heaviest cells that are drawn: top blocks far away, single weights near by. */
  showHeavy() {
    const { app } = this;
    const pane = app.panes[0];
    const level = pane.heldLevel(pane.shownLevel ?? 0);
    const width = 2 ** level;
    const found = [];
    for (const [i, j] of pane.visible(level)) {
      const answer = app.source.have(pane.question(level, i, j));
      if (!answer?.values) continue;
      answer.values.forEach((bits, n) => {
        const value = HALF[bits];
        if (!(Math.abs(value) > (found.length < HEAVIEST ? 1e-3 : found[found.length - 1].size))) return;
        const query = (i * TILE + Math.floor(n / TILE)) * width;
        const key = (j * TILE + (n % TILE)) * width;
        if (this.plain && (key < Math.max(4, width) || query - key < Math.max(2, width))) return;
        const { x, y, scale } = pane.view;
        if (query + width < y || key + width < x || query > y + pane.size.height / scale || key > x + pane.size.width / scale) return;
        found.push({ query, key, value, size: Math.abs(value) });
        found.sort((a, b) => b.size - a.size);
        found.length = Math.min(found.length, HEAVIEST);
      });
    }
    const { tokens } = pane.text;
    const name = (at) => (width === 1 ? shown(tokens[at], 12) : `${at.toLocaleString("en")}`);
    const rows = found.map((one) => make("button", {
      class: "entry", onclick: () => {
        pane.view.selected = { query: one.query, key: one.key };
        pane.view.centre(one.query + width / 2, one.key + width / 2, width === 1 ? 24 : pane.view.scale * 4, pane.size);
        this.select(pane);
        app.draw();
      },
    }, make("i", { style: { background: pane.scale.css(one.value) } }), make("span", {}, `${name(one.query)} → ${name(one.key)}`), make("b", {}, say(one.value))));
    const box = make("label", { class: "soft small" }, make("input", {
      type: "checkbox", checked: this.plain, onchange: (event) => {
        this.plain = event.target.checked;
        this.showHeavy();
      },
    }), " without first tokens and diagonal");
    const heading = width === 1 ? "Heaviest weights in sight" : `Heaviest ${width} × ${width} blocks in sight`;
    this.heavy.replaceChildren(make("h3", {}, heading), box, ...rows);
    if (!rows.length) this.heavy.append(make("p", { class: "soft" }, "none above 0.001"));
  }

  async showPicture() {
    const { app } = this;
    const pane = app.panes[0];
    const run = pane.text;
    this.picture.hidden = !run.grids.length;
    if (!run.grids.length) return;
    const position = pane.view.selected?.query ?? run.tokens.length - 1;
    const [layer, head] = app.head;
    const question = `picture/${pane.run}/${layer}/${head}/${position}`;
    try {
      const answer = await app.source.ask(question);
      this.picture.replaceChildren(make("h3", {}, `From “${shown(run.tokens[position], 16)}” to the picture`), ...pictures(app, run, answer, pane.scale));
    } catch {
      this.picture.replaceChildren(make("h3", {}, "Picture"), make("p", { class: "soft" }, "This file does not hold the picture for this token."));
    }
  }
}

/** Each grid's weights over its picture, as shares of the largest. */
function pictures(app, run, answer, scale) {
  let start = 0;
  return run.grids.map((grid, n) => {
    const [rows, columns] = answer.shapes[n];
    const values = answer.values.subarray(start, start + rows * columns);
    start += rows * columns;
    const most = Math.max(...values.map(Math.abs), 1e-9);
    const total = values.reduce((sum, x) => sum + x, 0);
    const width = 250;
    const zoom = width / grid.size[0];
    const canvas = make("canvas", { role: "img", "aria-label": "weights over the picture" });
    const context = sized(canvas, width, grid.size[1] * zoom);
    const image = new Image();
    image.onload = () => {
      context.drawImage(image, 0, 0, width, grid.size[1] * zoom);
      const [left, top, right, bottom] = grid.box;
      const [w, h] = [((right - left) / columns) * zoom, ((bottom - top) / rows) * zoom];
      values.forEach((value, i) => {
        const at = [left * zoom + (i % columns) * w, top * zoom + Math.floor(i / columns) * h];
        context.globalAlpha = 0.78 * Math.sqrt(Math.abs(value) / most);
        context.fillStyle = scale.kind === "change" ? scale.css(value) : `rgb(${between(VIRIDIS, Math.abs(value) / most).join(" ")})`;
        context.fillRect(at[0], at[1], w - 0.5, h - 0.5);
      });
      context.globalAlpha = 1;
    };
    image.src = run.pictures[grid.image];
    return make("div", {}, canvas, make("p", { class: "soft small" }, `${say(total)} of the query's mass; brightest ${say(most)}`));
  });
}
