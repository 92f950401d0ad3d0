"""How well attribution patching of edges, and its dropout for heads, order what true patching finds, on IOI.

Run: python probes/benchmarks/edges.py --out probes/benchmarks/results/edges.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from headscope.interp import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.measured import save_measured
from headscope.probes import attribution_patching, edge_attribution, ioi, patch_heads
from headscope.probes.patching.attribution import correlation, sampled
from headscope.probes.patching.pairs import Pairs


def edges(lm: LanguageModel, pairs: Pairs, sample: int) -> dict[str, Any]:
    """One step and five beside true edges."""
    begin = time.perf_counter()
    integrated = edge_attribution(lm, pairs, steps=5, sample=sample, progress=False)
    middle = time.perf_counter()
    plain = edge_attribution(lm, pairs, steps=1, progress=False)
    end = time.perf_counter()
    assert integrated.sample is not None and integrated.correlation is not None
    rows = list(zip(integrated.sample["sender"], integrated.sample["receiver"], strict=True))
    rank = spearmanr([plain.effect(*edge).mean() for edge in rows], integrated.sample["true"]).statistic
    return {
        "edges": int((plain.mean == plain.mean).sum()),
        "sampled": sample,
        "spearman, 1 step": float(rank),
        "spearman, 5 steps": integrated.correlation["spearman"],
        "seconds, 1 step": round(end - middle, 1),
        "seconds, 5 steps and the sample": round(middle - begin, 1),
        "top": integrated.top(10).to_dict("records"),
    }


def heads(lm: LanguageModel, pairs: Pairs, sample: int) -> dict[str, Any]:
    """The size of each sampled head's effect, per pair, beside estimates with dropout and without."""
    plain = attribution_patching(lm, pairs, progress=False)
    dropped = attribution_patching(lm, pairs, dropout=True, progress=False)
    asked = sampled(plain.scores, sample, 0)
    true = patch_heads(lm, pairs, heads=asked, direction="noise", progress=False)
    for scores in (true, plain.scores):
        scores.trials[:] = abs(scores.trials)
    return {
        "sampled": sample,
        "spearman of sizes, plain": correlation(plain.scores, true)["spearman"],
        "spearman of sizes, dropout": correlation(dropped.scores, true)["spearman"],
        "backwards": dropped.backwards,
    }


def main() -> None:
    """Measure, print as JSON, and write it with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--sample", type=int, default=40)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    lm = load_model(asked.model, dtype="float32")
    pairs = ioi(lm, asked.pairs)
    found = {
        "heads": heads(lm, pairs, asked.sample),
        "edges": edges(lm, pairs, asked.sample),
    }
    print(json.dumps(found, indent=1))
    save_measured(asked.out, found, lm, pairs=asked.pairs, sample=asked.sample)


if __name__ == "__main__":
    main()
