// A head's pattern as a zoomable map: tiles where they are looked at, tokens on both axes, statistics along the edges.

const TILE = 128;
const FINEST = 46; // pixels a token, at most
const READABLE = 10.5; // pixels a token from which every token is written

/** What several maps side by side share: the place that is looked at, and what is selected. */
class View {
  constructor(tokens) {
    this.tokens = tokens;
    this.x = 0; // key at the left edge
    this.y = 0; // query at the upper edge
    this.scale = 0; // pixels a token
    this.selected = null; // { query, key }
    this.hovered = null;
  }

  fit(width, height) {
    this.scale = Math.min(width, height) / this.tokens;
    this.x = this.y = 0;
  }

  zoom(factor, x, y, size) {
    const before = this.scale;
    this.scale = clamp(before * factor, Math.min(size.width, size.height) / this.tokens, Math.max(FINEST, Math.min(size.width, size.height) / this.tokens));
    this.x += x / before - x / this.scale;
    this.y += y / before - y / this.scale;
    this.keep(size);
  }

  keep({ width, height }) {
    this.x = clamp(this.x, 0, Math.max(0, this.tokens - width / this.scale));
    this.y = clamp(this.y, 0, Math.max(0, this.tokens - height / this.scale));
  }

  centre(query, key, scale, size) {
    this.scale = clamp(scale, Math.min(size.width, size.height) / this.tokens, Math.max(FINEST, Math.min(size.width, size.height) / this.tokens));
    this.x = key + 0.5 - size.width / 2 / this.scale;
    this.y = query + 0.5 - size.height / 2 / this.scale;
    this.keep(size);
  }

  /** The level at which a cell is between one and some three pixels wide. */
  get level() {
    return Math.max(0, Math.ceil(Math.log2(1.3 / this.scale)));
  }
}

class MapPane {
  constructor(app, run, view) {
    Object.assign(this, { app, run, view });
    this.canvas = make("canvas", { class: "map", tabindex: 0, role: "application", "aria-label": "Attention map: arrows move, plus and minus zoom" });
    this.caption = make("figcaption", {});
    this.element = make("figure", { class: "pane" }, this.caption, this.canvas);
    this.listen();
  }

  get text() {
    return this.app.open.runs[this.run === 2 ? 1 : this.run];
  }

  get keyText() {
    return this.text;
  }

  layout(width, height, narrow) {
    const axis = narrow ? 62 : 92;
    this.width = width;
    this.height = height;
    this.left = axis;
    this.top = narrow ? 54 : 72;
    this.rowEdges = this.app.edges.filter((one) => one.axis === "query").slice(0, narrow ? 1 : 2);
    this.keyEdges = this.app.edges.filter((one) => one.axis === "key").slice(0, 1);
    this.size = {
      width: Math.max(60, width - axis - 34 * this.rowEdges.length - 26),
      height: Math.max(60, height - this.top - 34 * this.keyEdges.length - 26),
    };
  }

  // -- what is asked for ----------------------------------------------------------------------------------------------

  question(level, i, j, kind = "tile") {
    const [layer, head] = this.app.head;
    return `${kind}/${this.run}/${layer}/${head}/${this.app.pool}/${level}/${i}/${j}`;
  }

  /** Tiles of a level that can be seen. */
  visible(level) {
    const width = TILE * 2 ** level;
    const { x, y, scale, tokens } = this.view;
    const last = Math.ceil(tokens / width) - 1;
    const [i0, j0] = [Math.floor(y / width), Math.floor(x / width)];
    const i1 = Math.min(last, Math.floor((y + this.size.height / scale - 1e-6) / width));
    const j1 = Math.min(last, Math.floor((x + this.size.width / scale - 1e-6) / width));
    const found = [];
    for (let i = i0; i <= i1; i++) {
      for (let j = j0; j <= j1; j++) {
        if (this.app.open.causal && j > i) continue; // no query sees a later key
        const window = this.app.open.windows[this.app.head[0]];
        if (window !== null && window !== undefined && (j + 1) * width - 1 < i * width - window) continue;
        found.push([i, j]);
      }
    }
    return found;
  }

