"""Routing: each layer keeps everything or goes by a sparse policy, by the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headscope.interp.cache.budget import Budget
from headscope.interp.cache.policy import ONE_SEQUENCE, Policy
from headscope.interp.cache.reading import Reading
from headscope.interp.errors import HeadscopeError
from headscope.kernels.kept import Keep, losses
from headscope.kernels.streaming.weights import Tile


@dataclass(frozen=True, kw_only=True)
class Routed(Policy):
    """A layer goes by the policy ``sparse`` where that keeps enough of the prompt's last rows, else it sees everything.

    The choice between whole and sparse attention, layer by layer and text by text, that routers of hybrid attention
    learn (Flux-type routing), without a router to train [OURS]: what is compared is the recall of ``sparse`` in the
    prompt's last ``window`` rows, exact, the mean over them and over the layer's heads, and ``least`` is the threshold.
    A learned router sees hidden states and weighs what the answer needs; this one sees where mass lies. A budget is
    that of the layers that are sparse: how many are, ``kept_whole`` says.

    Args:
        sparse: another policy, with its default settings, by its name.
        least: recall from which a layer is sparse.
        window: last rows of the prompt that decide.
    """

    name: ClassVar[str] = "routed"
    unit: ClassVar[str] = "recall"
    source: ClassVar[str] = "headscope's own"
    refused = {**ONE_SEQUENCE, "edits": "a layer decides by the rows of its own pattern, when it was read"}

    sparse: str = "streaming_llm"
    least: float = 0.9
    window: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        needs = self._policy().needs
        if self.window < 1 or not 0 <= self.least <= 1:
            raise HeadscopeError(f"{self.name}: window is 1 or more, and least from 0 to 1")
        if needs:
            raise HeadscopeError(f"{self.name}: {self.sparse} needs {' and '.join(needs)}, which a route has not")

    def check(self, tokens: Tensor, kept: Tensor) -> None:
        if bool((tokens <= self.window).any()):
            raise HeadscopeError(
                f"{self.name} decides by the last {self.window} rows of a prompt, and one has {int(tokens.min())} "
                "tokens: give longer prompts, or a smaller window (window=...)"
            )
        try:
            self._policy().check(tokens, kept)
        except HeadscopeError as error:
            raise HeadscopeError(
                f"{self.name} runs {self.sparse} as it is, without settings, and there {error}; or name another "
                "(sparse=...)"
            ) from error

    def idle(self, tokens: Tensor, kept: Tensor) -> str:
        return self._policy().idle(tokens, kept)

    def keeps(self, reading: Reading, budgets: Sequence[Budget]) -> list[Keep]:
        for budget in budgets:
            self.check(reading.count, budget.count(reading.count))
        keeps = self._policy().keeps(reading, budgets)
        return [_or_whole(keep, whole) for keep, whole in zip(keeps, self._whole(reading, keeps), strict=True)]

    def kept_whole(self, reading: Reading, budgets: Sequence[Budget]) -> list[Tensor]:
        """Whether the layer sees everything, at each budget: bool (batch,)."""
        return self._whole(reading, self._policy().keeps(reading, budgets))

    def _whole(self, reading: Reading, keeps: Sequence[Keep]) -> list[Tensor]:
        call, last = reading.call, torch.maximum(reading.start, reading.stop - self.window)
        rows = int(last.min()), int(reading.stop.max())
        found = losses(call.inputs(), call.value, keeps, queries=rows)
        at = torch.arange(*rows, device=last.device)
        mine = (at >= last[:, None]) & (at < reading.stop[:, None])
        return [one.recall.mean(1).masked_fill(~mine, torch.nan).nanmean(-1) < self.least for one in found]

    def _policy(self) -> Policy:
        from headscope.interp.cache import POLICIES

        return POLICIES[self.sparse]()


def _or_whole(keep: Keep, whole: Tensor) -> Keep:
    """``keep``, and everything in examples that are ``whole`` (batch,)."""
    if isinstance(keep, Tensor):
        return keep | whole[:, None, None]

    def shown(tile: Tile) -> Tensor:
        return keep(tile) | whole[:, None, None, None]

    return shown
