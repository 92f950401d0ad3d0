"""What held of Reddy's claims, from the numbers of every seed. The thresholds are ours: the paper shows curves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headscope.interp.laboratory.abrupt_icl.data import Law
from headscope.interp.results.findings import Claim, Numbers

ROSE = 0.3  # of accuracy, below which a curve is not said to have risen
NARROW = 0.5  # of the step at half height: a rise within it is called abrupt
CLOSE = 0.1  # root mean square of masses: the head of two parameters is said to fit
APART = 0.1  # of accuracy: two settings are said to differ


def verdicts(
    numbers: Numbers, bursts: Sequence[int], few: Sequence[int], noises: Sequence[float], base: Law
) -> list[Claim]:
    """The claims that these settings can tell of."""
    rose = bool((numbers["ic_height_base"] >= ROSE).all())
    found = [_abrupt(numbers, rose, base.copies / base.pairs)]
    found += [_before(numbers, name, rose) for name in ("cla", "tla2")]
    found += [_with(numbers, name, rose) for name in ("ila1", "tila2")]
    found += [_fit(numbers)]
    if few:
        least = f"K{min(few)}"
        found += [_above(numbers, "Many classes favour the context (IC)", "ic", "base", least)]
        found += [_above(numbers, "Few classes favour the weights (IW)", "iw", least, "base")]
    if 0 in bursts:
        found += [_above(numbers, "Without burstiness nothing is learned in context (IC)", "ic", "base", "B0")]
    found += [_earlier(numbers, burst, base.burst) for burst in bursts if burst > base.burst]
    plain = f"K{max(few)}" if few else "base"
    for noise in noises:
        says = f"Noise of items ({noise:g}) favours the context (IC)"
        found += [_above(numbers, says, "ic", noisy(few, base.classes, noise), plain)]
    return found


def _abrupt(numbers: Numbers, rose: bool, chance: float) -> Claim:
    width, half, height = (numbers[f"ic_{name}_base"] for name in ("width", "half", "height"))
    ours = f"rises by {spread(height)} over {chance:.2f} (choosing among the context's labels), half of it at step "
    ours += f"{spread(half, 0)}, 20 to 80 % within {spread(width)} of that (asked: <= {NARROW:g})"
    held = rose and bool((width <= NARROW).all())
    return Claim("Accuracy in context jumps", "shown", ours, held)


def _before(numbers: Numbers, name: str, rose: bool) -> Claim:
    mine, jumps = numbers[f"{name}_half_base"], numbers["ic_half_base"]
    ours = f"half its height at step {spread(mine, 0)}, IC at {spread(jumps, 0)}"
    return Claim(f"{name.upper()} rises before the jump", "shown", ours, bool((mine < jumps).all()) if rose else None)


def _with(numbers: Numbers, name: str, rose: bool) -> Claim:
    mine, jumps = numbers[f"{name}_half_base"], numbers["ic_half_base"]
    ours = f"half its height at step {spread(mine, 0)}, IC at {spread(jumps, 0)} (asked: within a fifth)"
    held = bool((np.abs(mine / jumps - 1) <= 0.2).all()) if rose else None
    return Claim(f"{name.upper()} jumps with IC", "shown", ours, held)


def _fit(numbers: Numbers) -> Claim:
    fit, worst = numbers["fit_error_base"], numbers["fit_worst_base"]
    ours = f"root mean square {spread(fit)} (asked: <= {CLOSE:g}), at the worst step {spread(worst)}"
    return Claim("A head of two parameters has the network's measures", "shown", ours, bool((fit <= CLOSE).all()))


def _above(numbers: Numbers, says: str, name: str, more: str, less: str) -> Claim:
    """``name`` under the setting ``more`` is above that under ``less``."""
    a, b = (numbers[f"{name}_{label}"] for label in (more, less))
    ours = f"{more}: {spread(a)}; {less}: {spread(b)} (asked: {APART:g} apart)"
    return Claim(says, "shown", ours, bool((a - b >= APART).all()))


def _earlier(numbers: Numbers, burst: int, base: int) -> Claim:
    a, b = numbers[f"ic_half_B{burst}"], numbers["ic_half_base"]
    ours = f"B {burst}: half its height at step {spread(a, 0)}; B {base}: {spread(b, 0)}"
    return Claim("More copies of the target's class bring the jump earlier", "shown", ours, bool((a < b).all()))


def spread(x: NDArray[np.float64], digits: int = 2) -> str:
    """The smallest and largest of the seeds, or the one value."""
    low, high = (f"{v:.{digits}f}" for v in (np.min(x), np.max(x)))
    return low if low == high else f"{low} to {high}"


def noisy(few: Sequence[int], classes: int, noise: float) -> str:
    """The label of a setting with another noise, at the largest of ``few``."""
    return f"K{max(few, default=classes)}_eps{noise:g}"
