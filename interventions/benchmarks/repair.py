"""Four-head repair on SmolLM2: heads of its IOI circuit forced onto colours of coloured objects, beside random heads.

    python interventions/benchmarks/repair.py --out interventions/benchmarks/results/repair.json

Movers, negative movers and inhibition heads are those that path patching finds in this model on pairs of indirect
object identification. "wrong" are the two other colours of the question, as in the paper, "right" the answer's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from headscope.interp.models import load_model
from headscope.interp.runs.measured import save_measured
from headscope.interventions.mechanisms.repair import circuit_roles, force_heads
from headscope.probes.circuits.coloured import coloured_objects
from headscope.probes.circuits.ioi import ioi

WRONG, RIGHT = ("wrong_0", "wrong_1"), ("right",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--find", type=int, default=16, help="pairs of indirect object identification")
    parser.add_argument("--pairs", type=int, default=32, help="of coloured objects")
    parser.add_argument("--randoms", type=int, default=10)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lm = load_model(given.model, dtype="float32")
    roles = circuit_roles(lm, ioi(lm, given.find), progress=False)
    named = {name: getattr(roles, name) for name in ("movers", "negative", "inhibition")}
    print({name: [f"L{a}H{b}" for a, b in held] for name, held in named.items()}, flush=True)
    asked = {
        "inhibition and negative onto wrong": (roles.four, WRONG),
        "inhibition onto wrong": (roles.inhibition, WRONG),
        "negative onto wrong": (roles.negative, WRONG),
        "inhibition and negative onto right": (roles.four, RIGHT),
    }
    pairs, rows = coloured_objects(lm, given.pairs), dict[str, list[dict[str, Any]]]()
    for name, (held, onto) in asked.items():
        if len(held):
            found = force_heads(lm, pairs, held, onto, randoms=given.randoms, batch_size=8, progress=False).to_frame()
            rows[name] = [
                {key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}
                for row in found.to_dict("records")
            ]
            print(found.set_index("measure").T.rename_axis(name), flush=True)
    document = {
        "heads": {
            name: [[*head, round(w, 4)] for head, w in zip(h, h.weights, strict=True)] for name, h in named.items()
        },
        "rows": rows,
    }
    save_measured(given.out, document, lm, find=given.find, pairs=given.pairs, randoms=given.randoms)


if __name__ == "__main__":
    main()
