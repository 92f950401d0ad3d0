// One token and every head, over layers; and an answer as a time line.

class Token {
  constructor(app) {
    this.app = app;
    this.grouped = "head"; // "head", "mean" or "max" over a layer's heads
    this.plain = true;
    this.canvas = make("canvas", { class: "looks", tabindex: 0, role: "img", "aria-label": "Every head and one token, over layers" });
    this.title = make("h2", {});
    this.text = make("p", { class: "context" });
    this.options = make("div", { class: "chips" });
    this.best = make("aside", { class: "side" });
    const left = make("div", { class: "grow" }, this.options, this.canvas);
    this.element = make("section", { class: "token" }, this.title, this.text, make("div", { class: "columns" }, left, this.best));
    this.canvas.addEventListener("mousemove", (event) => this.hover(event));
    this.canvas.addEventListener("mouseleave", () => app.tip(null));
    this.canvas.addEventListener("click", (event) => {
      const at = this.at(event);
      if (at && this.grouped === "head") this.open(at.heads[0], at.position);
    });
  }

  /** `kind` "query": where every head looks from `position`; "key": who looks at it. */
  async show(kind, position, run) {
    Object.assign(this, { kind, position, run, answer: null });
    const { app } = this;
    const { tokens } = app.open.runs[run === 2 ? 1 : run];
    this.title.textContent = kind === "query" ? `Where every head looks from “${shown(tokens[position], 30)}”` : `Who looks at “${shown(tokens[position], 30)}”`;
    const [first, last] = [Math.max(0, position - 14), Math.min(tokens.length, position + 10)];
    this.text.replaceChildren(make("span", { class: "soft" }, `token ${position.toLocaleString("en")}  `), ...tokens.slice(first, last).map((text, i) => make(first + i === position ? "mark" : "span", {
      onclick: () => app.openToken(this.kind, first + i, run),
    }, text.replace(/\n/g, "⏎"))));
    const option = (value, label) => make("button", { class: "chip", "aria-pressed": String(this.grouped === value), onclick: () => {
      this.grouped = value;
      this.show(this.kind, this.position, this.run);
    } }, label);
    const other = kind === "query" ? "key" : "query";
    this.options.replaceChildren(option("head", "every head"), option("mean", "mean of each layer"), option("max", "largest of each layer"),
      make("button", { class: "chip turn", onclick: () => app.openToken(other, position, run) }, kind === "query" ? "turn round: who looks at it" : "turn round: where it looks"));
    this.best.replaceChildren();
    this.draw();
    try {
      this.answer = await app.source.ask(`${kind}/${run}/${position}`);
    } catch {
      this.answer = "missing";
    }
    this.draw();
    this.showBest();
  }

  /** Rows of the picture: { layer, heads, rows of the answer }. */
  get groups() {
    const { heads } = this.app.open;
    if (this.grouped === "head") return heads.map((head, i) => ({ layer: head[0], heads: [head], rows: [i] }));
    const layers = new Map();
    heads.forEach((head, i) => {
      const group = layers.get(head[0]) ?? { layer: head[0], heads: [], rows: [] };
      group.heads.push(head);
      group.rows.push(i);
      layers.set(head[0], group);
    });
    return [...layers.values()];
  }

  values(group) {
    const { columns, values } = this.answer;
    const found = new Float32Array(columns);
    for (const row of group.rows) for (let c = 0; c < columns; c++) {
      const value = HALF[values[row * columns + c]];
      if (this.grouped === "max") found[c] = Math.abs(value) > Math.abs(found[c]) ? value : found[c];
      else found[c] += value / group.rows.length;
    }
    return found;
  }

