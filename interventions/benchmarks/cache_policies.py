"""What a model under a policy for its cache gets wrong, beside what the same policy loses of its attention.

    python interventions/benchmarks/cache_policies.py needle --out interventions/benchmarks/results/cache-needle.json
    python interventions/benchmarks/cache_policies.py text_loss \\
        --out interventions/benchmarks/results/cache-text-loss.json

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
from headscope.interventions.tasks.base import Task

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("needle", "text_loss"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--budgets", default="128,256")
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a passage")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lm, budgets = load_model(given.model), [int(x) for x in given.budgets.split(",")]
    asked = [(policy, options, budget) for policy, options in POLICIES.items() for budget in budgets]
    needle = given.task == "needle"
    task: Task = NeedleTask() if needle else TextLoss(given.passages, given.length)
    when: dict[str, Any] = {"during": "answer"} if needle else {"read": given.length // 2}
    edits = [EvictKeys(policy=policy, options=options, budget=n, **when) for policy, options, n in asked]
    found = evaluate(lm, task, edits, progress=False)
    summary, scores = found.summary(), found.scores(given.task)
    rows = []
    for at, (policy, options, budget) in enumerate([("none", {}, None), *asked]):
        one = summary.iloc[at]
        numbers = {name: round(float(one[name]), 4) for name in ("mean", "ci_low", "ci_high")}
        if at:
            numbers |= {name: round(float(one[name]), 4) for name in ("delta", "delta_low", "delta_high")}
        by_trial = [round(float(x), 4) for x in scores.iloc[:, at]]
        rows.append({"policy": policy, **options, "budget": budget, **numbers, "by trial": by_trial})
        print(json.dumps(rows[-1]), flush=True)
    save_measured(given.out, {"metric": found.metrics[given.task], "rows": rows}, lm, **task.parameters(lm))


if __name__ == "__main__":
    main()
