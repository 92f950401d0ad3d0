"""What a model says of documents in every order, with PINE and without, on SmolLM2-135M.

    python interventions/benchmarks/pine_order.py --out interventions/benchmarks/results/pine-order.json

Four documents of one sentence, each about another person; a question about one of them. Every order of the documents is
read; "gold at i" are the orders in which the document that answers is the i-th. Position matters where the answer's
log-likelihood goes with i; PINE should take that away, which need not make the answers better. Where two documents are
of all but equal importance to a row, rounding decides which ranks first, and logits differ by more than it.
"""

from __future__ import annotations

import argparse
import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headscope.interp.models import load_model
from headscope.interp.runs.measured import save_measured
from headscope.interventions import Pine, apply

FACTS = (("Alba", "Lisbon"), ("Boris", "Oslo"), ("Clara", "Vienna"), ("Dario", "Athens"))
ASIDES = (
    "The move took two days, and the cat was carried in a basket.",
    "The house has a blue door and stands beside a bakery.",
    "In winter the windows are covered with ice in the morning.",
    "A piano was brought up the stairs by three men.",
)


def documents(lm: Any, order: tuple[int, ...]) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a prefix and the documents in an order, and the documents' spans."""
    ids: list[int] = lm.tokenizer.encode("Read these notes.\n", add_special_tokens=True)
    spans = []
    for number in order:
        (name, city), aside = FACTS[number], ASIDES[number]
        part = lm.tokenizer.encode(f"{name} lives in {city}. {aside}\n", add_special_tokens=False)
        spans.append((len(ids), len(ids) + len(part)))
        ids += part
    return ids, spans


@torch.no_grad()
def read(lm: Any, order: tuple[int, ...], asked: int, pine: bool) -> tuple[torch.Tensor, float, bool]:
    """The logits after the question, the log-likelihood of the answer's first token, and whether it is the likeliest of
    the four cities."""
    ids, spans = documents(lm, order)
    ids += lm.tokenizer.encode(f"Question: where does {FACTS[asked][0]} live?\nAnswer: in", add_special_tokens=False)
    cities = [lm.tokenizer.encode(f" {city}", add_special_tokens=False)[0] for _, city in FACTS]
    with apply(lm, *([Pine(documents=spans)] if pine else [])):
        logits = lm.inner(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
    chosen = logits.log_softmax(-1)[cities]
    return logits, float(chosen[asked]), int(chosen.argmax()) == asked


def measure(lm: Any, pine: bool, orders: list[tuple[int, ...]]) -> dict[str, Any]:
    """Over every question and order: how far logits differ, and the answer by the gold document's place."""
    apart, place, likely, right = [], [], [], []
    for asked in range(len(FACTS)):
        first = None
        for order in orders:
            logits, found, best = read(lm, order, asked, pine)
            first = logits if first is None else first
            apart.append(float((logits - first).abs().max()))
            place.append(order.index(asked))
            likely.append(found)
            right.append(best)
    at, value, hit = np.array(place), np.array(likely), np.array(right)
    by_question = value.reshape(len(FACTS), -1)
    return {
        "largest difference of a logit from the first order": max(apart),
        "its median over prompts": float(np.median(apart)),
        "prompts where it is below 1e-4": float(np.mean(np.array(apart) < 1e-4)),
        "standard deviation of the answer's log-likelihood over orders, nats": float(by_question.std(1).mean()),
        "log-likelihood with gold at 1, 2, 3, 4, nats": [
            round(float(value[at == i].mean()), 3) for i in range(len(FACTS))
        ],
        "right with gold at 1, 2, 3, 4": [round(float(hit[at == i].mean()), 3) for i in range(len(FACTS))],
        "right": float(hit.mean()),
        "prompts": len(value),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--orders", type=int, default=24, help="of the 24 orders, the first so many")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lm = load_model(given.model)
    orders = list(permutations(range(len(FACTS))))[: given.orders]
    rows = {name: measure(lm, pine, orders) for name, pine in (("unedited", False), ("PINE", True))}
    print(json.dumps(rows, indent=1))
    save_measured(given.out, {"rows": rows}, lm)


if __name__ == "__main__":
    main()
