"""Eigenvalues of heads' circuits: whether a head's OV copies tokens, and whether its QK matches them."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.models.placement import fetched
from headscope.interp.models.unembedding import final_modules
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites.given import Loadable
from headscope.probes.paths.matrices import head_matrices
from headscope.probes.paths.norms import FrozenNorm

Circuit = Literal["ov", "qk"]


def eigen_scores(model: Loadable, circuit: Circuit = "ov", *, tokens: bool = True, fold: bool = True) -> HeadScores:
    """Heads by sum of lambda over sum of |lambda|, in [-1, 1], of the eigenvalues of their OV or QK circuit.

    Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" ("copying matrices"): of W_U W_O W_V W_E,
    eigenvalues that are positive mean that tokens raise their own logits: 1 is a head that copies, -1 one that
    suppresses what it sees. For QK, W_E^T W_Q^T W_K W_E: 1 is a head that attends to the tokens that are at the query.
    They are those of a d_head x d_head matrix. With ``tokens=False`` the circuit is W_O W_V or W_Q^T W_K on the stream.
    The ``copying`` method (``headscope.interp.heads``) counts by forward passes how often a token names itself
    (arXiv 2211.00593): another measure of the same.

    What it does not show: what a head does on text; RoPE is left out (distance 0), earlier layers and MLPs too, so that
    ``tokens=True`` is meant for early layers' QK and for OV circuits that read near-embeddings.

    Args:
        model: load_model's result, or what it takes.
        circuit: "ov" or "qk".
        tokens: between the vocabulary's embedding and unembedding (QK: the embedding on both sides).
        fold: put norms' gains into the matrices, the final norm's too.

    Returns:
        Scores of one trial: they come from weights, and have no interval.
    """
    lm = load_model(model)
    if circuit not in ("ov", "qk"):
        raise HeadscopeError(f"eigen_scores: circuit is 'ov' or 'qk', not {circuit!r}")
    between = _vocabulary(lm, circuit, fold) if tokens else None
    scores = np.full((1, lm.info.layers, lm.info.heads), np.nan)
    for one in head_matrices(lm, fold=fold):
        # the eigenvalues of A B are those of B A, beside zeros
        first, last = (one.each(one.v), one.o) if circuit == "ov" else (one.each(one.k), one.q.mT)
        values = torch.linalg.eigvals(first @ last if between is None else first @ between.to(first) @ last)
        share = values.real.sum(-1) / values.abs().sum(-1).clamp(min=1e-300)
        scores[0, one.layer, : len(share)] = share.cpu().numpy()
    made = provenance(lm, circuit=circuit, tokens=tokens, fold=fold) | {"unit": "share of eigenvalues"}
    return HeadScores(f"{circuit}_eigen", scores, made)


def _vocabulary(lm: LanguageModel, circuit: Circuit, fold: bool) -> Tensor:
    """sum over tokens of e u^T (d_model, d_model), e the embedding, u the unembedding (QK: the embedding)."""
    norm, head = final_modules(lm)
    embedding: Any = lm.inner.get_input_embeddings()
    with fetched(embedding):
        e = embedding.weight.detach().float()
    if circuit == "qk":
        alike: Tensor = (e.T @ e).double()
        return alike
    with fetched(head):
        weight: Any = head.weight
        u = weight.detach().float().to(e.device)
    if e.shape[0] != u.shape[0]:
        raise HeadscopeError(f"{lm.name} embeds {e.shape[0]} tokens and names {u.shape[0]}: use tokens=False")
    if fold:
        frozen = FrozenNorm.of(norm, u[None, :1].to(lm.model.dtype))
        u = frozen.back(u[None], u.new_ones(1))[0]
    found: Tensor = (e.T @ u).double()
    return found
