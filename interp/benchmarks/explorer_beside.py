"""Pages of BertViz and CircuitsVis for one layer, beside the explorer's page and widget for all layers, on one text.

    pip install --no-deps --target DIRECTORY bertviz circuitsvis importlib_metadata zipp
    PYTHONPATH=DIRECTORY python interp/benchmarks/explorer_beside.py --save FILE

They put every weight into the page as text and fetch their scripts from the net. Here nothing is fetched: in the place
of those scripts stand stubs that keep the weights and draw nothing, so what is measured of them is the least that they
hold. Ours draws. Each page opens in a browser of its own; ``memory`` in ``browser.py`` says what is counted.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headscope.interp import load_model
from headscope.interp.benchmarks.browser import chromium, memory, opened, served
from headscope.interp.explorer import Explorer, record_run
from headscope.interp.prompts import load_haystack
from headscope.interp.runs.measured import save_measured

STUBS = {
    "require.min.js": "window.require = window.requirejs = (names, f) => f && f({}, {}); require.config = () => {};",
    "esm.js": "export const AttentionPatterns = {}; export const render = (...given) => { window.kept = given; };",
}
APP = "document.querySelector('.headscope-explorer')?.headscope"


def bertviz(weights: Tensor, tokens: list[str]) -> str:
    """BertViz's head view of one layer."""
    shown = import_module("bertviz").head_view((weights[None],), tokens, html_action="return")
    # what its script would draw with is kept instead
    return "<body>" + str(shown.data).replace("const params =", "const params = window.kept =", 1)


def circuitsvis(weights: Tensor, tokens: list[str]) -> str:
    """CircuitsVis' attention patterns of one layer."""
    return "<body>" + str(import_module("circuitsvis.attention").attention_patterns(tokens, weights))


def page_of(make: Callable[[Tensor, list[str]], str], weights: Tensor, tokens: list[str]) -> dict[str, Any]:
    """Seconds to write their page, its size, and what a browser holds of it."""
    began = time.perf_counter()
    text = make(weights, tokens)
    found: dict[str, Any] = {"write_s": time.perf_counter() - began, "page_mb": len(text) / 1e6}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(text)
        del text
        return found | in_browser(path.as_uri(), "!!window.kept")


def in_browser(address: str, ready: str) -> dict[str, Any]:
    """Seconds until ``ready``, and memory above an empty page; or what went wrong."""
    with chromium() as browser:
        with opened(browser, "about:blank") as page:
            blank = memory(browser, page)
        try:
            with opened(browser, "about:blank") as page:
                page.route("https://**/*", stub)
                began = time.perf_counter()
                page.goto(address, timeout=180_000)
                page.wait_for_function(ready, timeout=180_000)
                took = time.perf_counter() - began
                page.wait_for_timeout(1000)
                used = memory(browser, page)
        except Exception as error:  # of Playwright: the page crashed, or never was ready
            return {"failed": str(error).splitlines()[0][:160]}
    return {"open_s": took, **{f"{name}_above_blank": used[name] - blank[name] for name in used}}


def stub(route: Any) -> None:
    name = route.request.url.rsplit("/", 1)[-1]
    headers = {"Access-Control-Allow-Origin": "*"}
    route.fulfill(body=STUBS.get(name, ""), content_type="text/javascript", headers=headers)


def ours(explorer: Explorer) -> dict[str, Any]:
    """The explorer: its saved page, and its live widget with a head opened."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        path = explorer.save(Path(folder) / "page.html")
        saved = {"write_s": time.perf_counter() - began, "page_mb": path.stat().st_size / 1e6}
        saved |= in_browser(path.as_uri(), f"{APP}?.opened")
    with served(explorer) as (address, _):
        live = in_browser(address, f"{APP}?.opened && ({APP}.head || {APP}.openHead([0, 0]), {APP}.source.idle)")
    return {"saved": saved, "live": live}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1000,2000")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    lm = load_model("smollm2-135m")
    ids = lm.tokenizer(load_haystack())["input_ids"]
    others = {name: make for name, make in {"bertviz": bertviz, "circuitsvis": circuitsvis}.items() if find_spec(name)}
    found: dict[str, Any] = {"versions": {name: metadata.version(name) for name in others}}
    for length in map(int, given.lengths.split(",")):
        run = record_run(lm, ids[:length])
        kept = run.layers[5]
        weights = kept.weights(torch.arange(length), slice(0, length))
        row: dict[str, Any] = {"headscope, 30 layers": ours(Explorer(run))}
        for name, make in others.items():
            row[f"{name}, 1 layer"] = page_of(make, weights, run.tokens)
        found[str(length)] = row
        for name, value in row.items():
            print(length, name, value, flush=True)
    save_measured(given.save, found, lm, lengths=given.lengths)


if __name__ == "__main__":
    main()
