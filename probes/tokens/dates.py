"""Pairs of dates in two formats: the same day, or another."""

from __future__ import annotations

from datetime import date

import numpy as np

from headscope.interp.errors import HeadscopeError
from headscope.probes.linear.dataset import Labelled

PERIODS = {"past": (1600, 2010), "present": (2010, 2025), "future": (2025, 2600)}  # first year, year after the last
PROMPT = (
    "You compare dates and answer with yes or no.\nQuestion: Do {first} and {second} name the same date?\n"
    "Answer: Let's think step by step."
)


def date_pairs(period: str = "past", count: int = 200, *, prompt: str = PROMPT, seed: int = 0) -> Labelled:
    """``count`` prompts about a date as 20250312 and one as 12/03/2025: label 1 where they are the same day.

    The probing set of Bhatia, Peyrard & Zhao 2025 (arXiv 2505.16088): 1,000 pairs a period there, half of them equal,
    formats Ymd and d/m/Y, behind a fixed system prompt and a cue to think. Their prompt is not at hand: ``prompt`` is
    ours, and another date is any other day of the period [OURS]. Every first date comes twice, once with each label,
    and both are one group, so that the first date alone says nothing.

    Args:
        period: ``past`` (1600 to 2009), ``present`` (2010 to 2024) or ``future`` (2025 to 2599).
        count: an even number of prompts.
        prompt: with ``{first}`` and ``{second}``.

    Raises:
        HeadscopeError: no such period, or an odd or small number.
    """
    if period not in PERIODS:
        raise HeadscopeError(f"no period {period!r}: name one of {', '.join(PERIODS)}")
    if count < 10 or count % 2:
        raise HeadscopeError(f"count={count}: give an even number of prompts, 10 or more")
    years, rng = PERIODS[period], np.random.default_rng(seed)
    low, high = date(years[0], 1, 1).toordinal(), date(years[1], 1, 1).toordinal()
    days = rng.choice(high - low, count // 2, replace=False) + low
    texts, labels, groups = [], [], []
    for day in days.tolist():
        other = low + (day - low + int(rng.integers(1, high - low))) % (high - low)
        for shown, label in ((day, 1), (other, 0)):
            first, second = date.fromordinal(day), date.fromordinal(shown)
            texts.append(prompt.format(first=f"{first:%Y%m%d}", second=f"{second:%d/%m/%Y}"))
            labels.append(label)
            groups.append(str(day))
    return Labelled(texts, np.array(labels), groups, f"dates_{period}", "both are the same day")
