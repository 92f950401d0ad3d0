"""A head of two parameters, and its fit to a network's progress measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor

FITTED = ("ila1", "tla2", "tila2")
STARTS = ((0.0, 0.0), (4.0, 4.0), (8.0, 12.0))
LIMITS = ((-10.0, -10.0), (20.0, 60.0))  # of beta and alpha


def induction_head(beta: float, alpha: float, same: Tensor) -> dict[str, float]:
    """The measures of an induction head with nothing but two sharpnesses.

    Layer 1: row i scores the row before it ``beta`` and every other it sees 0. Layer 2: the target's row scores row i
    ``alpha`` times the layer-1 mass that i put on earlier items of the target's class: what stands in i itself was not
    moved there. Softmax in both, causal. The paper stacks a two-parameter head on a deep classifier; its equations were
    not at hand, so that this form is ours [OURS].

    Args:
        beta: of the previous row, over the others.
        alpha: of a row that took up the target's item.
        same: (sequence, pair), where the pair's item is of the target's class.
    """
    count, pairs = same.shape
    rows = 2 * pairs + 1
    score = torch.zeros(rows, rows, dtype=torch.float64)
    score[range(1, rows), range(rows - 1)] = beta
    first = score.masked_fill(torch.ones(rows, rows).triu(1).bool(), -torch.inf).softmax(-1)
    item = torch.zeros(count, rows, dtype=torch.float64)
    item[:, 0:-1:2] = same.double()
    second = (alpha * item @ first.tril(-1).T).softmax(-1)
    labels = second[:, 1::2]
    return {
        "ila1": float(first[range(1, rows, 2), range(0, rows - 1, 2)].mean()),
        "tla2": float(labels.sum(-1).mean()),
        "tila2": float((labels * same).sum(-1).mean()),
    }


def fitted(measures: Sequence[Mapping[str, float]], same: Tensor) -> dict[str, list[float]]:
    """The head of two parameters that is nearest to each row of ``measures`` (``FITTED``), by least squares.

    Returns:
        ``beta``, ``alpha`` and ``error`` (root mean square over the three measures) of each row.
    """
    same = same.cpu()
    found: dict[str, list[float]] = {"beta": [], "alpha": [], "error": []}
    for row in measures:
        wanted = np.array([row[name] for name in FITTED])

        def rest(x: np.ndarray, wanted: np.ndarray = wanted) -> np.ndarray:
            said = induction_head(float(x[0]), float(x[1]), same)
            return np.asarray([said[name] - w for name, w in zip(FITTED, wanted, strict=True)])

        best = min((least_squares(rest, start, bounds=LIMITS) for start in STARTS), key=lambda one: float(one.cost))
        found["beta"].append(float(best.x[0]))
        found["alpha"].append(float(best.x[1]))
        found["error"].append(float(np.sqrt(np.mean(best.fun**2))))
    return found
