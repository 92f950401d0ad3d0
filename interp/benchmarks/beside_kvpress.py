"""Scores and kept keys of our policies beside kvpress's presses of the same names, on one text.

    pip install --no-deps --target DIRECTORY kvpress cachetools fire termcolor
    PYTHONPATH=DIRECTORY python interp/benchmarks/beside_kvpress.py --out interp/benchmarks/results/beside-kvpress.json

kvpress asks for an older transformers than ours and changes its attention functions when it is imported, so that it
runs in a process of its own, with the eager attention that two of its presses need. Its presses' ``score`` is called
with what its own hook would hand it, after each layer of one pass over the prompt; which keys stay is the top of those
scores, as its ``compress`` chooses them.

A row a policy: the largest difference of a score, relative to the layer's largest that is not forced (``forced``: sinks
and recent windows, which are kept whatever their score), and over layers and key heads the share of kept keys that are
the same; where they are not, how far apart the scores of the exchanged keys are (``gap``, relative alike).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.cache import POLICIES
from headscope.interp.cache.budget import Budget
from headscope.interp.cache.policy import KeyPolicy
from headscope.interp.cache.reading import Reading
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import sequences
from headscope.interp.sites import attached
from headscope.interp.sites.rotary import rotations
from headscope.kernels.benchmarks.pages import machine
from headscope.kernels.request import Request

PRESSES = {
    "snapkv": "SnapKVPress",
    "observed_attention": "ObservedAttentionPress",
    "tova": "TOVAPress",
    "knorm": "KnormPress",
    "keydiff": "KeyDiffPress",
    "expected_attention": "ExpectedAttentionPress",
}
Scores = dict[str, NDArray[np.float32]]  # of every policy (layer, kv_head, key)


def theirs(model: Any, ids: torch.Tensor) -> Scores:
    """Every press's scores, from the inputs that kvpress's hook would pass."""
    kvpress = import_module("kvpress")  # by name: it is no dependency of ours
    model.set_attn_implementation("eager")
    presses = {name: getattr(kvpress, press)() for name, press in PRESSES.items()}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in presses}

    def score(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        held = kwargs["past_key_values"].layers[module.layer_idx]
        given = kwargs["hidden_states"], held.keys, held.values, output[1], kwargs
        for name, press in presses.items():
            found[name].append(press.score(module, *given)[0].float())

    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb  # as kvpress sets it
        layer.self_attn.register_forward_hook(score, with_kwargs=True)
    with torch.no_grad():
        model(ids, use_cache=True)
    return {name: torch.stack(scores).numpy() for name, scores in found.items()}


class Ours(Handler):
    """Scores and kept keys of our policies, layer by layer."""

    only_reads = True

    def __init__(self, lm: LanguageModel, budget: Budget) -> None:
        self.policies: dict[str, KeyPolicy] = {name: POLICIES[name]() for name in PRESSES}  # type: ignore[misc]
        self.turned, self.budget = rotations(lm, None), budget
        self.scores: dict[str, list[torch.Tensor]] = {name: [] for name in PRESSES}
        self.kept: dict[str, list[torch.Tensor]] = {name: [] for name in PRESSES}

    def request(self, call: AttentionCall) -> Request:
        stop = torch.tensor([call.key.shape[2]])
        reading = Reading(call, stop, rotation=self.turned[call.module, call.layer])
        shape = call.key.shape[1], -1
        for name, policy in self.policies.items():
            self.scores[name].append(policy.scores(reading)[0].expand(*shape))
            self.kept[name].append(policy.sets(reading, [self.budget])[0][0].expand(*shape))
        return Request()


def forced(name: str, keys: int) -> NDArray[np.bool_]:
    """The keys whose score a press sets to the largest, so that they stay: (key,)."""
    at = np.arange(keys)
    first, last = {"snapkv": (0, 64), "tova": (0, 1), "expected_attention": (4, 0)}.get(name, (0, 0))
    return (at < first) | (at >= keys - last)


def compare(
    name: str, ours: NDArray[np.float32], kept: NDArray[np.bool_], theirs: NDArray[np.float32]
) -> dict[str, Any]:
    """One row. Scores and kept keys are (layer, kv_head, key)."""
    free = ~forced(name, ours.shape[-1])
    largest = np.abs(theirs[..., free]).max((1, 2), keepdims=True)
    apart = (np.abs(ours - theirs) / largest)[..., free]
    count = int(kept[0, 0].sum())
    best = np.argsort(-theirs, axis=-1, kind="stable")[..., :count]
    chosen = np.zeros_like(kept)
    np.put_along_axis(chosen, best, True, axis=-1)
    lowest = np.where(chosen, theirs, np.inf).min(-1, keepdims=True)  # of a head's kept keys, by their scores
    gap = np.where(kept & ~chosen, (lowest - theirs) / largest, 0.0)
    return {
        "policy": name,
        "press": PRESSES[name],
        "largest_difference": float(apart.max()),
        "forced": int((~free).sum()),
        "heads": int(kept.shape[0] * kept.shape[1]),
        "heads_with_the_same_keys": int((kept == chosen).all(-1).sum()),
        "same_keys": float((kept & chosen).sum() / kept.sum()),
        "gap": float(gap.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--theirs", type=Path, help="write kvpress's scores here, in this process, and stop")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if find_spec("kvpress") is None:
        parser.error("kvpress is not installed; the beginning of this file says how")
    lm = load_model(given.model, device="cpu", dtype="float32")
    ids = sequences.first_windows(lm, None, given.tokens, 1)[0].ids[None]
    if given.theirs:
        np.savez(given.theirs, **theirs(lm.inner, ids))  # type: ignore[arg-type]
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.npz"
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--theirs", str(path)], check=True)
        beside = dict(np.load(path))
    ours = Ours(lm, Budget(keys=given.budget))
    with attached(lm, ours), torch.no_grad():
        lm.forward(ids, logits=1)
    rows = []
    for name in PRESSES:
        scores, kept = (torch.stack(x[name]).numpy() for x in (ours.scores, ours.kept))
        rows.append(compare(name, scores, kept, beside[name]))
        print(json.dumps(rows[-1]))
    if given.out:
        versions = {name: metadata.version(name) for name in ("kvpress", "transformers", "torch")}
        settings = {"model": given.model, "tokens": given.tokens, "budget": given.budget, "dtype": "float32"}
        document = {"rows": rows, "settings": settings, "versions": versions, "machine": machine()}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
