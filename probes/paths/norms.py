"""A norm with its scale held still: what is left of it is linear, so that shares of its input are shares of its output.

A norm is shift + gain * (x or x - mean) * c(x), c one number a vector. Frozen at c of the whole x (the usual
linearisation: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"), it is linear in what x is the
sum of. Gain, shift and centring are read off by feeding it vectors: no name and no formula of a norm is assumed, and a
module that is no such norm is refused where it is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headscope.interp.errors import HeadscopeError

FAR = 1e3  # root mean square of the vectors that are fed: a norm's epsilon is nothing beside its square


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """``module`` as shift + gain * (x - mean, if it ``centres``) * c; ``gain`` and ``shift`` broadcast over vectors."""

    module: nn.Module
    gain: Tensor
    shift: Tensor
    centres: bool

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module, like: Tensor) -> FrozenNorm:
        """Read ``module`` off; ``like`` (..., width) has the type, device and inner shape of what it is given."""
        like = like[:1].detach()
        signs = torch.ones_like(like)
        signs[..., 1::2] = -1.0
        signs = signs - signs.mean(-1, keepdim=True)  # an odd width
        signs = signs * (FAR / signs.float().pow(2).mean(-1, keepdim=True).sqrt()).to(like.dtype)
        flat = torch.full_like(like, FAR)
        shift = _wide(module(torch.zeros_like(like)))
        gain = _wide(module(signs) - module(-signs)) / 2 * FAR / _wide(signs)
        apart = _wide(module(flat) - module(-flat)).abs()
        centres = bool((apart <= 1e-3 * gain.abs().max()).all())
        return cls(module, gain, shift, centres)

    @torch.no_grad()
    def scale(self, x: Tensor) -> Tensor:
        """c (..., 1) of the vectors ``x`` (..., width).

        Raises:
            HeadscopeError: the module does something else to them than a norm does.
        """
        got, pointed = _wide(self.module(x)) - self.shift, self._pointed(_wide(x))
        c = (got * pointed).sum(-1, keepdim=True) / pointed.pow(2).sum(-1, keepdim=True).clamp(min=1e-38)
        room = 16 * torch.finfo(x.dtype).eps  # roundings on the way through a norm, of the largest number
        if not bool(((got - c * pointed).abs() <= room * (got.abs().amax() + self.shift.abs().amax())).all()):
            raise HeadscopeError(
                f"{type(self.module).__name__} is no norm of the form shift + gain * x / size(x), so it cannot be "
                "held still: attributions through it are not defined here; ablate instead"
            )
        return c

    def linear(self, written: Tensor, scale: Tensor) -> Tensor:
        """The shares of the output that vectors ``written`` (..., width) have, as parts of an x of this ``scale``."""
        return self._pointed(_wide(written)) * scale

    def back(self, direction: Tensor, scale: Tensor) -> Tensor:
        """``direction`` (..., width) of the output as one of the input: linear(w) . direction = w . back(direction)."""
        pulled = self.gain.view(-1, self.gain.shape[-1])[0] * _wide(direction)
        return (pulled - pulled.mean(-1, keepdim=True) if self.centres else pulled) * scale

    def _pointed(self, x: Tensor) -> Tensor:
        return self.gain * (x - x.mean(-1, keepdim=True) if self.centres else x)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
