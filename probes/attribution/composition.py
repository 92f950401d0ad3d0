"""Composition scores: how much of what one head writes is in what a later head reads, from weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites.given import Loadable
from headscope.interp.sites.sizes import tower_size
from headscope.probes.paths.matrices import HeadMatrices, head_matrices

Kind = Literal["q", "k", "v"]
DRAWS = 32  # random heads that a baseline is the mean of


@dataclass(frozen=True, eq=False)
class CompositionScores:
    """``q``, ``k``, ``v`` (layer, head, later layer, head), in [0, 1]; NaN where the second layer is not later.

    ``baseline``: what heads of random Gaussian matrices of these sizes score, by kind: a score near it says nothing.
    """

    q: NDArray[np.float64]
    k: NDArray[np.float64]
    v: NDArray[np.float64]
    baseline: dict[str, float]
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_frame(self, kind: Kind, top: int = 20) -> pd.DataFrame:
        """The ``top`` pairs of one kind: layer, head (who writes), later_layer, later_head (who reads), score."""
        table = self.of(kind)
        order = np.argsort(-np.nan_to_num(table, nan=-1.0), axis=None, kind="stable")[:top]
        index = np.unravel_index(order, table.shape)
        names = ("layer", "head", "later_layer", "later_head")
        return pd.DataFrame(dict(zip(names, index, strict=True)) | {"score": table[index]}).dropna()

    def of(self, kind: Kind) -> NDArray[np.float64]:
        """One kind's table.

        Raises:
            HeadscopeError: there is no such kind.
        """
        if kind not in ("q", "k", "v"):
            raise HeadscopeError(f"composition is by 'q', 'k' or 'v', not {kind!r}")
        found: NDArray[np.float64] = getattr(self, kind)
        return found


def composition_scores(
    model: Loadable, *, layers: Sequence[int] | None = None, fold: bool = True, seed: int = 0
) -> CompositionScores:
    """Q-, K- and V-composition of every pair of heads of different layers.

    Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits": with W_QK = W_Q^T W_K and W_OV = W_O W_V,
    ||W_QK^T W_OV||_F / (||W_QK||_F ||W_OV||_F) of the later head's W_QK and the earlier one's W_OV for Q,
    ||W_QK W_OV||_F / ... for K, ||W_OV W_OV||_F / ... for V. The d_model x d_model matrices are not built. Heads are
    query heads; those of a group share W_K and W_V. The paper subtracts what random matrices score: ``baseline``.

    What it does not show: that heads compose on any text; anything through MLPs or of rotated positions (RoPE is left
    out: W_QK is that of distance 0). QK-norm's gain is in W_Q and W_K, its scale cancels.

    Args:
        model: load_model's result, or what it takes.
        layers: pairs within these alone (all by default): the time grows with the square of their number.
        fold: put norms' gains (and centring) into the matrices, as they act on a stream of any size; False: the
            weights as they are.
        seed: of the baseline.

    Raises:
        HeadscopeError: heads whose matrices cannot be read (see ``head_matrices``).
    """
    lm = load_model(model)
    tower_size(lm).check_layers(layers or ())
    chosen = head_matrices(lm, fold=fold, layers=layers)
    if len(chosen) < 2:
        raise HeadscopeError("composition_scores: name two layers that attend, or more")
    heads = max(len(one.q) for one in chosen)
    tables = {kind: np.full((lm.info.layers, heads) * 2, np.nan) for kind in ("q", "k", "v")}
    factors = [_Factors.of(one) for one in chosen]
    for i, first in enumerate(factors):
        for later in factors[i + 1 :]:
            for kind, score in _scores(first, later).items():
                at = (first.at.layer, slice(len(first.at.q)), later.at.layer, slice(len(later.at.q)))
                tables[kind][at] = score.cpu().numpy()
    baseline = _baseline(chosen[0], seed)
    made = provenance(lm, seed=seed, fold=fold) | {"unit": "share of norm"}
    return CompositionScores(tables["q"], tables["k"], tables["v"], baseline, made)


@dataclass(frozen=True, eq=False)
class _Factors:
    """A layer in float32, and small factors that keep Frobenius norms: ||W_Q^T X|| = ||rq X||, ||X W_V|| = ||X rv^T||,
    ||W_O X|| = ||ro X||, each (head, d, d); ``qk`` and ``ov`` (head,) are the norms of W_QK and W_OV."""

    at: HeadMatrices
    rq: Tensor
    rk: Tensor
    rv: Tensor
    ro: Tensor
    qk: Tensor
    ov: Tensor

    @classmethod
    def of(cls, one: HeadMatrices) -> _Factors:
        rq, rk, rv, ro = (torch.linalg.qr(x).R for x in (one.q.mT, one.k.mT, one.v.mT, one.o))
        rk, rv = one.each(rk), one.each(rv)
        norms = (torch.linalg.matrix_norm(x) for x in (rq @ rk.mT, ro @ rv.mT))
        small = HeadMatrices(one.layer, one.q.float(), one.k.float(), one.v.float(), one.o.float())
        return cls(small, *(x.float() for x in (rq, rk, rv, ro, *norms)))


def _scores(first: _Factors, later: _Factors) -> dict[str, Tensor]:
    """(head, later head) of each kind."""
    wrote = first.at.o.transpose(0, 1).flatten(1)  # (d_model, head * d_value)
    found = {}
    for kind, left, reads, size in (
        ("q", later.rk, later.at.q, later.qk),
        ("k", later.rq, later.at.k, later.qk),
        ("v", later.ro, later.at.v, later.ov),
    ):
        middle = (reads.flatten(0, 1) @ wrote).view(*reads.shape[:2], len(first.at.o), -1)
        middle = later.at.each(middle.permute(0, 2, 1, 3))  # (later head, head, d, d_value): read of what is written
        norm = torch.linalg.matrix_norm(left[:, None] @ middle @ first.rv.mT[None])
        found[kind] = (norm / (first.ov[None] * size[:, None])).T
    return found


def _baseline(like: HeadMatrices, seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(x: Tensor) -> Tensor:
        return torch.randn(DRAWS, *x.shape[1:], generator=generator, dtype=torch.float64).to(x.device)

    one, other = (
        _Factors.of(HeadMatrices(0, drawn(like.q), drawn(like.k), drawn(like.v), drawn(like.o))) for _ in range(2)
    )
    return {kind: float(score.mean()) for kind, score in _scores(one, other).items()}
