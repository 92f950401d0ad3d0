"""Whether roles of heads hold: from the gates that keep what does not hurt, a role's heads are closed and opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from headscope.interp.heads.causal.gates import Tokens, gated, log_probabilities
from headscope.interp.models.language_model import LanguageModel


def toggle(
    lm: LanguageModel,
    retained: NDArray[np.float64],
    roles: Mapping[str, NDArray[np.float64]],
    count: int,
    pairs: Sequence[Tokens],
) -> dict[str, list[float]]:
    """What a target's log-probability gains where the heads of a role are closed (0) rather than open (1).

    Nam et al. 2025, "Causal Head Gating" (arXiv 2505.13737): from G+, heads are toggled in the descending order of
    their score; the change must be negative for facilitation, about 0 for irrelevance, positive for interference.
    [OURS] Heads are toggled together, the first k of the order for k = 1 to ``count``, all others at their G+.

    Args:
        retained: G+ (layer, head); NaN, a layer without attention, is left alone.
        roles: scores (layer, head) of each role.
        count: heads to toggle, at most as many as have a score.
        pairs: prompts and targets as tokens, rightly others than the gates were fitted to.

    Returns:
        by role, the mean over pairs of log P(closed) - log P(open), in nats a token of the target, for every k.
    """
    base = torch.from_numpy(np.nan_to_num(retained, nan=1.0)).float().to(lm.device)
    found: dict[str, list[float]] = {}
    with gated(lm) as gates, torch.no_grad():
        for role, scores in roles.items():
            order = np.argsort(-scores, axis=None, kind="stable")[: min(count, int((~np.isnan(scores)).sum()))]
            found[role] = []
            for k in range(1, len(order) + 1):
                values = base.flatten().repeat(2, 1)  # (closed or open, layer x head)
                values[:, order[:k].tolist()] = torch.tensor([[0.0], [1.0]], device=lm.device)
                gates.values = values.view(2, *base.shape)
                closed, opened = log_probabilities(lm, gates, pairs).mean(1).tolist()
                found[role].append(closed - opened)
    return found
