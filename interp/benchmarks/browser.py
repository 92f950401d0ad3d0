"""Chromium driven headless, and a page around a live widget: anywidget's model, over loopback HTTP to its handler."""

from __future__ import annotations

import json
import shutil
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from headscope.interp.explorer import Explorer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGE = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">
<link rel="stylesheet" href="/widget.css"><body><div id="one"></div><div id="two"></div>
<script type="module">
import widget from "/widget.js";
const heard = new Set();
const model = {
  get: (name) => ({ height: 620 })[name],
  on: (name, f) => heard.add(f),
  off: (name, f) => heard.delete(f),
  async send(content) {
    const answer = await (await fetch("/message", { method: "POST", body: JSON.stringify(content) })).arrayBuffer();
    const size = new DataView(answer).getUint32(0);
    const messages = JSON.parse(new TextDecoder().decode(new Uint8Array(answer, 4, size)));
    let start = 4 + size;
    for (const { content: message, sizes } of messages) {
      const buffers = sizes.map((n) => new DataView(answer, (start += n) - n, n));
      heard.forEach((f) => f(message, buffers));
    }
  },
};
window.closing = ["one", "two"].map((name) => widget.render({ model, el: document.getElementById(name) }));
</script>"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser, for as long as the block."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, address: str, **options: Any) -> Iterator[Any]:
    """A page; what it says, breaks and asks for is in ``page.said``, ``page.errors`` and ``page.requests``."""
    context = browser.new_context(viewport={"width": 1280, "height": 860}, **options)
    page = context.new_page()
    page.said, page.errors, page.requests = [], [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(address)
    yield page
    context.close()


@contextmanager
def served(explorer: Explorer) -> Iterator[tuple[str, list[str]]]:
    """The address of a page with two views of the explorer's widget, and the questions that it was asked."""
    widget, asked, lock = explorer.widget, [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            texts = {"/": PAGE, "/widget.js": widget._esm, "/widget.css": widget._css}
            kind = {"/widget.js": "text/javascript", "/widget.css": "text/css"}.get(self.path, "text/html")
            self._send(kind, str(texts[self.path]).encode())

        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:  # as a kernel, which handles one message at a time
                asked.extend(content["ask"])
                sent: list[tuple[Any, list[bytes]]] = []
                widget.send = lambda message, buffers=None: sent.append((message, buffers or []))
                widget._handle_custom_msg(content, [])
            head = json.dumps([{"content": m, "sizes": [len(b) for b in bs]} for m, bs in sent]).encode()
            body = b"".join(b for _, bs in sent for b in bs)
            self._send("application/octet-stream", struct.pack(">I", len(head)) + head + body)

        def _send(self, kind: str, data: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def memory(browser: Any, page: Any) -> dict[str, float]:
    """What a page takes, in MB: its JavaScript heap, and its process (proportional set size) with all that it draws."""
    session = page.context.new_cdp_session(page)
    session.send("HeapProfiler.collectGarbage")
    session.send("Performance.enable")
    metrics = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    sizes = []
    for one in processes:
        if one["type"] == "renderer":
            text = Path(f"/proc/{one['id']}/smaps_rollup").read_text()
            sizes.append(int(next(line for line in text.splitlines() if line.startswith("Pss:")).split()[1]) / 1000)
    return {"heap_mb": metrics["JSHeapUsedSize"] / 1e6, "process_mb": max(sizes)}
