"""What a model under a policy for its cache gets wrong, beside what the same policy loses of its attention.

    python interventions/benchmarks/cache_policies.py --out interventions/benchmarks/results/cache-policies.json

Recall of needles in 600 tokens, keys evicted when the prompt was read; loss on prose, of whose passages the first half
is what was read. For the mass that policies lose, see ``headscope discover cache``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from headscope.interp.models import load_model
from headscope.interp.runs.measured import save_measured
from headscope.interventions import EvictKeys, NeedleTask, TextLoss, evaluate

POLICIES: dict[str, dict[str, Any]] = {
    "snapkv": {"window": 32},
    "h2o": {},
    "observed_attention": {},
    "tova": {},
    "keydiff": {},
    "expected_attention": {},
    "streaming_llm": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--budgets", default="128,256")
    parser.add_argument("--passages", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lm, budgets = load_model(given.model), [int(x) for x in given.budgets.split(",")]
    asked = [(policy, options, budget) for policy, options in POLICIES.items() for budget in budgets]
    needle, prose = NeedleTask(), TextLoss(given.passages, given.length)

    def edits(**more: Any) -> list[EvictKeys]:
        return [EvictKeys(policy=policy, options=options, budget=n, **more) for policy, options, n in asked]

    recall = evaluate(lm, needle, edits(during="answer")).scores("needle")
    loss = evaluate(lm, prose, edits(read=given.length // 2)).scores("text_loss")
    rows = [{"policy": "none", "needle": round(float(recall.iloc[:, 0].mean()), 3)}]
    rows[0]["loss"] = round(float(loss.iloc[:, 0].mean()), 4)
    for column, (policy, options, budget) in enumerate(asked, start=1):
        found, lost = recall.iloc[:, column], loss.iloc[:, column]
        rows.append(
            {
                "policy": policy,
                **options,
                "budget": budget,
                "needle": round(float(found.mean()), 3),
                "needle by trial": [round(float(x), 2) for x in found],
                "loss": round(float(lost.mean()), 4),
                "loss by passage": [round(float(x), 4) for x in lost - loss.iloc[:, 0]],
            }
        )
    print("\n".join(json.dumps(row) for row in rows))
    settings = {"needle": needle.parameters(lm), "text_loss": prose.parameters(lm)}
    save_measured(given.out, {"rows": rows}, lm, **settings)


if __name__ == "__main__":
    main()