  draw() {
    const { app, canvas } = this;
    const { colours } = app;
    const width = Math.max(320, canvas.parentElement.clientWidth);
    const groups = this.groups;
    const layers = new Set(groups.map((one) => one.layer)).size;
    const gap = this.grouped === "head" ? 2 : 1;
    const tall = this.grouped === "head" ? clamp(Math.floor((760 - layers * gap) / groups.length), 2, 9) : clamp(Math.floor(600 / groups.length), 8, 22);
    const [left, top] = [44, 26];
    const context = sized(canvas, width, top + tall * groups.length + gap * layers + 8);
    context.font = `10.5px ${FONT}`;
    context.fillStyle = colours.soft;
    if (!this.answer || this.answer === "missing") {
      context.fillText(this.answer ? "This file does not hold this token's view." : "computing…", left, 60);
      return;
    }
    const { columns, width: cell } = this.answer;
    this.geometry = { left, top, tall, cell, size: width - left - 6, columns, rows: [] };
    const { size } = this.geometry;
    const wide = size / columns;
    const scale = this.run === 2 ? app.scales.change : app.scales.weight;
    let y = top;
    let before = null;
    context.imageSmoothingEnabled = false;
    for (const group of groups) {
      if (before !== null && group.layer !== before) y += gap;
      this.geometry.rows.push({ y, group });
      const values = this.values(group);
      context.drawImage(paintRow(values, scale), left, y, size, tall - (tall > 5 ? 0.5 : 0));
      if (group.layer !== before) {
        context.fillStyle = colours.soft;
        context.textAlign = "right";
        if (groups.length / layers * tall > 9 || group.layer % 2 === 0) context.fillText(`L${group.layer}`, left - 8, y + 8);
      }
      before = group.layer;
      y += tall;
    }
    const tokens = columns * cell;
    const step = stepOf((width - left) / tokens, 60);
    context.textAlign = "left";
    context.fillStyle = colours.soft;
    for (let at = 0; at < tokens; at += step) context.fillText(at.toLocaleString("en"), left + (at / cell) * wide, 10);
    context.strokeStyle = colours.contrast;
    context.lineWidth = 1.25;
    const own = left + ((this.position + 0.5) / cell) * wide;
    context.beginPath();
    context.moveTo(own, 14);
    context.lineTo(own, y);
    context.stroke();
    app.open.runs[this.run === 2 ? 1 : this.run].spans.forEach((span, i) => {
      context.fillStyle = SPANS[i % SPANS.length];
      for (const [a, b] of span.places) context.fillRect(left + (a / cell) * wide, 17, Math.max(1.5, ((b - a) / cell) * wide), 4);
    });
  }

  at(event) {
    if (!this.geometry) return null;
    const box = this.canvas.getBoundingClientRect();
    const { left, size, columns, rows, tall, cell } = this.geometry;
    const y = event.clientY - box.top;
    const found = rows.find((row) => y >= row.y && y < row.y + tall);
    const column = Math.floor(((event.clientX - box.left - left) / size) * columns);
    if (!found || column < 0 || column >= columns) return null;
    return { heads: found.group.heads, group: found.group, column, position: column * cell };
  }

  hover(event) {
    const at = this.at(event);
    if (!at) return this.app.tip(null);
    const { tokens } = this.app.open.runs[this.run === 2 ? 1 : this.run];
    const value = this.values(at.group)[at.column];
    const { cell } = this.geometry;
    const text = tokens.slice(at.position, at.position + Math.min(cell, 8)).map((one) => shown(one, 12)).join(" ");
    const name = this.grouped === "head" ? nameOf(at.heads[0]) : `layer ${at.group.layer}, ${this.grouped} of ${at.heads.length} heads`;
    const place = cell === 1 ? `${at.position}` : `${at.position}–${Math.min(at.position + cell, tokens.length) - 1}`;
    this.app.tip(event, make("b", {}, `${name}: ${say(value)}`), make("div", {}, `${this.kind === "query" ? "keys" : "queries"} ${place}`), make("div", { class: "soft" }, text));
  }

  open(head, other) {
    const [query, key] = this.kind === "query" ? [this.position, other] : [Math.max(other, this.position), this.position];
    this.app.openHead(head, { query, key });
  }

  showBest() {
    if (!this.answer || this.answer === "missing") return;
    const { tokens } = this.app.open.runs[this.run === 2 ? 1 : this.run];
    const found = [];
    this.answer.top.forEach((places, i) => places.forEach((place, rank) => {
      if (place < 0 || (this.plain && (place < 4 || place === this.position))) return;
      found.push({ head: this.app.open.heads[i], place, mass: this.answer.mass[i][rank] });
    }));
    found.sort((a, b) => b.mass - a.mass);
    const rows = found.slice(0, 24).map((one) => make("button", { class: "entry", onclick: () => this.open(one.head, one.place) },
      make("i", { style: { background: this.app.scales.weight.css(one.mass) } }), make("span", {}, make("b", {}, nameOf(one.head)), ` ${this.kind === "query" ? "→" : "←"} ${shown(tokens[one.place], 16)} `, make("span", { class: "soft" }, one.place.toLocaleString("en"))), make("b", {}, say(one.mass))));
    const box = make("label", { class: "soft small" }, make("input", { type: "checkbox", checked: this.plain, onchange: (event) => {
      this.plain = event.target.checked;
      this.showBest();
    } }), " not the first four, nor itself");
    this.best.replaceChildren(make("div", { class: "card" }, make("h3", {}, this.kind === "query" ? "Strongest looks" : "Strongest lookers"), box, ...rows));
  }
}

