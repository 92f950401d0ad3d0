"""The explorer at many tokens: what is kept, how long a tile takes, what the browser holds.

    python interp/benchmarks/explorer.py --tokens 16384 --layers 4 --save interp/benchmarks/results/explorer.json
    python interp/benchmarks/explorer.py --tokens 131072 --made --save interp/benchmarks/results/explorer-131072.json
    python interp/benchmarks/explorer.py --tokens 131072 --device cuda --save FILE

A forward pass of SmolLM2-135M (its first ``--layers`` layers) over the bundled prose, repeated; beyond its context of
8,192 tokens what it attends to means little, and costs what it costs. ``--made`` takes drawn queries and keys of one
head instead, with neighbours and a first token that are looked at. The page then does what a reader does: it opens,
opens a head, zooms in to single tokens at 12 places, and says how long each answer took, from question to numbers.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from headscope.interp import load_model
from headscope.interp.attention.call import AttentionCall
from headscope.interp.benchmarks.browser import CHROMIUM, chromium, memory, opened, served
from headscope.interp.explorer import Explorer, Run, record_run
from headscope.interp.explorer.kept import KeptLayer
from headscope.interp.explorer.tiles import SIDE, Place, top_level
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import load_haystack
from headscope.interp.runs.measured import save_measured
from headscope.kernels.masks import Mask
from headscope.kernels.request import Request

APP = "document.querySelector('.headscope-explorer').headscope"
PLACES = 12
DONE = f"() => {APP}.source.idle && !{APP}.drawing"
EXACT = f"() => {APP}.source.idle && !{APP}.drawing && !{APP}.panes.some((pane) => pane.unfinished().length)"


def shortened(lm: LanguageModel, layers: int | None) -> LanguageModel:
    """The model's first layers, without the limit of its context."""
    if layers is not None:
        inner: Any = lm.model
        del inner.model.layers[layers:]
        inner.config.num_hidden_layers = layers
    lm = LanguageModel.wrap(lm.model, lm.tokenizer, name=lm.name, revision=lm.revision)
    return replace(lm, info=replace(lm.info, context_length=None))


