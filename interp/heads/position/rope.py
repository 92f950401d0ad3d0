"""How often RoPE fails to tell near from far, or one token from another: rates of single heads, and how it decays.

A query q and a key k, both before RoPE, score s(D) = scale * (Re sum_n c_n e^(i D theta_n) + rest) at distance D: c_n
is q's pair n of dimensions times the conjugate of k's, as complex numbers, and ``rest`` what the dimensions that do not
turn give. So any pair of a text can be asked what it would score at any other distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Text
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import sequences
from headscope.interp.sites.given import Loadable
from headscope.interp.sites.rotary import Rotation, rotations
from headscope.interp.tracing.reference_run import keep_attention

RATES = {
    "locality": "the nearer of two distances scores less",
    "relevance": "of two keys, another scores more at another distance",
    "position_collision": "another distance scores the same",
    "token_collision": "another key scores the same",
}
HELD = 1 << 22  # scores held at a time


@dataclass(frozen=True, kw_only=True)
class RopeFailures:
    """What is drawn, and when two scores are the same: Du et al. 2026 (arXiv 2605.15514), as far as it can be read.

    At a context of L tokens, over draws of a query, of keys and of distances in 0 .. L:

        locality            Pr[s(q, k, D1) < s(q, k, D2)], D2 uniform in 1 .. L and D1 in 0 .. D2 / ``far``
        relevance           Pr[sign(s(q, k, D) - s(q, k', D)) != sign(s(q, k, D') - s(q, k', D'))]
        position_collision  the share of distances D that have another D' with |s(q, k, D) - s(q, k, D')| <= eps
        token_collision     the share of keys k that have another k' with |s(q, k, D) - s(q, k', D)| <= eps

    The paper proves that the first two tend to 1/2 as L grows, whatever q and k are, and that a larger base tells
    tokens apart better and positions worse. Only its abstract was at hand: that distances are uniform, ``far``,
    ``eps`` in scores after the model's scale, and the pool of keys are [OURS]. Collisions depend on the size of the
    scores, and those of tokens on the pool: the more keys, the more of them.

    Args:
        draws: of a query, keys and distances, each head and context.
        curves: of those draws, over so many a position collision is counted, which looks at every distance.
        far: how many times farther the second distance is at least.
        eps: scores no farther apart are the same (0.01: weights within 1 %).
        pool: keys that a token collision is looked for among.
        base: another base of the rotation, theta_n = base^(-2n/d); None: the model's own.
        seed: of the draws.
    """

    draws: int = 256
    curves: int = 16
    far: float = 2.0
    eps: float = 0.01
    pool: int = 128
    base: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.draws, self.curves) < 1 or self.pool < 2 or self.far < 1 or self.eps < 0:
            raise HeadscopeError("RopeFailures: draws, curves and far from 1 on, pool from 2 and eps from 0")
        if self.base is not None and self.base <= 1:
            raise HeadscopeError(f"RopeFailures: a base is above 1, not {self.base}")


def rope_failures(
    lm: Loadable,
    texts: Text | None = None,
    *,
    contexts: Sequence[int] = (64, 512, 4096, 32768),
    settings: RopeFailures | None = None,
    length: int = 256,
    samples: int = 2,
) -> xr.Dataset:
    """The rates of every head at contexts of so many tokens: (layer, head, context), over queries and keys of texts.

    Queries and keys are those of ``texts``, turned back; only the distance between them is varied, so that a context
    may be longer than any text, and than what the model was trained for. NaN in layers without RoPE. Beside them
    ``undecided`` (rate, context): the share of heads whose locality or relevance rate lies in [0.4, 0.6]. A rate of n
    draws has a standard error of up to 1 / (2 sqrt(n)).

    What it does not show: what the model does. Softmax over many keys, several heads and later layers may make up for
    a head that fails, and a softcap or a sliding window is left out.

    Args:
        lm: load_model's result, or what load_model takes.
        texts, length, samples: as of ``heads.sinks``: what is read, and how much of it.
        contexts: the L above.

    Raises:
        HeadscopeError: no RoPE, or contexts shorter than 2.
    """
    lm, asked = load_model(lm), settings or RopeFailures()
    turned, calls = rotations(lm, None), _calls(lm, texts, length, samples)
    contexts = [int(n) for n in contexts]
    shape = lm.info.layers, lm.info.heads, len(contexts)
    found = {name: np.full(shape, np.nan) for name in RATES}
    for layer, own in calls.items():
        rotation = turned.get((own[0].module, layer))
        if rotation is None or not len(rotation.frequencies):
            continue
        q, k = (torch.cat([_before(call, x, rotation) for call in own], 1) for x in ("query", "key"))
        k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)
        for i, context in enumerate(contexts):
            rates = failure_rates(q, k, rotation, context, settings=asked, scale=own[0].scale)
            for name, values in rates.items():
                found[name][layer, :, i] = values.cpu().numpy()
    dims = ("layer", "head", "context")
    decided = [(found[name] >= 0.4) & (found[name] <= 0.6) for name in ("locality", "relevance")]
    known = [~np.isnan(found[name]) for name in ("locality", "relevance")]
    undecided = np.stack([d.sum((0, 1)) / k.sum((0, 1)) for d, k in zip(decided, known, strict=True)])
    variables = {name: (dims, values, {"unit": "rate", "of": RATES[name]}) for name, values in found.items()}
    return xr.Dataset(
        {**variables, "undecided": (("rate", "context"), undecided, {"unit": "share of heads"})},
        {"context": contexts, "rate": ["locality", "relevance"]},
    )


def failure_rates(
    q: Tensor,
    k: Tensor,
    rotation: Rotation,
    context: int,
    *,
    settings: RopeFailures | None = None,
    scale: float | None = None,
) -> dict[str, Tensor]:
    """The rates (head,) of ``RATES`` for queries and keys (head, n, d) before RoPE, at a context of so many tokens.

    ``scale`` is that of the scores (None: 1 / sqrt(d)). Any q and k will do, random ones too.

    Raises:
        HeadscopeError: a context shorter than 2, or fewer than two keys.
    """
    asked = settings or RopeFailures()
    if context < 2 or k.shape[1] < 2:
        raise HeadscopeError(f"a context of {context} tokens and {k.shape[1]} keys: rates need at least two of each")
    rotation = rotation if asked.base is None else _with_base(rotation, asked.base)
    made = torch.Generator().manual_seed(asked.seed)
    n = asked.draws

    def drawn(high: Tensor | int) -> Tensor:
        """Integers below ``high``, one a draw."""
        return (torch.rand(n, generator=made, dtype=torch.float64) * high).long().to(q.device)

    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries, one = q[:, drawn(q.shape[1])], drawn(k.shape[1])
    other = (one + 1 + drawn(k.shape[1] - 1)) % k.shape[1]
    pairs = [_Pairs.of(queries, k[:, which], rotation, scale) for which in (one, other)]
    beyond = 1 + drawn(context)
    near = drawn((beyond.cpu() / asked.far).floor().long() + 1)
    local = pairs[0].at(near) < pairs[0].at(beyond)
    there, elsewhere = drawn(context + 1), drawn(context + 1)
    order = [torch.sign(pairs[0].at(D) - pairs[1].at(D)) for D in (there, elsewhere)]
    pool = k[:, torch.randperm(k.shape[1], generator=made)[: asked.pool].to(k.device)]
    return {
        "locality": local.double().mean(-1),
        "relevance": (order[0] != order[1]).double().mean(-1),
        "position_collision": _shared_positions(pairs[0], context, asked),
        "token_collision": _shared_tokens(queries, pool, rotation, there, scale, asked.eps),
    }


def rope_decay(lm: Loadable, distances: Sequence[int], *, base: float | None = None) -> xr.Dataset:
    """How each layer's RoPE decays with distance, whatever queries and keys are: ``cosine`` and ``bound``, (layer,
    distance); NaN in layers without RoPE.

    ``cosine``: the mean of cos(D theta_n) over the pairs that turn, the score of a vector with itself, each pair of
    length 1, over that at distance 0. ``bound``: the mean over n of |sum_(m < n) e^(i D theta_m)|, over that at
    distance 0, which bounds the size of any score up to a factor of q and k (Su et al. 2021, arXiv 2104.09864, Section
    3.4.3). It falls, and not to 0 and not steadily; what a model's own heads do with it is ``distance_profile``.

    Args:
        lm: load_model's result, or what load_model takes.
        distances: in tokens.
        base: as of ``RopeFailures``.
    """
    lm, at = load_model(lm), torch.as_tensor(list(distances))
    found = {name: np.full((lm.info.layers, len(at)), np.nan) for name in ("cosine", "bound")}
    for (_, layer), rotation in rotations(lm, None).items():
        if not len(rotation.frequencies):
            continue
        turned = rotation if base is None else _with_base(rotation, base)
        angles = turned.angles(at.to(turned.frequencies.device))
        sums = torch.polar(torch.ones_like(angles), angles).cumsum(-1).abs()
        found["cosine"][layer] = angles.cos().mean(-1).cpu().numpy()
        found["bound"][layer] = (sums.mean(-1) * 2 / (angles.shape[-1] + 1)).cpu().numpy()
    return xr.Dataset({name: (("layer", "distance"), values) for name, values in found.items()}, {"distance": at})


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Queries and keys, one of each a draw: ``product`` (head, draw, pair) complex, ``rest`` (head, draw)."""

    product: Tensor
    rest: Tensor
    rotation: Rotation

    @classmethod
    def of(cls, q: Tensor, k: Tensor, rotation: Rotation, scale: float) -> _Pairs:
        """From vectors (head, draw, d)."""
        (a, b), (c, d) = _parts(q.double(), rotation), _parts(k.double(), rotation)
        return cls(scale * a * c.conj(), scale * (b * d).sum(-1), rotation)

    def at(self, distance: Tensor) -> Tensor:
        """Scores (head, draw) at distances (draw,)."""
        angles = self.rotation.angles(distance)
        turned: Tensor = (self.product * torch.polar(torch.ones_like(angles), angles)).sum(-1).real
        return turned + self.rest