  /** The tile, or part of a coarser one that is at hand, as [answer, level, i, j]. */
  best(level, i, j) {
    for (let up = 0; level + up <= this.app.open.top; up++) {
      const answer = this.app.source.have(this.question(level + up, i >> up, j >> up));
      if (answer) return [answer, level + up, i >> up, j >> up];
    }
    return null;
  }

  want(level) {
    let missing = 0;
    for (const [i, j] of this.visible(level)) {
      const question = this.question(level, i, j);
      if (this.app.source.have(question)) continue;
      const { app } = this;
      const wanted = () => app.screen === "map" && question === this.question(level, i, j) && this.view.level === level
        && this.visible(level).some(([a, b]) => a === i && b === j);
      if (app.source.missing.has(question)) {
        missing++;
        for (let up = 1; level + up <= app.open.top; up++) { // a saved page may hold a coarser one
          const coarser = this.question(level + up, i >> up, j >> up);
          if (app.source.have(coarser)) break;
          if (app.source.missing.has(coarser)) continue;
          app.source.ask(coarser).then(() => app.draw(), () => app.draw());
          break;
        }
      } else app.source.ask(question, wanted).then(() => app.draw(), () => app.draw());
    }
    this.missing = missing;
    for (const edge of [...this.rowEdges, ...this.keyEdges]) {
      for (const piece of this.pieces(edge, this.edgeLevel(edge, level))) {
        if (this.app.source.have(piece.question) || this.app.source.missing.has(piece.question)) continue;
        this.app.source.ask(piece.question, () => this.app.screen === "map").then(() => this.app.draw(), () => this.app.draw());
      }
    }
  }

  /** The level, or the next coarser one of which every tile in sight is at hand. */
  heldLevel(level) {
    const held = (one) => this.visible(one).every(([i, j]) => this.app.source.have(this.question(one, i, j)));
    while (level < this.app.open.top && !held(level)) level++;
    return level;
  }

  /** The level of a statistic along the edge: the map's, or the next that a saved page holds. */
  edgeLevel(edge, level) {
    while (level < this.app.open.top && this.pieces(edge, level).some((one) => this.app.source.missing.has(one.question))) level++;
    return level;
  }

  /** Where the map ends: at the last token, or where there is no more room. */
  get right() {
    return this.left + Math.min(this.size.width, (this.view.tokens - this.view.x) * this.view.scale);
  }

  get bottom() {
    return this.top + Math.min(this.size.height, (this.view.tokens - this.view.y) * this.view.scale);
  }

  pieces(one, level) {
    const [layer, head] = this.app.head;
    const width = this.app.open.strip * 2 ** level;
    const { x, y, scale, tokens } = this.view;
    const [from, size] = one.axis === "query" ? [y, this.size.height] : [x, this.size.width];
    const found = [];
    for (let i = Math.floor(from / width); i * width < Math.min(tokens, from + size / scale); i++) {
      found.push({ i, question: `edge/${this.run}/${layer}/${head}/${one.name}/${level}/${i}` });
    }
    return found;
  }

  /** Tiles in sight that are made of some of their rows only. */
  unfinished() {
    const level = Math.min(this.view.level, this.app.open.top);
    return this.visible(level).map(([i, j]) => [i, j, this.app.source.have(this.question(level, i, j))])
      .filter(([, , answer]) => answer && answer.rows < answer.of)
      .map(([i, j, answer]) => ({ question: this.question(level, i, j, "finer"), answer }));
  }

  // -- drawing --------------------------------------------------------------------------------------------------------

  draw() {
    if (!this.size) return;
    const level = Math.min(this.view.level, this.app.open.top);
    this.want(level);
    const context = sized(this.canvas, this.width, this.height);
    const { colours } = this.app;
    context.fillStyle = colours.panel;
    const box = [this.left, this.top, this.right - this.left, this.bottom - this.top];
    context.fillRect(...box);
    context.save();
    context.beginPath();
    context.rect(...box);
    context.clip();
    context.imageSmoothingEnabled = false;
    this.shownLevel = level;
    for (const [i, j] of this.visible(level)) this.drawTile(context, level, i, j);
    this.drawWeights(context, level);
    this.drawMarks(context);
    context.restore();
    this.drawAxes(context);
    this.drawEdges(context, level);
  }

