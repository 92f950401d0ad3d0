"""How alike the heads of two models are, and which head of one is which of the other."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import xarray as xr
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.base import Text
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import sequences
from headscope.interp.tracing.reference_run import ReferenceRun, keep_attention

Measure = Literal["js", "symmetric_kl", "code_jsd"]
ROWS = 64  # query rows whose patterns are held at a time


def head_distances(
    lm: LanguageModel,
    other: LanguageModel,
    texts: Text | None = None,
    *,
    measure: Measure = "js",
    length: int = 64,
    samples: int = 8,
) -> xr.DataArray:
    """The distance of every head from every head of the same layer of another model or checkpoint, over the same texts.

    Kazemnejad et al. 2023, "The Impact of Positional Encoding on Length Generalization" (arXiv 2305.19466;
    src/analyzers/attention_kl_analyzer.py): the mean over rows i of a divergence between A[i, :i+1] of the two heads.
    Their code compares the pairs of heads with src < tgt alone; here all, (example, layer, head, other), in nats.

    Args:
        lm, other: models with as many layers, which read texts as the same tokens.
        texts, length, samples: as of ``heads.sinks``: what is read, and how much of it.
        measure: "js": Jensen-Shannon, at most log 2 (ours). "symmetric_kl": KL(a || b) + KL(b || a), the code's "kl".
            "code_jsd": what the code calls "jsd", (KL(m || a) + KL(m || b)) / 2 with m their mean, which has no bound.

    Raises:
        HeadscopeError: other layers or tokens, or a measure that there is not.
    """
    _check(measure)
    found, theirs = (sequences.first_windows(one, texts, length, samples) for one in (lm, other))
    if [one.ids.tolist() for one in found] != [one.ids.tolist() for one in theirs]:
        raise HeadscopeError(
            f"{lm.name} and {other.name} read these texts as different tokens, so their rows cannot be compared: give "
            "models with one tokenizer"
        )
    each = [run_distances(*(_read(one, sample.ids) for one in (lm, other)), measure=measure) for sample in found]
    return xr.concat(each, "example").assign_coords(example=np.arange(len(each)))


def run_distances(one: ReferenceRun, other: ReferenceRun, *, measure: Measure = "js") -> xr.DataArray:
    """``head_distances`` of two runs over the same tokens that ``keep_attention`` kept: of two checkpoints of a
    training, of models of the laboratory, of whatever reads no texts.

    (example, layer, head, other), the mean over all rows, in nats. Patterns are made from queries and keys, ``ROWS``
    rows at a time, so that no map is held. That both read the same tokens is for who ran them to see to. Where heads
    of the same number are meant (checkpoints of one training), it is the diagonal over head and other; at more tokens
    than are fit for the mean over all pairs, ``statistics.Divergence`` takes that alone, row by row.

    Raises:
        HeadscopeError: nothing kept, other layers, examples, rows or keys, padding, or a measure that there is not.
    """
    _check(measure)
    places = [[(call.layer, call.mask.query_offset) for call in run.calls] for run in (one, other)]
    if not places[0] or places[0] != places[1]:
        raise HeadscopeError(
            f"the two runs do not have the same layers (of one {len(places[0])} calls were kept, of the other "
            f"{len(places[1])}): compare models that do, and keep one pass of each"
        )
    layers = [_distances(a, b, measure) for a, b in zip(one.calls, other.calls, strict=True)]
    if len(set(layer for layer, _ in places[0])) < len(layers):
        raise HeadscopeError("a layer was kept more than once, in pieces or in several towers: keep one pass of one")
    whole = np.stack(layers, axis=1)
    coordinates = {"example": np.arange(len(whole)), "layer": [layer for layer, _ in places[0]]}
    dims = ("example", "layer", "head", "other")
    return xr.DataArray(whole, coordinates, dims, name=measure, attrs={"unit": "nats"})


def match_heads(distances: xr.DataArray) -> xr.Dataset:
    """Which ``other`` head each head is, and how far it is (``distance``), both (layer, head).

    The heads of a layer are matched one to one so that the sum of their mean distances over examples is least (the
    Hungarian method [OURS]); where the other model has fewer, the heads left over have -1 and NaN. A training run may
    permute the heads of a layer: matched distances are what is to be compared then, beside ``unmatched``, the mean over
    all pairs of the layer (layer,).
    """
    cost = distances.mean("example").transpose("layer", "head", "other").to_numpy()
    match = np.full(cost.shape[:2], -1)
    apart = np.full(cost.shape[:2], np.nan)
    for layer, one in enumerate(cost):
        rows, columns = linear_sum_assignment(np.where(np.isfinite(one), one, 1e9))
        match[layer, rows], apart[layer, rows] = columns, one[rows, columns]
    heads = ("layer", "head")
    variables = {"other": (heads, match), "distance": (heads, apart), "unmatched": ("layer", cost.mean(axis=(1, 2)))}
    return xr.Dataset(variables, {"layer": distances["layer"].to_numpy()})


def _check(measure: str) -> None:
    if measure not in ("js", "symmetric_kl", "code_jsd"):
        raise HeadscopeError(f"measure={measure!r}: choose 'js', 'symmetric_kl' or 'code_jsd'")


def _read(lm: LanguageModel, ids: Tensor) -> ReferenceRun:
    with keep_attention(lm) as kept:
        lm.forward(ids[None], logits=1, cache=False)
    return kept


def _distances(one: AttentionCall, other: AttentionCall, measure: Measure) -> np.ndarray:
    """Every head of a call against every head of the other (example, head, other): the mean over rows, in float64."""
    sizes = [(x.query.shape[0], x.query.shape[2], x.key.shape[2]) for x in (one, other)]
    if sizes[0] != sizes[1] or any(x.mask.start is not None or x.mask.end is not None for x in (one, other)):
        raise HeadscopeError(
            f"layer {one.layer} attends with (example, query, key) of {sizes[0]} and of {sizes[1]}, or with padding: "
            "compare heads that read the same tokens, all of one length"
        )
    rows = one.query.shape[2]
    calls = [x.with_(query=x.query.double(), key=x.key.double(), value=x.value.double()) for x in (one, other)]
    heads = one.query.shape[1], other.query.shape[1]
    total = torch.zeros(one.query.shape[0], *heads, dtype=torch.float64, device=one.query.device)
    for first in range(0, rows, ROWS):
        p, r = (x.pattern(rows=slice(first, min(rows, first + ROWS))) for x in calls)
        for head in range(heads[0]):
            total[:, head] += _divergence(p[:, head, None], r.to(p.device), measure).sum(-1)
    return np.asarray((total / rows).cpu().numpy())


def _divergence(p: Tensor, r: Tensor, measure: Measure) -> Tensor:
    """Of patterns (..., 1, row, key) and (..., head, row, key): (..., head, row)."""
    if measure == "symmetric_kl":
        return _kl(p, r) + _kl(r, p)
    m = (p + r) / 2
    return (_kl(p, m) + _kl(r, m)) / 2 if measure == "js" else (_kl(m, p) + _kl(m, r)) / 2


def _kl(p: Tensor, r: Tensor) -> Tensor:
    """sum p log(p / r), where 0 log 0 is 0; infinite where r has no key that p sees."""
    return (torch.xlogy(p, p) - torch.xlogy(p, r)).sum(-1)
