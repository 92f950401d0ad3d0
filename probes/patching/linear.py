"""What the first order needs of two runs: what passed their sites, and the gradients of the answer there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.stream import PLACES, StreamCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.sites.gradients import frozen
from headscope.probes.patching.activation import UNIT, Direction, numbers
from headscope.probes.patching.pairs import Metric, Pairs, measure
from headscope.probes.patching.places import INPUTS, Place, Places, by_head, layers_of

DROPPED = ("attn_out", "mlp_out")
Gradients = Mapping[Place, Tensor]


class Linear:
    """What the first order needs of some pairs: ``own`` and ``given``, what passed the sites in the run that is patched
    and in the other; ``grads``, the gradient of each pair's metric in the first; ``base`` and ``other`` (example,) the
    metric. One forward pass of the other run, and one forward and one backward a step; a backward more for each layer
    that is ``dropped``."""

    def __init__(
        self,
        lm: LanguageModel,
        pairs: Pairs,
        sites: Sequence[str],
        direction: Direction,
        metric: Metric,
        steps: int = 1,
        recompute: tuple[str, Tensor] | None = None,
        drop: bool = False,
    ) -> None:
        if direction not in UNIT:
            raise HeadscopeError(f"direction is 'denoise' or 'noise', not {direction!r}")
        ids, other_ids = pairs.corrupt, pairs.clean
        if direction == "noise":
            ids, other_ids = other_ids, ids
        entering = ("resid_pre",) if steps > 1 else ()
        other = Places(keep=(*sites, *entering, *(recompute[:1] if recompute else ())))
        self.other = numbers(measure(lm, pairs, other_ids, other, metric))[0]
        self.given, self.grads, first = other.kept, dict[Place, Tensor](), 0
        self.own: dict[Place, Tensor] = {}
        for j in range(steps):
            leaves = Leaves(sites, entering, self.given, recompute if j == 0 else None, drop)
            if j:
                start, end = self.own["resid_pre", first], self.given["resid_pre", first]
                leaves.entering = (first, start + j / steps * (end - start))
            with frozen(lm), torch.enable_grad():
                said = measure(lm, pairs, ids, leaves, metric, grad=True)[0]
                found = torch.autograd.grad(said.sum(), list(leaves.leaves.values()), retain_graph=drop)
            if j == 0:
                self.base, self.own, self.moved = numbers(said), leaves.kept, leaves.moved
                first = min(layers_of(self.own, "resid_pre"), default=0)
                self._held = (said, leaves) if drop else None
            for at, grad in zip(leaves.leaves, found, strict=True):
                self.grads[at] = self.grads[at] + grad / steps if at in self.grads else grad / steps

    def dropped(self) -> Iterator[Gradients]:
        """For every layer, the gradients where none comes through what that layer adds to the stream.

        Raises:
            HeadscopeError: only one layer adds anything.
        """
        assert self._held is not None
        said, leaves = self._held
        if len(leaves.adding) < 2:
            raise HeadscopeError("dropout leaves gradients out a layer at a time, so it needs two layers or more")
        for layer in sorted(leaves.adding):
            leaves.dropping = layer
            found = torch.autograd.grad(said.sum(), list(leaves.leaves.values()), retain_graph=True)
            yield dict(zip(leaves.leaves, found, strict=True))

    def difference(self, site: str, layer: int) -> Tensor:
        """What patching would add."""
        return self.given[site, layer] - self.own[site, layer]


class Leaves(Places):
    """Adds a zero to every value at the sites, whose gradient is the gradient there; moves what enters the model where
    ``entering`` says to; attends once more with the other run's q or k where ``recompute`` says to (``moved``). With
    ``drop``, no gradient comes through what the layer ``dropping`` adds to the stream; ``adding`` are those that do."""

    def __init__(
        self,
        sites: Sequence[str],
        keep: Sequence[str],
        given: Mapping[Place, Tensor],
        recompute: tuple[str, Tensor] | None,
        drop: bool = False,
    ) -> None:
        super().__init__(keep=(*sites, *keep))
        if drop:
            self.streams = tuple(place for place in PLACES if place in (*self.streams, *DROPPED))
        self.drop, self.dropping, self.adding = drop, -1, set[int]()
        self.sites, self.given, self.recompute = frozenset(sites), given, recompute
        self.entering: tuple[int, Tensor] | None = None
        self.leaves: dict[Place, Tensor] = {}
        self.moved: dict[int, Tensor] = {}

    def edit(self, call: AttentionCall) -> AttentionCall:
        """Change q, k and v: every query head has keys and values of its own here."""
        if not self.sites & set(INPUTS):
            return call
        return call.with_(**{INPUTS[site]: self._pass(site, call.layer, x) for site, x in by_head(call).items()})

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        """Keep z' - z of a recomputed pattern, and change z."""
        if self.recompute is not None:
            site, where = self.recompute
            with torch.no_grad():
                new = {INPUTS[name]: x.detach() for name, x in by_head(call).items()}
                held = where.to(z.device)[:, None, :, None]
                new[INPUTS[site]] = torch.where(held, self.given[site, call.layer], new[INPUTS[site]])
                self.moved[call.layer] = call.with_(**new).output() - z.detach()
        return self._pass("z", call.layer, z)

    def stream(self, call: StreamCall) -> Tensor:
        """Put in what enters the first layer, and change the rest."""
        x = call.x
        if call.place == "resid_pre" and self.entering is not None and call.layer == self.entering[0]:
            x = self.entering[1].to(x)
        x = self._pass(call.place, call.layer, x)
        if self.drop and call.place in DROPPED and x.requires_grad:
            self.adding.add(call.layer)
            x.register_hook(lambda slope: torch.zeros_like(slope) if self.dropping == call.layer else None)  # type: ignore[no-untyped-call]
        return x

    def _pass(self, site: str, layer: int, x: Tensor) -> Tensor:
        if site in self.keep:
            self.kept[site, layer] = x.detach()
        if site not in self.sites:
            return x
        self.leaves[site, layer] = leaf = torch.zeros_like(x, requires_grad=True)
        return x + leaf


def dot(moved: Tensor, grad: Tensor, where: Tensor) -> NDArray[np.float64]:
    """Sums over the tokens of ``where`` and dimensions: (example, head), or (example,)."""
    held = where.to(grad.device)[:, None, :, None] if grad.ndim == 4 else where.to(grad.device)[..., None]
    product = torch.where(held, moved.double() * grad.double(), 0)
    found: NDArray[np.float64] = product.sum((-2, -1)).cpu().numpy()
    return found