  /** The colours of this map. */
  get scale() {
    return this.run === 2 ? this.app.scales.change : this.app.scales.weight;
  }

  pixel(key, query) {
    return [this.left + (key - this.view.x) * this.view.scale, this.top + (query - this.view.y) * this.view.scale];
  }

  drawTile(context, level, i, j) {
    const found = this.best(level, i, j);
    const width = TILE * 2 ** level * this.view.scale;
    const [x, y] = this.pixel(j * TILE * 2 ** level, i * TILE * 2 ** level);
    if (!found) {
      context.fillStyle = this.app.colours.wait;
      context.fillRect(x, y, width, width);
      return;
    }
    const [answer, at, up, across] = found;
    if (!answer.values) return; // nothing is to be seen there
    if (answer.painted !== this.scale) {
      answer.image = paint(answer.values, TILE, TILE, this.scale);
      answer.painted = this.scale;
      this.app.painted(answer);
    }
    const part = TILE / 2 ** (at - level);
    const [left, top] = [j * part - across * TILE, i * part - up * TILE];
    context.drawImage(answer.image, left, top, part, part, x, y, width, width);
  }

  /** The value of a cell at the level that is shown, or of what stands in for it. */
  value(query, key) {
    const width = 2 ** this.shownLevel;
    const [i, j] = [Math.floor(query / width), Math.floor(key / width)];
    const found = this.best(this.shownLevel, Math.floor(i / TILE), Math.floor(j / TILE));
    if (!found || !found[0].values) return { value: NaN, width };
    const [answer, level] = found;
    const cell = 2 ** level;
    const bits = answer.values[(Math.floor(query / cell) % TILE) * TILE + (Math.floor(key / cell) % TILE)];
    return { value: HALF[bits], width: cell, rows: answer.rows, of: answer.of };
  }

  drawWeights(context, level) {
    if (level > 0 || this.view.scale < 34) return;
    const { x, y, scale, tokens } = this.view;
    context.font = `10px ${FONT}`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (let q = Math.floor(y); q < Math.min(tokens, y + this.size.height / scale); q++) {
      for (let k = Math.floor(x); k < Math.min(tokens, x + this.size.width / scale); k++) {
        const { value } = this.value(q, k);
        if (!(Math.abs(value) >= 0.005)) continue;
        const [r, g, b] = between(this.scale.stops, this.scale.place(value));
        context.fillStyle = 0.3 * r + 0.6 * g + 0.1 * b > 130 ? "#10151a" : "#f4f6f8";
        const [px, py] = this.pixel(k + 0.5, q + 0.5);
        context.fillText(value.toFixed(2).replace("0.", "."), px, py);
      }
    }
  }

  drawMarks(context) {
    const { colours, hits } = this.app;
    const { selected, hovered, scale } = this.view;
    const size = Math.max(2, scale);
    for (const hit of hits.shown) {
      context.fillStyle = colours.found;
      const [x, y] = this.pixel(hit[0], hit[0]);
      const wide = Math.max(1, (hit[1] - hit[0]) * scale);
      context.fillRect(x, this.top, wide, this.size.height);
      context.fillRect(this.left, y, this.size.width, wide);
    }
    for (const [at, colour, alpha] of [[hovered, colours.ink, 0.35], [selected, colours.accent, 0.95]]) {
      if (!at) continue;
      const [x, y] = this.pixel(at.key, at.query);
      context.globalAlpha = alpha;
      context.strokeStyle = colour;
      context.lineWidth = 1;
      context.strokeRect(x - 0.5, this.top - 1, size + 1, this.size.height + 2);
      context.strokeRect(this.left - 1, y - 0.5, this.size.width + 2, size + 1);
      context.globalAlpha = 1;
    }
  }

