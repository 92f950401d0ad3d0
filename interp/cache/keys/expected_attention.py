"""Expected attention: what queries yet to come would look at, if they are like those of the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.cache.policy import KeyPolicy
from headscope.interp.cache.reading import Reading
from headscope.interp.errors import HeadscopeError


@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(KeyPolicy):
    """The expected weight of a key for queries drawn from a Gaussian fitted to the prompt's, times its value's norm.

    kvpress's ``expected_attention_press.py:55-165`` (@ 8bb29b9c). Of the queries before RoPE, those of the first
    ``sink`` tokens left out: mean mu and covariance S (divided by n). R is the mean rotation of the next
    ``ahead_tokens`` positions, mu' = R mu, S' = R S R^T, and

        z_h[k] = scale mu'.K_k + scale^2 K_k^T S' K_k / 2,

    a softmax over the keys but the sinks, the mean over the query heads of a key head, times |V_k|. (exp z is the mean
    of exp(scale q.k) over a Gaussian q.) Sinks are always kept.

    Queries before RoPE are those of the call, turned back. A model without rotary position embedding is refused.

    Args:
        ahead_tokens: positions over which the rotation is averaged.
        covariance: use S; without it, the mean alone.
        values: multiply by |V_k| + ``epsilon``.
        epsilon: added before the multiplication by |V_k|, to the expected weight.
        sink: first tokens that are kept, and left out of the statistics.
    """

    name: ClassVar[str] = "expected_attention"
    unit: ClassVar[str] = "mass times activation"
    source: ClassVar[str] = "arXiv 2510.00636; NVIDIA/kvpress @ 8bb29b9c"
    needs: ClassVar[tuple[str, ...]] = ("rotation",)

    sink: int = 4
    ahead_tokens: int = 512
    covariance: bool = True
    values: bool = True
    epsilon: float = 0.0

    def check(self, tokens: Tensor, kept: Tensor) -> None:
        if bool((tokens <= self.sink).any()):
            raise HeadscopeError(f"{self.name} needs a prompt of more than {self.sink} tokens")
        super().check(tokens, kept)

    def scores(self, reading: Reading) -> Tensor:
        call, key = reading.call, reading.scored
        each = [self._future(reading, b) for b in range(key.shape[0])]
        mean, spread = (torch.stack(x) for x in zip(*each, strict=True))
        mean = mean.view(*key.shape[:2], -1, key.shape[3])
        spread = spread.view(*key.shape[:2], -1, key.shape[3], key.shape[3])
        z = torch.einsum("bkgd,bktd->bkgt", mean, key) * call.scale
        if self.covariance:
            quadratic = torch.stack(
                [((key @ spread[:, :, g]) * key).sum(-1) for g in range(spread.shape[2])], dim=2
            )  # (batch, kv_head, group, key), one head of a group at a time
            z = z + quadratic * call.scale**2 / 2
        counted = reading.keys & (reading.at >= self.sink)
        weight = z.masked_fill(~counted[:, None, None], -torch.inf).softmax(-1).mean(2)
        if self.values:
            weight = (weight + self.epsilon) * call.value.to(key.dtype).norm(dim=-1)
        return weight

    def _future(self, reading: Reading, example: int) -> tuple[Tensor, Tensor]:
        """Mean (head, d) and covariance (head, d, d) of one example's queries at the positions after its prompt."""
        rotation = reading.rotation
        if rotation is None:
            raise HeadscopeError(f"{self.name} turns queries to later positions and was not told how the layer does")
        first, stop = int(reading.start[example]) + self.sink, int(reading.stop[example])
        query = reading.call.query[example, :, first:stop]
        at = torch.arange(first, stop, device=query.device)
        query = rotation.turn(query, -rotation.angles(at))
        mean = query.mean(1)
        apart = query - mean[:, None]
        spread = apart.transpose(1, 2) @ apart / (stop - first)
        ahead = rotation.angles(torch.arange(stop, stop + self.ahead_tokens, device=query.device))
        unit = torch.eye(query.shape[-1], dtype=query.dtype, device=query.device)
        turn = torch.stack([rotation.turn(unit, angle) for angle in ahead]).mean(0)  # row i: where dimension i goes
        return mean @ turn, turn.T @ spread @ turn
