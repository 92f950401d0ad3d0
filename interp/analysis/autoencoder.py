"""A small convolutional autoencoder of pooled attention maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

CHANNELS = (8, 16)
BATCH = 128
RATE = 3e-3


class Autoencoder(nn.Module):
    """Maps (map, side, side) to codes (map, width) and back: two convolutions of stride 2, a linear layer, and the
    same in reverse, where maps grow by repeating each place."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        few, many = CHANNELS
        half = -(-side // 2)
        self.sizes = (side, half, -(-half // 2))
        self.inward = nn.Sequential(
            nn.Conv2d(1, few, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(few, many, 3, stride=2, padding=1),
            nn.GELU(),
        )
        self.code = nn.Linear(many * self.sizes[2] ** 2, width)
        self.spread = nn.Linear(width, many * self.sizes[2] ** 2)
        self.first = nn.Conv2d(many, few, 3, padding=1)
        self.last = nn.Conv2d(few, 1, 3, padding=1)

    def encode(self, maps: Tensor) -> Tensor:
        """Codes (map, width)."""
        coded: Tensor = self.code(self.inward(maps[:, None]).flatten(1))
        return coded

    def decode(self, codes: Tensor) -> Tensor:
        """Maps (map, side, side)."""
        side, half, small = self.sizes
        x = functional.gelu(self.spread(codes)).view(len(codes), -1, small, small)
        x = functional.gelu(self.first(functional.interpolate(x, size=(half, half))))
        drawn: Tensor = self.last(functional.interpolate(x, size=(side, side)))[:, 0]
        return drawn


def train(maps: Tensor, width: int, steps: int, seed: int) -> Autoencoder:
    """An autoencoder of ``maps`` (map, side, side) after ``steps`` of Adam on the squared error, its rate falling along
    a cosine. Torch's own generator is as it was afterwards."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = Autoencoder(maps.shape[-1], width)
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            batch = maps[torch.randint(len(maps), (min(BATCH, len(maps)),))]
            loss = functional.mse_loss(model.decode(model.encode(batch)), batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.requires_grad_(False).eval()
