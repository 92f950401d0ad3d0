"""How loss on prose answers to the removal of the first token's attention, with and without renormalisation.

    python interventions/benchmarks/sink_dose.py --out interventions/benchmarks/results/sink-dose.json

All heads of all layers, so there are no other heads to draw a control from; beside it stands the same edit of another
key, ``--control`` positions, which is a sink for none of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from headscope.interp.models import load_model
from headscope.interp.runs.measured import save_measured
from headscope.interventions import ScaleSinks, TextLoss, evaluate

DOSES = (0.25, 0.5, 0.75, 0.9, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--passages", type=int, default=3)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--control", type=int, default=17, help="position of the key of the control")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lm, task = load_model(given.model), TextLoss(given.passages, given.length)
    edits = {
        (what, renormalise, dose): ScaleSinks(sinks=sinks, renormalise=renormalise, strength=dose)
        for what, sinks in (("first token", 1), ("another key", (given.control, given.control + 1)))
        for renormalise in (True, False)
        for dose in (DOSES if what == "first token" else DOSES[-1:])
    }
    scores = evaluate(lm, task, list(edits.values()), progress=False).scores("text_loss")
    plain = scores.iloc[:, 0]
    rows = [{"keys": "none", "loss": round(float(plain.mean()), 4)}]
    for column, (what, renormalise, dose) in enumerate(edits, start=1):
        loss = scores.iloc[:, column]
        rows.append(
            {
                "keys": what,
                "renormalise": renormalise,
                "removed": dose,
                "loss": round(float(loss.mean()), 4),
                "by passage": [round(float(x), 4) for x in loss - plain],
            }
        )
    print("\n".join(json.dumps(row) for row in rows))
    save_measured(given.out, {"rows": rows}, lm, task=task.parameters(lm))


if __name__ == "__main__":
    main()