  drawAxes(context) {
    const { colours } = this.app;
    const { x, y, scale, tokens } = this.view;
    const runs = this.text;
    const every = scale >= READABLE ? 1 : stepOf(scale, 58);
    const everyRow = scale >= READABLE ? 1 : stepOf(scale, 26);
    context.font = `11px ${FONT}`;
    context.textBaseline = "middle";
    const stop = (from, size) => Math.min(tokens, Math.ceil(from + size / scale));
    const lit = (at, axis) => this.view.hovered?.[axis] === at || this.view.selected?.[axis] === at;
    const label = (at) => (at < runs.tokens.length ? shown(runs.tokens[at], this.left > 80 ? 13 : 8) : "");
    this.drawSpans(context);
    for (let q = Math.ceil(y / everyRow) * everyRow; q < stop(y, this.size.height); q += everyRow) {
      const [, at] = this.pixel(0, q + (everyRow === 1 ? 0.5 : 0));
      context.textAlign = "right";
      context.fillStyle = lit(q, "query") ? colours.ink : colours.soft;
      context.fillText(scale >= READABLE ? label(q) : q.toLocaleString("en"), this.left - 11, clamp(at, this.top + 5, this.top + this.size.height));
    }
    context.textAlign = "left";
    for (let k = Math.ceil(x / every) * every; k < stop(x, this.size.width); k += every) {
      const [at] = this.pixel(k + (every === 1 ? 0.5 : 0), 0);
      context.fillStyle = lit(k, "key") ? colours.ink : colours.soft;
      if (scale >= READABLE) {
        context.save();
        context.translate(at, this.top - 11);
        context.rotate(-Math.PI / 3);
        context.fillText(label(k), 0, 0);
        context.restore();
      } else context.fillText(k.toLocaleString("en"), at, this.top - 18);
    }
    context.font = `10.5px ${FONT}`;
    context.fillStyle = colours.soft;
    if (scale < READABLE) {
      context.textAlign = "left";
      context.fillText("keys →", this.left, this.top - 36);
      context.save();
      context.translate(this.left - 58, this.top);
      context.rotate(-Math.PI / 2);
      context.textAlign = "right";
      context.fillText("← queries", 0, 0);
      context.restore();
    }
  }

  /** Bands beside both axes, one colour a span, with its name where there is room. */
  drawSpans(context) {
    const { colours } = this.app;
    context.save();
    this.text.spans.forEach((span, i) => {
      context.fillStyle = SPANS[i % SPANS.length];
      for (const [first, stop] of span.places) {
        const [x0, y0] = this.pixel(first, first);
        const [x1, y1] = this.pixel(stop, stop);
        const clip = (a, b, low, high) => [clamp(a, low, high), Math.max(clamp(b, low, high), a >= low && a < high ? clamp(a + 1.5, low, high) : 0)];
        const [ya, yb] = clip(y0, y1, this.top, this.top + this.size.height);
        const [xa, xb] = clip(x0, x1, this.left, this.left + this.size.width);
        if (yb > ya) context.fillRect(this.left - 7, ya, 4, yb - ya);
        if (xb > xa) context.fillRect(xa, this.top - 7, xb - xa, 4);
      }
    });
    const { answer } = this.text;
    if (answer !== null && answer !== undefined) {
      context.strokeStyle = colours.ink;
      context.setLineDash([3, 3]);
      context.globalAlpha = 0.6;
      const [x, y] = this.pixel(answer, answer);
      context.beginPath();
      if (y > this.top && y < this.top + this.size.height) context.moveTo(this.left - 8, y), context.lineTo(this.right, y);
      if (x > this.left && x < this.left + this.size.width) context.moveTo(x, this.top - 8), context.lineTo(x, this.bottom);
      context.stroke();
    }
    context.restore();
  }

