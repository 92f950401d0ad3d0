"""Attention calibration: heads that rest on later sinks give that mass to what they read."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, get_args

from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interventions.attention.finding import FindingEdit
from headscope.interventions.attention.found import Sets
from headscope.interventions.words import listed
from headscope.kernels.redistribution import Redistribution


@dataclass(frozen=True, eq=False)
class CalibrateAttention(FindingEdit):
    """Lower the weights of sinks in later tokens to ``beta`` of them, and give what they lose to all other keys.

    ACT, Yu et al. 2024, "Unveiling and Harnessing Hidden Attention Sinks" (arXiv 2406.15765; models/llama_modelling_aug
    .py). For each head m_j = sum_i A[i, j] / (T - j), S = {j : m_j > threshold}, and S' is S without its first element,
    wherever that stands. Of every row, A'[j] = beta A[j] for j in S', and what was freed goes to the other keys (the
    spared sink too) in proportion to their weights, so that rows keep their sums.

    As in the code the threshold is absolute (the paper's alpha / N names no alpha) and the divisor is T - j in windowed
    layers too. What differs, because the code is wrong or silent there [OURS]:

    - **Cached decoding.** The code looks for sinks again in every pass, so that with one row none is found as meant,
      and it then sets the first weight to 1. Here (``sets="prompt"``) the sinks of a head are found on the prompt's
      rows and stay; later rows move mass away from them by the same rule, later keys are never sinks, and no weight is
      forced. One pass over prompt and continuation then equals prefill and cached steps. ``sets="context"`` leaves the
      prompt's last row out, so that it may be read apart (as the needle task does, after Wu et al.). ``sets="pass"``,
      the authors' form, takes all rows of each pass, and refuses a pass that continues a cache.
    - A row whose mass is all on S' (NaN in the code) stays as it is.
    - Padding holds no mass and is in no set; T counts an example's own rows.

    The sets look ahead: a row's edit depends on later rows of the prompt. So a prompt in several passes is refused, and
    a log-likelihood of a continuation must be read with the sets of the prompt. Earlier layers are edited when a later
    one's sinks are looked for, as in the code.

    Heads are chosen by ``calibrated_heads``. What it does not show: that a head's later sinks are useless; the paper
    finds heads that calibration harms.

    Args:
        beta: the share that sinks keep; ``strength`` s makes it 1 - s (1 - beta).
        threshold: the mean attention above which a key is a sink (the code's 0.1; it takes 0.15 for MT-Bench).
        sets: ``"prompt"``, ``"context"`` or ``"pass"``: over which rows sinks are found.
    """

    _: KW_ONLY
    beta: float = 0.4
    threshold: float = 0.1
    sets: Sets = "prompt"

    source: ClassVar[str] = "arXiv 2406.15765"
    unit: ClassVar[str] = "share of their weight that later sinks keep"
    refused: ClassVar[dict[str, str]] = {
        "chunked prefill": "sinks are found over all of the prompt",
        "cache": "sets='pass': sinks are found over all rows",
        "cross-attention": "sinks are of one sequence",
        "packed sequences": "sinks are of one sequence",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.beta <= 1.0:
            raise HeadscopeError(f"CalibrateAttention: beta must be between 0 and 1, not {self.beta!r}")
        if not 0.0 < self.threshold < 1.0:
            raise HeadscopeError(f"CalibrateAttention: threshold must be between 0 and 1, not {self.threshold!r}")
        if self.sets not in get_args(Sets):
            raise HeadscopeError(f"CalibrateAttention: sets must be {listed(get_args(Sets))}, not {self.sets!r}")

    @property
    def neutral(self) -> bool:
        """A beta of 1, too, changes nothing."""
        return super().neutral or self.beta == 1

    @property
    def phased(self) -> bool:
        """It has to know where the prompt ends."""
        return super().phased or self.sets != "pass"

    @property
    def nothing(self) -> str:  # type: ignore[override]
        """What the block was like in which no head had a later sink."""
        return (
            f"no head has a sink beyond its first (the largest mean attention of another key was "
            f"{self.found.largest:.3g}, threshold={self.threshold:g}); lower the threshold, or leave it out"
        )

    def edit(self, call: AttentionCall) -> AttentionCall:
        """Find the sinks of a prompt, whichever rows are edited; then calibrate."""
        if self.concerns(call.module, call.layer):
            self.found.look(call, self.threshold, self.sets, first=False)
        return super().edit(call)

    def change(self, call: AttentionCall, mine: Tensor) -> AttentionCall:
        """The weights of later sinks lowered, and the others raised."""
        keys = self.found.recall(call)
        own = keys & mine.any(-1, keepdim=True)
        if not bool(own.any()):
            return call
        self.note(own)
        keep = call.either(mine, 1.0 - self.strength * (1.0 - self.beta), 1.0)
        return call.with_redistribution(Redistribution(keys, keep))
