"""Preplan and anchor: WAAD, FAI and the entropy of tokens along one response, and how their peaks go together."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.anchors.responses import SHARE, future_attention, future_statistics, groups
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.decoding import check_finite
from headscope.interp.prompts.tokens import check_length
from headscope.interp.statistics import Distance, WindowedDistance
from headscope.interp.tracing.recording import trace

PEAKS = 0.2  # of a response's tokens


def rhythm(
    lm: LanguageModel,
    ids: Sequence[int],
    prompt: int,
    *,
    window: int = 10,
    lowest: int = 10,
    highest: int | None = None,
    share: float = SHARE,
) -> xr.Dataset:
    """``waad``, ``fai`` and ``entropy`` of each token of a response (Li et al. 2025, arXiv 2510.13554), in one pass.

    WAAD is of the mean pattern of the local heads and FAI of that of the global ones, which are found in this response
    (``local``, ``global`` (layer, head); [OURS]: the paper leaves open over what heads are sorted). ``entropy`` is that
    of the distribution which the token was drawn from, at temperature 1, in nats: of the row before it.

    Args:
        lm: load_model's result.
        ids: the tokens of a prompt and the response to it.
        prompt: how many of them are the prompt's, at least 1.
        window, lowest, highest: as of ``heads.waad`` and ``heads.fai``.
        share: of all heads, in each of the two groups.

    Raises:
        HeadscopeError: no response, a text longer than the context, or settings out of range.
    """
    check_length(lm, len(ids))
    if not 1 <= prompt < len(ids):
        raise HeadscopeError(
            f"prompt={prompt}: of {len(ids)} tokens at least one is the prompt's and one the response's"
        )
    response = len(ids) - prompt
    asked = [Distance(), WindowedDistance(window), *future_statistics(lowest, highest)]
    with trace(lm, asked) as tracer:
        logits = lm.forward(torch.tensor([list(ids)]), logits=response + 1).logits[0, -response - 1 : -1].float()
    check_finite(lm, logits)
    log_p = logits.log_softmax(-1)
    entropy = -torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0.0).sum(-1)
    record = tracer.record.isel(example=[0])
    span, windowed = (
        record[name][0].transpose("layer", "head", "query").to_numpy()[..., prompt:].astype(np.float64)
        for name in ("distance", "windowed_distance")
    )
    local, far = groups(span.mean(axis=-1), share)
    fai = future_attention(record, prompt, lowest, highest)[0]
    heads = ("layer", "head")
    return xr.Dataset(
        {
            "waad": ("token", windowed[local].mean(axis=0)),
            "fai": ("token", fai[far].mean(axis=0)),
            "entropy": ("token", entropy.double().cpu().numpy()),
            "local": (heads, local),
            "global": (heads, far),
        },
        {"token": np.arange(prompt, len(ids)), "layer": record["layer"].to_numpy()},
    )


def anchors(found: xr.Dataset, *, share: float = PEAKS, within: int = 1) -> dict[str, float]:
    """How the peaks of one response go together: what ``rhythm`` gave, as the numbers of the paper's Table 2.

    ``coupling``: the share of FAI's peaks with a WAAD peak at the same token or at most ``within`` tokens before;
    ``coupling_at_random``: that of all tokens that have an FAI, which is what peaks drawn at random would give.
    ``entropy_at_peaks``: the mean entropy of WAAD's peaks; ``entropy_at_random``: of all tokens of the response.

    The paper does not define a peak: [OURS] the ``share`` of tokens with the largest values, at least one, ties to the
    earlier token. With a fifth and one token before, about 1 - 0.8^2 = 36 % couple at random, as in the paper's table
    (36.87 % and 30.00 % for its two models).

    Raises:
        HeadscopeError: no token has an FAI, or a share out of range.
    """
    waad, fai = (np.asarray(found[name].to_numpy(), dtype=np.float64) for name in ("waad", "fai"))
    has = np.isfinite(fai)
    if not has.any():
        raise HeadscopeError("no token of this response has an FAI: give a longer one, or a nearer horizon")
    plan, anchor = peaks(waad, share), peaks(fai, share)
    near = np.zeros_like(plan)
    for back in range(within + 1):
        near[back:] |= plan[: len(plan) - back]
    entropy = found["entropy"].to_numpy()
    return {
        "coupling": float(near[anchor].mean()),
        "coupling_at_random": float(near[has].mean()),
        "entropy_at_peaks": float(entropy[plan].mean()),
        "entropy_at_random": float(entropy.mean()),
    }


def peaks(values: NDArray[np.float64], share: float = PEAKS) -> NDArray[np.bool_]:
    """Which tokens are peaks: the ``share`` of those that have a value with the largest, at least one.

    Raises:
        HeadscopeError: a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise HeadscopeError(f"share={share}: peaks are more than none and at most all of the tokens")
    count = max(1, int(Fraction(str(share)) * int(np.isfinite(values).sum())))
    found = np.zeros(len(values), dtype=bool)
    found[np.argsort(-values, kind="stable")[:count]] = True  # NaN comes last
    return found