  /** Statistics of rows at the right, of columns below, on the map's own places. */
  drawEdges(context, shownLevel) {
    const { colours } = this.app;
    const { x, y, scale } = this.view;
    const strips = [...this.rowEdges.map((each, i) => [each, i, true]), ...this.keyEdges.map((each, i) => [each, i, false])];
    for (const [edge, place, down] of strips) {
      const origin = (down ? this.right : this.bottom) + 8 + 34 * place;
      const level = this.edgeLevel(edge, shownLevel);
      const one = 2 ** level * scale;
      const bars = [];
      for (const piece of this.pieces(edge, level)) {
        const values = this.app.source.have(piece.question)?.values;
        values?.forEach((value, n) => {
          const at = (piece.i * this.app.open.strip + n) * 2 ** level;
          const pixel = down ? this.top + (at - y) * scale : this.left + (at - x) * scale;
          const from = down ? this.top : this.left;
          const size = down ? this.size.height : this.size.width;
          if (pixel + one > from && pixel < from + size && !Number.isNaN(value)) bars.push([Math.max(pixel, from), Math.min(pixel + one, from + size), value, at]);
        });
      }
      // a mass has its own end; others end where what is seen does, without the largest few of a hundred
      const sizes = bars.map(([, , value]) => Math.abs(value)).sort((a, b) => a - b);
      const most = edge.unit === "mass" ? 1 : sizes[Math.floor(sizes.length * 0.99)] || 1;
      const colour = [colours.accent, colours.contrast][down ? place % 2 : 1];
      context.fillStyle = colour;
      for (const [a, b, value] of bars) {
        const length = clamp(Math.abs(value) / most, 0, 1) * 24;
        context.globalAlpha = value < 0 ? 0.4 : 0.85;
        if (down) context.fillRect(origin, a, length, Math.max(0.75, b - a - (b - a > 4 ? 1 : 0)));
        else context.fillRect(a, origin, Math.max(0.75, b - a - (b - a > 4 ? 1 : 0)), length);
      }
      context.globalAlpha = 1;
      context.fillStyle = colours.soft;
      context.font = `10px ${FONT}`;
      context.textAlign = "left";
      if (down) context.fillText(edge.label, origin, this.bottom + 9 + 12 * place);
      else {
        context.textAlign = "right";
        context.fillText(edge.label, this.left - 8, origin + 8);
      }
    }
  }

  // -- the pointer ----------------------------------------------------------------------------------------------------

  /** What lies under the pointer: { query, key, zone }. */
  under(event) {
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const key = Math.floor(this.view.x + (x - this.left) / this.view.scale);
    const query = Math.floor(this.view.y + (y - this.top) / this.view.scale);
    const across = x >= this.left && x < this.right && key >= 0 && key < this.view.tokens;
    const down = y >= this.top && y < this.bottom && query >= 0 && query < this.view.tokens;
    if (across && down) return { zone: "map", query, key, x: x - this.left, y: y - this.top };
    if (across && (y < this.top || y >= this.bottom)) return { zone: "key", key };
    if (down && (x < this.left || x >= this.right)) return { zone: "query", query };
    return { zone: "none" };
  }

  listen() {
    const { canvas, view, app } = this;
    let drag = null;
    canvas.addEventListener("wheel", (event) => {
      const at = this.under(event);
      if (at.zone !== "map" || !(event.ctrlKey || event.metaKey || app.element.contains(document.activeElement) || app.page)) return;
      event.preventDefault();
      view.zoom(Math.exp(-clamp(event.deltaY, -120, 120) * 0.004), at.x, at.y, this.size);
      app.draw();
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.focus({ preventScroll: true });
      drag = { x: event.clientX, y: event.clientY, view: [view.x, view.y], moved: false };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (drag && event.buttons) {
        const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
        drag.moved ||= Math.hypot(dx, dy) > 3;
        if (drag.moved) {
          view.x = drag.view[0] - dx / view.scale;
          view.y = drag.view[1] - dy / view.scale;
          view.keep(this.size);
          canvas.style.cursor = "grabbing";
          return app.draw();
        }
      }
      const at = this.under(event);
      canvas.style.cursor = { map: "crosshair", key: "pointer", query: "pointer" }[at.zone] ?? "default";
      view.hovered = at.zone === "none" ? null : { query: at.query, key: at.key };
      app.side.read(this, at, event);
      app.draw();
    });
    canvas.addEventListener("pointerup", (event) => {
      const at = this.under(event);
      if (drag && !drag.moved) this.click(at);
      drag = null;
    });
    canvas.addEventListener("pointerleave", () => {
      view.hovered = null;
      app.side.read(null);
      app.draw();
    });
    canvas.addEventListener("dblclick", (event) => {
      const at = this.under(event);
      if (at.zone !== "map") return;
      view.zoom(4, at.x, at.y, this.size);
      app.draw();
    });
  }

  click(at) {
    if (at.zone === "key") this.app.openToken("key", at.key, this.run);
    else if (at.zone === "query") this.app.openToken("query", at.query, this.run);
    else if (at.zone === "map") {
      this.view.selected = { query: at.query, key: at.key };
      this.app.side.select(this);
      this.app.draw();
    }
  }
}