def recorded(lm: LanguageModel, tokens: int) -> Run:
    """A run over the bundled prose."""
    ids = lm.tokenizer(load_haystack())["input_ids"]
    ids = (ids * (1 + tokens // len(ids)))[:tokens]
    return record_run(lm, ids)


def drawn(lm: LanguageModel, tokens: int, device: str) -> Run:
    """One head of 64 dimensions: a walk, so that neighbours are alike, and a first token that is looked at. The lse of
    its rows is computed once, as a forward pass does."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, tokens, 64, generator=generator)
    for i in (1, 2, 4, 8):  # each key holds some of those before it
        key[:, :, i:] = 0.8 * key[:, :, i:] + 0.6 * key[:, :, :-i]
    key[:, :, 0] *= 3
    query = key + 0.5 * torch.randn(1, 1, tokens, 64, generator=generator)
    query, key = query.to(device), key.to(device)
    call = AttentionCall(query, key, key, Mask.causal(), 64**-0.5, layer=0, module="layers.*")
    lse = call.attend(Request(output=False, lse=True)).lse
    assert lse is not None
    words = lm.tokenizer(load_haystack())["input_ids"]
    texts = lm.tokenizer.convert_ids_to_tokens((words * (1 + tokens // len(words)))[:tokens])
    return Run("drawn", texts, {0: KeptLayer(call, lse[0])})


def timed_tiles(run: Run, each: int = 10) -> dict[str, Any]:
    """Milliseconds a tile at every level, in Python, from an empty start; and whether its first answer was exact."""
    found: dict[str, Any] = {}
    draw = random.Random(0)
    layer = next(iter(run.layers))
    count = len(run.tokens)
    for level in range(top_level(count) + 1):
        across = -(-count // (SIDE << level))
        places = [Place(level, i, draw.randrange(i + 1)) for i in (draw.randrange(across) for _ in range(each))]
        took, exact = [], []
        for place in dict.fromkeys(places):
            began = time.perf_counter()
            tile = run.tiles.tile(layer, draw.randrange(run.layers[layer].heads), place)
            took.append(1000 * (time.perf_counter() - began))
            exact.append(tile.exact)
        found[f"{1 << level}x{1 << level}"] = {"ms": median(took), "most_ms": max(took), "exact": all(exact)}
    return found


def looked_at(explorer: Explorer, patience: float) -> dict[str, Any]:
    """What the page takes, driven in chromium; the far view has ``patience`` seconds to become exact."""
    with chromium() as browser, served(explorer) as (address, asked):
        with opened(browser, "about:blank") as page:
            blank = memory(browser, page)
        with opened(browser, address) as page:
            page.wait_for_function("document.querySelector('.headscope-explorer')?.headscope?.opened")
            open_s = page.evaluate(f"() => {APP}.opened") / 1000  # since the page was asked for
            middle = len(explorer.answers.heads) // 2
            began = time.perf_counter()
            page.evaluate(f"() => {APP}.openHead({APP}.open.heads[{middle}])")
            page.wait_for_function(DONE, timeout=120_000)
            first_s = time.perf_counter() - began
            try:
                page.wait_for_function(EXACT, timeout=1000 * patience)
                exact_s = time.perf_counter() - began
            except Exception:  # of Playwright: it was not exact in time
                exact_s = None
            unfinished = (
                f"{APP}.panes.flatMap((pane) => pane.unfinished()).map(({{answer}}) => [answer.rows, answer.of])"
            )
            rows = page.evaluate(f"() => {unfinished}")
            draw, count = random.Random(1), len(explorer.runs[0].tokens)
            for _ in range(PLACES):
                query = draw.randrange(count)
                key = draw.randrange(query + 1)
                for step in range(24):
                    scale = f"Math.min(30, {APP}.view.scale * {2 if step else 1})"
                    page.evaluate(
                        f"() => {{ {APP}.view.centre({query}, {key}, {scale}, {APP}.panes[0].size); {APP}.draw(); }}"
                    )
                    page.wait_for_function(DONE, timeout=600_000)
                    if page.evaluate(f"() => {APP}.view.scale >= 30"):
                        break
                page.evaluate(f"() => {APP}.whole()")
            times = page.evaluate(f"() => {APP}.source.times")
            held = page.evaluate("() => globalThis[Symbol.for('headscope.recent')].bytes")
            used = memory(browser, page)
            faults = [*page.said, *page.errors]
    by_kind = defaultdict(list)
    for one in times:
        kind, *rest = one["question"].split("/")
        by_kind[kind].append(one["ms"])
        if kind == "tile" and rest[4] == "0":
            by_kind["tile of single tokens"].append(one["ms"])
    answers = {kind: {"n": len(ms), "ms": median(ms), "most_ms": max(ms)} for kind, ms in sorted(by_kind.items())}
    return {
        "open_s": open_s,
        "head_seen_s": first_s,
        "head_exact_s": exact_s,
        "rows_by_then": rows,  # of each tile in sight that was not exact yet
        "answers": answers,
        "questions": len(asked),
        "cache_mb": held / 1e6,
        "heap_mb": used["heap_mb"],
        "heap_above_blank_mb": used["heap_mb"] - blank["heap_mb"],
        "process_above_blank_mb": used["process_mb"] - blank["process_mb"],
        "faults": faults,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--layers", type=int, help="keep the model's first layers alone")
    parser.add_argument("--made", action="store_true", help="drawn queries and keys of one head, no forward pass")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-browser", action="store_true")
    parser.add_argument("--patience", type=float, default=120, help="seconds for the far view to become exact")
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    lm = load_model("smollm2-135m", device=given.device)
    if not given.made:
        lm = shortened(lm, given.layers)
    began = time.perf_counter()
    run = drawn(lm, given.tokens, given.device) if given.made else recorded(lm, given.tokens)
    found: dict[str, Any] = {
        "tokens": given.tokens,
        "layers": len(run.layers),
        "made": given.made,
        "record_s": time.perf_counter() - began,
        "kept_mb": run.nbytes / 1e6,
    }
    began = time.perf_counter()
    explorer = Explorer(run)
    explorer.answers("open")
    found["prepare_s"] = time.perf_counter() - began
    found["tiles"] = timed_tiles(run)
    if not given.no_browser and CHROMIUM is not None:
        fresh = Explorer(Run(run.name, run.tokens, run.layers, run.records))  # nothing that was computed before
        found["browser"] = looked_at(fresh, given.patience)
    found["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for name, value in found.items():
        print(name, value)
    save_measured(given.save, found, lm, tokens=given.tokens, made=given.made)


if __name__ == "__main__":
    main()
