"""What held of the paper's claims, from the numbers of every seed. Thresholds are ours: the paper shows pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headscope.interp.results.findings import Claim, Numbers

PATTERN = 0.9  # of squares: a matrix is said to have the pattern
NEAR = 0.1  # of a size: two numbers are said to be alike


def verdicts(
    numbers: Numbers, heads: Sequence[int], two_task_heads: Sequence[int], examples: int, lengths: Sequence[int]
) -> list[Claim]:
    """The claims that these heads and lengths can tell of."""
    several = [h for h in heads if h > 1]
    found = [
        _all(numbers, "KQ is a multiple of the identity on x", "kq_diagonal", heads, above=PATTERN),
        _all(numbers, "OV reads only the last entry (y)", "ov_last", heads, above=PATTERN),
    ]
    if several:
        found += [
            _all(numbers, "The heads' mu sum to zero: |sum| / sum |.|", "zero_sum", several, under=NEAR),
            _all(numbers, "The heads' |omega| are alike: deviation / mean", "homogeneous", several, under=NEAR),
            _all(numbers, "Some omega are positive, some negative", "both_signs", several, above=1.0),
            _all(
                numbers,
                "Predictions are debiased gradient descent's: share of squares beside it",
                "beside_debiased",
                several,
                under=NEAR,
            ),
        ]
    found += [_minimum(numbers, h, examples) for h in heads if h < 3]
    if 1 in heads and several:
        found += [_order(numbers, several, examples)]
    return found + _longer(numbers, several, examples, lengths) + _two_tasks(numbers, two_task_heads)


def _all(
    numbers: Numbers, says: str, name: str, heads: Sequence[int], *, above: float = -np.inf, under: float = np.inf
) -> Claim:
    """``name`` of every number of heads lies on the right side, at every seed."""
    each = {h: numbers[f"{name}_h{h}"] for h in heads}
    held = all(bool(((x >= above) & (x <= under)).all()) for x in each.values())
    bound = f">= {above:g}" if np.isfinite(above) else f"<= {under:g}"
    return Claim(says, "shown", f"{_heads(each)} (asked: {bound})", held)


def _minimum(numbers: Numbers, heads: int, examples: int) -> Claim:
    """The trained loss beside the smallest approximate loss."""
    lowest, loss = numbers[f"approximate_h{heads}"], numbers[f"loss_h{heads}_L{examples}"]
    says = f"The loss of {heads} head{'s' if heads > 1 else ''} is the minimum of the approximate loss, within a tenth"
    paper = {1: ".372 (0.35 to 0.48 printed)", 2: ".221 (0.20 to 0.28 printed)"}[heads]
    there = _spread(numbers[f"softmax_there_h{heads}"])
    ours = f"minimum {lowest.mean():.3f} (softmax itself at these weights: {there}), trained {_spread(loss)}"
    return Claim(says, paper, ours, bool((np.abs(loss / lowest - 1) <= NEAR).all()))


def _order(numbers: Numbers, several: Sequence[int], examples: int) -> Claim:
    one = numbers[f"loss_h1_L{examples}"]
    losses = {h: numbers[f"loss_h{h}_L{examples}"] for h in several}
    beside = ", ".join(f"{name} {_spread(numbers[f'{name}_L{examples}'])}" for name in ("descent", "debiased", "bayes"))
    held = all(bool((x <= (1 - NEAR) * one).all()) for x in losses.values())
    return Claim(
        "Several heads do better than one, by a tenth at least",
        "0.43 against 0.22",
        f"1: {_spread(one)}; {_heads(losses)}; {beside}",
        held,
    )


def _longer(numbers: Numbers, several: Sequence[int], examples: int, lengths: Sequence[int]) -> list[Claim]:
    most = max(lengths, default=examples)
    if most <= examples or not several:
        return []
    before, after = ({h: numbers[f"loss_h{h}_L{length}"] for h in several} for length in (examples, most))
    says = f"Softmax heads do no worse on prompts of {most} examples than of {examples}; linear attention does"
    linear = numbers[f"linear_attention_L{most}"], numbers[f"linear_attention_L{examples}"]
    held = all(bool((after[h] <= before[h]).all()) for h in several) and bool((linear[0] > linear[1]).all())
    ours = f"{_heads(before)} to {_heads(after)}; linear attention {_spread(linear[1])} to {_spread(linear[0])}"
    return [Claim(says, "shown", ours, held)]


def _two_tasks(numbers: Numbers, heads: Sequence[int]) -> list[Claim]:
    """With two tasks: fewer than four heads share, more do not (the authors' notebook)."""
    found = []
    for h in heads:
        shares, rest = numbers[f"two_tasks_shared_heads_h{h}"], numbers[f"two_tasks_on_one_task_h{h}"]
        ours = f"{_spread(shares, 0)} heads shared; {_spread(rest)} of a head on its main task"
        if 2 < h < 4:
            found.append(
                Claim(
                    f"Two tasks, {h} heads: some head serves both (superposition)",
                    "shown",
                    ours,
                    bool((shares > 0).all()),
                )
            )
        elif h > 4:
            found.append(
                Claim(f"Two tasks, {h} heads: every head serves one", "shown", ours, bool((shares == 0).all()))
            )
    return found


def _heads(each: dict[int, np.ndarray]) -> str:
    return ", ".join(f"{h}: {_spread(x)}" for h, x in each.items())


def _spread(x: np.ndarray, digits: int = 3) -> str:
    low, high = (f"{v:.{digits}f}" for v in (x.min(), x.max()))
    return low if low == high else f"{low} to {high}"