/** The answer's tokens down the page: from each, what one head rests on when it was chosen. */
class Line {
  constructor(app) {
    this.app = app;
    this.title = make("h2", {});
    this.canvas = make("canvas", { class: "looks" });
    this.element = make("section", { class: "line" }, this.title, make("p", { class: "soft" }, "A row a generated token: where the head looks when it is chosen, over the whole text; beside it the shares of the spans. Up and down choose the head."), this.canvas);
    this.canvas.addEventListener("mousemove", (event) => this.hover(event));
    this.canvas.addEventListener("mouseleave", () => app.tip(null));
    this.canvas.addEventListener("click", (event) => {
      const at = this.at(event);
      if (at) app.openToken("query", at.query, app.run === 2 ? 1 : app.run);
    });
  }

  async show() {
    const { app } = this;
    const run = app.run === 2 ? 1 : app.run;
    this.answer = null;
    this.title.textContent = `The answer, as ${nameOf(app.head)} reads`;
    try {
      this.answer = await app.source.ask(`answer/${run}/${app.head.join("/")}`);
    } catch {
      this.answer = "missing";
    }
    this.draw();
  }

  draw() {
    const { app, answer } = this;
    const width = Math.max(420, this.element.clientWidth);
    const run = app.open.runs[app.run === 2 ? 1 : app.run];
    const rows = answer && answer !== "missing" ? answer.rows - 1 : 1;
    const [left, top, tall, bars] = [112, 24, 20, run.spans.length ? 190 : 0];
    const context = sized(this.canvas, width, top + rows * tall + 24 + 16 * run.spans.length);
    context.font = `12px ${FONT}`;
    context.textBaseline = "middle";
    context.imageSmoothingEnabled = false;
    context.fillStyle = app.colours.soft;
    if (!answer) return;
    if (answer === "missing") return context.fillText("This file does not hold this head's time line.", 8, 30);
    const size = width - left - bars - 8;
    const wide = size / answer.columns;
    this.geometry = { left, top, tall, size, first: run.answer };
    for (let r = 0; r < rows; r++) {
      const y = top + r * tall;
      context.textAlign = "right";
      context.fillStyle = app.colours.ink;
      context.fillText(shown(run.tokens[run.answer + r], 15), left - 8, y + tall / 2);
      const row = answer.values.subarray(r * answer.columns, (r + 1) * answer.columns);
      context.drawImage(paint(row, answer.columns, 1, app.scales.weight), left, y, size, tall - 2);
      let x = left + size + 12;
      run.spans.forEach((span, i) => {
        const share = answer.masses[r][i] * (bars - 16);
        context.fillStyle = SPANS[i % SPANS.length];
        context.fillRect(x, y + 2, share, tall - 6);
        x += share;
      });
    }
    context.textAlign = "left";
    context.fillStyle = app.colours.soft;
    const step = stepOf(size / (answer.columns * answer.width), 70);
    for (let at = 0; at < answer.columns * answer.width; at += step) context.fillText(at.toLocaleString("en"), left + (at / answer.width) * wide, 10);
    run.spans.forEach((span, i) => {
      context.fillStyle = SPANS[i % SPANS.length];
      context.fillRect(left, top + rows * tall + 14 + 16 * i, 10, 8);
      for (const [a, b] of span.places) context.fillRect(left + (a / answer.width) * wide, 18, Math.max(1.5, ((b - a) / answer.width) * wide), 4);
      context.fillStyle = app.colours.soft;
      context.fillText(span.name, left + 16, top + rows * tall + 18 + 16 * i);
    });
  }

  at(event) {
    if (!this.geometry || this.answer === "missing") return null;
    const box = this.canvas.getBoundingClientRect();
    const { left, top, tall, size, first } = this.geometry;
    const row = Math.floor((event.clientY - box.top - top) / tall);
    const column = Math.floor(((event.clientX - box.left - left) / size) * this.answer.columns);
    if (row < 0 || row >= this.answer.rows - 1) return null;
    return { row, column, query: first + row - 1 };
  }

  hover(event) {
    const at = this.at(event);
    if (!at) return this.app.tip(null);
    const run = this.app.open.runs[this.app.run === 2 ? 1 : this.app.run];
    const lines = run.spans.map((span, i) => make("div", {}, make("span", { class: "soft" }, span.name), ` ${say(this.answer.masses[at.row][i])}`));
    if (at.column >= 0 && at.column < this.answer.columns) {
      const from = at.column * this.answer.width;
      const text = run.tokens.slice(from, from + Math.min(8, this.answer.width)).map((one) => shown(one, 12)).join(" ");
      lines.unshift(make("div", {}, make("b", {}, say(HALF[this.answer.values[at.row * this.answer.columns + at.column]])), ` on ${text}`));
    }
    this.app.tip(event, make("b", {}, `chosen: “${shown(run.tokens[this.geometry.first + at.row], 20)}”`), ...lines);
  }
}
