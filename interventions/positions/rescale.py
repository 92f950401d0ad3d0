"""RoPE rescaled at inference: positions squeezed, the base changed, slow frequencies cut off."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.rotary import Rotation
from headscope.interventions.attention.score_edit import number
from headscope.interventions.positions.position_edit import PositionEdit


@dataclass(frozen=True, eq=False)
class RescaleRoPE(PositionEdit):
    """Give RoPE other frequencies theta, in this order:

    1. ``base`` b: theta_n b0^(2n/d) b^(-2n/d), d dimensions turned and b0 the model's own base; the "adjusted base" of
       Xiong et al. 2023 (arXiv 2309.16039). ``ntk`` k: the base times k^(d / (d - 2)), "NTK-aware" scaling, by which
       the slowest pair turns k times slower and the fastest as before.
    2. ``linear`` k: theta / k, that is position interpolation, m / k for m (Chen et al. 2023, arXiv 2306.15595).
    3. ``truncate`` L tokens: with c = 2 pi / L, theta stays from c on, becomes c / 16 from c / 8 on, and 0 below: the
       truncated basis of Giraffe (Pal et al. 2023, arXiv 2308.10882), with the constants of its code.

    Queries and keys are turned from the model's frequencies to these, those of a cache too: results are those of a
    model that is configured so (``rope_parameters`` linear, another ``rope_theta``), but for rounding, and for queries
    or keys of half precision, which are rounded once more. What differs: YaRN's temperature is not changed, nor does
    anything depend on the length of the text. The authors of 2 and 3 fine-tune; here weights stay as they are, and
    distances that were trained are read as others. SmolLM2-135M loses by it at 1,024 tokens (3.61 nats per token, 4.17
    with linear 2 and 3.63 with ntk 2), and did not gain at 9,216, beyond its 8,192 (3.93, 4.59 and 3.96). Of needles in
    8,000 tokens it recalls 0.51, and 0.63 with ntk 2 (nine trials), 0.09 with linear 2, 0.06 with ntk 8; of three in
    9,216 tokens 0.10 as it is and 0.36 with ntk 2 (``interventions/benchmarks/rope_lengths.py``).

    Args:
        linear: position m becomes m / linear; 1 changes nothing.
        ntk: how much slower the slowest pair turns; 1 changes nothing.
        base: the new base (rope_theta); None: the model's own.
        truncate: L, in tokens; 0: no frequency is cut.
        strength: moves each frequency from the model's to this one, in proportion [OURS].
    """

    _: KW_ONLY
    linear: float = 1.0
    ntk: float = 1.0
    base: float | None = None
    truncate: int = 0

    source: ClassVar[str] = "arXiv 2306.15595, 2309.16039, 2308.10882; abacusai/Long-Context @ 11b61fb"
    unit: ClassVar[str] = "factor on positions"
    nothing: ClassVar[str] = "its layers turn nothing (they have no RoPE)"

    def __post_init__(self) -> None:
        kind = "RescaleRoPE"
        for name in ("linear", "ntk") + (() if self.base is None else ("base",)):
            number(kind, name, getattr(self, name), above=0)
        if isinstance(self.truncate, bool) or not isinstance(self.truncate, int) or self.truncate < 0:
            raise HeadscopeError(f"{kind}: truncate must be tokens, 0 (no cut) or more, not {self.truncate!r}")
        super().__post_init__()

    @property
    def name(self) -> str:  # type: ignore[override]
        """Its kind as one word."""
        return super().name.replace("ro pe", "rope")

    @property
    def neutral(self) -> bool:
        """Every frequency stays."""
        return super().neutral or (self.linear == self.ntk == 1 and self.base is None and not self.truncate)

    def frequencies(self, rotation: Rotation) -> Tensor:
        """The frequencies that a layer with ``rotation`` gets: (pair,) float32.

        Raises:
            HeadscopeError: another base, of a model whose configuration does not say its own.
        """
        old = rotation.frequencies
        pairs = old.shape[0]
        share = torch.arange(pairs, device=old.device, dtype=torch.float64) / max(pairs, 1)
        grown = self.ntk ** (pairs / max(pairs - 1, 1))
        if self.base is not None:
            if rotation.base is None:
                raise HeadscopeError("this model's configuration does not say its RoPE base; use ntk= or linear=")
            grown *= self.base / rotation.base
        new = old.double() * grown**-share / self.linear
        if self.truncate:
            cut = 2 * math.pi / self.truncate
            new = torch.where(new < cut, torch.where(new < cut / 8, 0.0, cut / 16), new)
        return torch.lerp(old.double(), new, self.strength).float()

    def change(self, call: AttentionCall, mine: Tensor) -> AttentionCall:
        """Queries and keys at the new frequencies."""
        old = self.rotation(call)
        if not old.frequencies.shape[0]:
            return call
        self.note(mine)
        new = Rotation(self.frequencies(old))

        def turned(x: Tensor, first: int) -> Tensor:
            at = torch.arange(x.shape[2], device=x.device) + first
            return old.turn(x, new.angles(at) - old.angles(at))

        query = turned(call.query, call.mask.query_offset)
        return self.placed(call, mine, query, turned(call.key, call.mask.key_offset))
