"""Prompts of a linear regression: examples (x, y) of one draw of coefficients, and an x whose y is asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from headscope.interp.errors import HeadscopeError


@dataclass(frozen=True)
class Prompts:
    """``context`` (prompt, example, features + tasks): x, then y of every task; ``query`` (prompt, features + tasks):
    x, then zeros; ``target`` (prompt, task)."""

    context: Tensor
    query: Tensor
    target: Tensor


@dataclass(frozen=True, kw_only=True)
class Regression:
    """x ~ N(0, I) of ``features`` d numbers; y = beta.x + N(0, ``noise``), the target's y noisy too.

    One task: beta ~ N(0, I / d). ``tasks`` names several by the features (first, last + 1) each sees, and then beta ~
    N(0, I) on these, as the authors' code has it (``MultiTaskLinearReg``: not divided by d). All share x.

    Raises:
        HeadscopeError: a task without features.
    """

    features: int = 5
    noise: float = 0.1
    tasks: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if any(not 0 <= first < end <= self.features for first, end in self.tasks):
            raise HeadscopeError(
                f"each of tasks {self.tasks} is a span (first, last + 1) of the {self.features} features"
            )

    @property
    def outputs(self) -> int:
        """Numbers to predict."""
        return max(1, len(self.tasks))

    def support(self, device: torch.device | str = "cpu") -> Tensor:
        """Which features a task reads, (task, feature), 0 or 1."""
        spans = self.tasks or ((0, self.features),)
        seen = torch.zeros(len(spans), self.features, device=device)
        for task, (first, end) in enumerate(spans):
            seen[task, first:end] = 1
        return seen

    def draw(self, count: int, examples: int, source: Generator) -> Prompts:
        """``count`` prompts of ``examples`` examples."""
        device, d = source.device, self.features

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, generator=source)

        x = normal(count, examples + 1, d)
        size = 1.0 if self.tasks else d**-0.5
        beta = size * normal(count, self.outputs, d) * self.support(device)
        y = x @ beta.transpose(1, 2) + self.noise**0.5 * normal(count, examples + 1, self.outputs)
        context = torch.cat([x[:, :-1], y[:, :-1]], -1)
        query = torch.cat([x[:, -1], torch.zeros_like(y[:, -1])], -1)
        return Prompts(context, query, y[:, -1])
