"""Head sparsity: how few keys hold most of a row's attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.spread.entropy import AttentionEntropy
from headscope.interp.prompts.sequences import Sample
from headscope.interp.statistics import KeysForMass, Statistic


@dataclass(frozen=True, kw_only=True)
class HeadSparsity(AttentionEntropy):
    """Score heads by the fewest keys that hold ``share`` of a row's mass, the mean over the last rows of a text.

    The smallest budget at which a row's own best keys keep 95 % of its attention: MInference (Jiang et al. 2024,
    Section 2) shows that few of 100,000 do. [OURS] as a number a head, on the rows of ``attention_entropy``. Low is
    sparse.

    What it does not show: whether one choice of keys would serve several rows (``headscope discover cache`` measures
    that: its oracle chooses once), nor what a policy that cannot see the weights would keep.

    Args:
        share: of the mass.
    """

    name: ClassVar[str] = "head_sparsity"
    unit: ClassVar[str] = "keys"
    higher_is_better: ClassVar[bool] = False
    source: ClassVar[str] = "arXiv 2407.02490"
    recorded: ClassVar[str] = "keys_for_mass"
    tests: ClassVar[str] = "heads/test_spread.py"
    reproduced: ClassVar[str] = "the count against sorted eager weights; uniform attention in closed form"
    not_reproduced: ClassVar[str] = (
        "100,000 tokens: what it is compared with there is a model's need for keys at length"
    )

    share: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise HeadscopeError(f"share={self.share}: a share of the mass is above 0 and at most 1")

    def statistics(self, samples: Sequence[Sample]) -> list[Statistic]:
        return [KeysForMass(self.share)]
