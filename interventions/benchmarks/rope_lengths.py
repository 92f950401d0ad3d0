"""What rescaled RoPE does to a model without training: loss, attention distance and needle recall, by length of text.

    python interventions/benchmarks/rope_lengths.py --lengths 1024 --out ...results/rope-lengths-1024.json
    python interventions/benchmarks/rope_lengths.py --lengths 8000 9216 12288 --needle 12288 --depths 0 50 100 --out ...

Loss is of the last ``--scored`` tokens of one passage of the bundled prose, and distance the mean over heads, layers
and these rows of sum_j A_ij (i - j); recall is the needle task's, at ``--depths`` and three needles, up to ``--needle``
tokens. Positions are trained up to the model's context, 8,192 tokens for SmolLM2; the results are one passage's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.haystack import load_haystack
from headscope.interp.runs.measured import save_measured
from headscope.interp.statistics import Distance
from headscope.interp.statistics.queries import Last
from headscope.interp.tracing.recording import trace
from headscope.interventions import NeedleTask, RescaleRoPE, apply

SETTINGS: dict[str, dict[str, Any]] = {
    "unedited": {},
    "linear 2": {"linear": 2.0},
    "linear 4": {"linear": 4.0},
    "ntk 2": {"ntk": 2.0},
    "ntk 8": {"ntk": 8.0},
    "truncated at 8192": {"truncate": 8192},
}


def measured(lm: LanguageModel, ids: torch.Tensor, scored: int) -> dict[str, float]:
    """Loss and mean attention distance of the last ``scored`` tokens of ``ids`` (1, position)."""
    with torch.no_grad(), trace(lm, [Distance()], queries=Last(scored)) as tracer:
        logits = lm.model(input_ids=ids[:, :-1], logits_to_keep=scored).logits[0].float()
    loss = torch.nn.functional.cross_entropy(logits, ids[0, -scored:])
    return {"loss": round(float(loss), 4), "distance": round(float(tracer.record["distance"].mean()), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 9216])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--scored", type=int, default=256)
    parser.add_argument("--needle", type=int, default=1024, help="the longest text in which needles are asked for")
    parser.add_argument("--depths", type=float, nargs="+", default=[50])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lm = load_model(given.model)
    text = torch.tensor([lm.required_tokenizer()(load_haystack(None), verbose=False)["input_ids"]], device=lm.device)
    rows = []
    for length in given.lengths:
        task = NeedleTask(lengths=(length,), depths=tuple(given.depths), beyond=True)
        for name in given.settings:
            row: dict[str, Any] = {"length": length, "setting": name}
            with apply(lm, RescaleRoPE(**SETTINGS[name])):
                row |= measured(lm, text[:, :length], given.scored)
                if length <= given.needle:
                    recalls = [task.run(lm, trial)["score"] for trial in task.trials(lm)]
                    row |= {"recall": round(sum(recalls) / len(recalls), 3), "trials": len(recalls)}
            print(json.dumps(row), flush=True)
            rows.append(row)
    save_measured(given.out, {"rows": rows}, lm, scored=given.scored, depths=given.depths)


if __name__ == "__main__":
    main()
