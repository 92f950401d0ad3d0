// Where answers come from: the kernel of a notebook, or what a saved page holds.

const AT_ONCE = 6; // questions on their way
let sources = 0;

class Source {
  /** `fetch(question)` gives a promise of { facts, data: Uint8Array }. */
  constructor(fetch) {
    this.fetch = fetch;
    this.name = `${Date.now()}-${sources++}`; // answers of several explorers lie in one cache
    this.waiting = new Map(); // question -> { wanted, promise, resolve, reject }
    this.running = 0;
    this.times = [];
    this.missing = new Set();
  }

  /** The answer if it is at hand. */
  have(question) {
    return recent.get(`${this.name} ${question}`);
  }

  /** An answer; `wanted()` is asked again before a question is sent that had to wait. */
  ask(question, wanted = () => true) {
    const found = this.have(question);
    if (found) return Promise.resolve(found);
    if (this.missing.has(question)) return Promise.reject(new Error("left out"));
    const before = this.waiting.get(question);
    if (before) {
      before.wanted = wanted;
      return before.promise;
    }
    const entry = { wanted };
    entry.promise = new Promise((resolve, reject) => Object.assign(entry, { resolve, reject }));
    entry.promise.catch(() => {});
    this.waiting.set(question, entry);
    queueMicrotask(() => this.next());
    return entry.promise;
  }

  get idle() {
    return this.waiting.size === 0;
  }

  next() {
    for (const [question, entry] of [...this.waiting].reverse()) {
      if (this.running >= AT_ONCE) return;
      if (entry.sent) continue;
      if (!entry.wanted()) {
        this.waiting.delete(question);
        entry.reject(new Error("not wanted any more"));
        continue;
      }
      this.send(question, entry);
    }
  }

  async send(question, entry) {
    entry.sent = true;
    this.running++;
    const began = performance.now();
    try {
      const answer = await this.fetch(question);
      const value = { ...answer.facts, ...numbers(answer) };
      this.times.push({ question, ms: performance.now() - began });
      if (question.startsWith("finer/")) question = question.replace("finer/", "tile/");
      recent.put(`${this.name} ${question}`, value, (value.values?.byteLength ?? 0) + 400);
      entry.resolve(value);
    } catch (error) {
      this.missing.add(question);
      entry.reject(error);
    } finally {
      this.running--;
      for (const [key, one] of this.waiting) if (one === entry) this.waiting.delete(key);
      this.next();
    }
  }
}

/** The numbers of an answer: bits of halves, or float32. */
function numbers({ facts, data }) {
  if (!data || !data.byteLength) return {};
  const own = data.slice().buffer;
  if (facts.type !== "f16") return { values: new Float32Array(own) };
  const values = new Uint16Array(own);
  let most = 0;
  for (const bits of values) {
    const x = Math.abs(HALF[bits]);
    if (x > most && x < Infinity) most = x;
  }
  return { values, most };
}

/** A widget's kernel: custom messages there and back. */
function liveSource(model) {
  const asked = new Map();
  const hear = (message, buffers) => {
    const entry = asked.get(message.id);
    if (!entry) return; // of another view
    asked.delete(message.id);
    if (message.error) return entry.reject(new Error(message.error));
    const view = buffers?.[0];
    const data = view && (view instanceof ArrayBuffer ? new Uint8Array(view) : new Uint8Array(view.buffer, view.byteOffset, view.byteLength));
    entry.resolve({ facts: message.facts, data });
  };
  model.on("msg:custom", hear);
  const view = Math.random().toString(36).slice(2);
  let count = 0;
  const source = new Source((question) => new Promise((resolve, reject) => {
    const id = `${view}-${count++}`;
    asked.set(id, { resolve, reject });
    model.send({ id, ask: [question] });
  }));
  source.close = () => model.off("msg:custom", hear);
  return source;
}

const bytesOf = (text) => Uint8Array.from(atob(text), (one) => one.charCodeAt(0));

async function unzipped(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** A saved page: `head` is what it says of itself, `bytes` holds its answers one after the other. */
function savedSource(head, bytes) {
  const source = new Source(async (question) => {
    if (question === "open") return { facts: head.open };
    const found = head.index[question];
    if (!found) throw new Error("left out");
    const [facts, start, size] = found;
    if (!size) return { facts };
    const data = await unzipped(bytes.subarray(start, start + size));
    if (facts.type !== "f16") return { facts, data };
    const whole = new Uint8Array(data.length); // low bytes first, then high ones
    const half = data.length / 2;
    for (let i = 0; i < half; i++) {
      whole[2 * i] = data[i];
      whole[2 * i + 1] = data[half + i];
    }
    return { facts, data: whole };
  });
  source.saved = head;
  source.close = () => {};
  return source;
}
