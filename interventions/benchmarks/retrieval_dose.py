"""How recall of a needle, and loss on prose, answer to the removal of more and more retrieval heads.

    python interventions/benchmarks/retrieval_dose.py --out interventions/benchmarks/results/retrieval-dose.json

Heads are found with the needles that ``discover retrieval`` uses, and judged on others; they are zeroed, in their order
of scores, always and everywhere. Beside every dose stand as many random heads of the same layers, ``--controls`` times.
A run that was stopped goes on where it stopped: finished trials lie in ``--work``.

What it does not show: that heads found so are needed for anything but copying; prose is the only other text here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from headscope.interp import heads
from headscope.interp.models import load_model
from headscope.interp.runs.measured import save_measured
from headscope.interventions import AblateHeads, NeedleTask, TextLoss, evaluate

DOSES = "1,2,5,10"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def rows_of(result: Any, doses: list[int]) -> list[dict[str, Any]]:
    """Dose by dose and task by task: the mean, its difference from none with an interval, and the random heads'."""
    summary, contrasts = result.summary(), result.contrasts()
    rows: list[dict[str, Any]] = []
    for task in result.metrics:
        scores = result.scores(task)
        mine = summary[(summary["task"] == task) & (summary["kind"] != "control")]
        beside = contrasts[contrasts["task"] == task].set_index("condition")
        for dose, row in zip([0, *doses], mine.to_dict("records"), strict=True):
            one = {"task": task, "heads": dose, **{name: row[name] for name in ("mean", "ci_low", "ci_high", "n")}}
            if dose:
                against = beside.loc[row["condition"]]
                one |= {name: row[name] for name in ("delta", "delta_low", "delta_high")}
                one |= {name: float(against[name]) for name in ("random", "difference", "low", "high", "p_worse")}
                drawn = result.trials[result.trials["of"] == row["condition"]]["condition"].unique()
                one["random by set"] = [float(scores[name].mean()) for name in drawn]
            rows.append({name: round(x, 4) if isinstance(x, float) else x for name, x in one.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--doses", type=numbers, default=DOSES, help="how many heads, beside none")
    parser.add_argument("--length", type=int, default=500, help="tokens of a needle's prompt")
    parser.add_argument("--depths", type=numbers, default="25,75")
    parser.add_argument("--needles", type=int, default=3, help="to find heads with; others judge them")
    parser.add_argument("--passages", type=int, default=2)
    parser.add_argument("--controls", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/retrieval-dose"), help="where finished trials are kept")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lm = load_model(given.model)
    own = {"lengths": [given.length], "depths": given.depths}
    found = heads.retrieval(lm, **own, needles=given.needles, out=given.work / "heads")
    tasks = [NeedleTask(**own), TextLoss(given.passages, given.length)]
    edits = [AblateHeads(found.top(dose)) for dose in given.doses]
    result = evaluate(lm, tasks, edits, controls=given.controls, out=given.work / "evaluation")
    rows, most = rows_of(result, given.doses), found.top(max(given.doses))
    document = {
        "heads": [[*head, round(score, 4)] for head, score in zip(most, most.weights, strict=True)],
        "rows": rows,
    }
    print("\n".join(json.dumps(row) for row in rows))
    save_measured(given.out, document, lm, tasks={task.name: task.parameters(lm) for task in tasks})


if __name__ == "__main__":
    main()