def _parts(x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """The dimensions that turn as complex numbers (..., pair), and the others (..., d - 2 * pair)."""
    pairs, first = len(rotation.frequencies), rotation.first
    part = x[..., first : first + 2 * pairs]
    a, b = (part[..., ::2], part[..., 1::2]) if rotation.interleaved else (part[..., :pairs], part[..., pairs:])
    return torch.complex(a, b), torch.cat([x[..., :first], x[..., first + 2 * pairs :]], -1)


def _shared_positions(pairs: _Pairs, context: int, asked: RopeFailures) -> Tensor:
    """The share of distances with another one of the same score (head,): a mean over the curves, a few at a time."""
    at = torch.arange(context + 1, device=pairs.product.device)
    angles = pairs.rotation.angles(at)
    wave = torch.polar(torch.ones_like(angles), angles).T  # (pair, distance)
    products = pairs.product[:, : asked.curves]
    step = max(1, HELD // (len(products) * len(at)))
    parts = [products[:, first : first + step] for first in range(0, products.shape[1], step)]
    return torch.cat([_crowded((part @ wave).real, asked.eps) for part in parts], 1).mean(-1)


def _shared_tokens(q: Tensor, pool: Tensor, rotation: Rotation, at: Tensor, scale: float, eps: float) -> Tensor:
    """The share of the pool's keys with another one of the same score (head,): a mean over queries and distances."""
    turned = rotation.turn(q.double(), rotation.angles(at))  # a query at distance D of a key at 0
    scores = scale * turned @ pool.double().transpose(-1, -2)
    return _crowded(scores, eps).mean(-1)


def _crowded(scores: Tensor, eps: float) -> Tensor:
    """The share of scores (..., n) that another one is within ``eps`` of: (...)."""
    near = scores.sort(-1).values.diff(dim=-1) <= eps
    edge = torch.zeros_like(near[..., :1])
    return (torch.cat([edge, near], -1) | torch.cat([near, edge], -1)).double().mean(-1)


def _with_base(rotation: Rotation, base: float) -> Rotation:
    count = len(rotation.frequencies)
    n = torch.arange(count, dtype=torch.float64, device=rotation.frequencies.device)
    return replace(rotation, frequencies=(base ** (-n / count)).float(), base=base)


def _calls(lm: LanguageModel, texts: Text | None, length: int, samples: int) -> dict[int, list[AttentionCall]]:
    """Each layer's calls, one a text."""
    found: dict[int, list[AttentionCall]] = {}
    for sample in sequences.first_windows(lm, texts, length, samples):
        with keep_attention(lm) as kept:
            lm.forward(sample.ids[None], logits=1, cache=False)
        for call in kept.calls:
            found.setdefault(call.layer, []).append(call)
    return found


def _before(call: AttentionCall, name: str, rotation: Rotation) -> Tensor:
    """Queries or keys (head, token, d) of a call of one text, turned back by their positions."""
    x: Tensor = getattr(call, name)[0]
    return rotation.turn(x.double(), -rotation.angles(torch.arange(x.shape[1], device=x.device)))
