"""A small model that is written on AttentionModule, and an experiment with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import pytest
import torch
from torch import Tensor, nn

from headscope.interp.attention.module import AttentionModule
from headscope.interp.laboratory.experiment import Bench, Experiment
from headscope.interp.laboratory.training import generator
from headscope.interp.laboratory.watch import Watch
from headscope.interp.results.findings import Claim, Numbers
from headscope.kernels.masks import Mask


class Attention(AttentionModule):
    def __init__(self, layer: int) -> None:
        super().__init__(4, layer)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        z: Tensor = self.out(self.attend(q, k, v, Mask.causal(), 1.5).transpose(1, 2).flatten(2))
        return z


class Layer(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.attention = Attention(layer)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(0), Layer(1)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def loss(model: nn.Module, step: int, seed: int = 0) -> Tensor:
    """Say at each token what the last one was."""
    x = torch.randn(4, 6, 16, generator=generator(seed, step))
    return (model(x)[:, 1:] - x[:, :-1]).square().mean()


@dataclass(frozen=True, kw_only=True)
class Copying(Experiment):
    """A model that copies.

    Args:
        steps: of training.
    """

    name: ClassVar[str] = "copying"
    source: ClassVar[str] = "nobody"

    steps: int = 30

    def quick(self) -> Self:
        return replace(self, steps=10)

    def run(self, bench: Bench) -> Mapping[str, float]:
        model = Small()
        watch = Watch(every=5, inputs={"x": torch.ones(1, 6, 16)}, statistics=("entropy",))
        adam = torch.optim.Adam(model.parameters(), 1e-2)
        before = float(loss(model, -1, bench.seed))
        bench.train("copier", model, lambda m, step: loss(m, step, bench.seed), adam, steps=self.steps, watch=watch)
        return {"loss": float(loss(model, -1, bench.seed)), "before": before}

    def claims(self, numbers: Numbers) -> list[Claim]:
        return [
            Claim("it learns", "0", f"{numbers['loss'].mean():.2f}", bool((numbers["loss"] < numbers["before"]).all()))
        ]


@pytest.fixture()
def small() -> Small:
    return Small()
