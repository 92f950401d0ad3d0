"""Direct logit attribution: how much each part of a model writes, straight, towards a next token.

A head's output reaches the residual stream as W_O z, and the residual stream the logits through the final norm and the
unembedding. With the norm's scale frozen at what the whole residual stream made it (the usual linearisation, Elhage et
al. 2021, "A Mathematical Framework for Transformer Circuits"; nostalgebraist's logit lens), logits are a sum over
everything that was written, and a head's share is w . N(W_O z): w the token's unembedding row, N the norm with its
gain and centring, without its shift. A norm after attention (Gemma 2 and 3, OLMo 2) has its scale frozen in the same
way [OURS]. What a head does through later layers is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.progress import track
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites.given import Loadable
from headscope.interp.sites.gradients import frozen
from headscope.interp.sites.unwrap import takes
from headscope.probes.lenses.targets import Token, before_heads, in_stream, target_pairs, unembedded
from headscope.probes.paths.rows import Rows, rows
from headscope.probes.paths.writers import Paths, find_paths

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LogitShares:
    """What a logit (or a difference of two) is the sum of, after each text, in logits before a final softcap or factor.

    Attributes:
        heads: (text, layer, head); NaN where a layer does not attend, or has fewer heads.
        mlps: (text, layer).
        rest: (text, layer): what a layer adds beside heads and MLP: biases, a norm's shift, a mixer without softmax.
        embedding: (text,): what entered the first layer, positions included.
        constant: (text,): the final norm's shift and the unembedding's bias.
        logits: (text,): the model's own, which ``total`` equals up to rounding.
    """

    heads: Array
    mlps: Array
    rest: Array
    embedding: Array
    constant: Array
    logits: Array
    provenance: dict[str, Any] = field(default_factory=dict)
    details: tuple[dict[str, Any], ...] = ()

    @property
    def total(self) -> Array:
        """The sum of all shares (text,)."""
        layers = np.nansum(self.heads, axis=(1, 2)) + (self.mlps + self.rest).sum(1)
        total: Array = layers + self.embedding + self.constant
        return total

    def scores(self) -> HeadScores:
        """The heads' shares as scores; a trial is a text."""
        return HeadScores("logit_attribution", self.heads, self.provenance, None, self.details)

    def to_frame(self) -> pd.DataFrame:
        """A tidy table, one row a text and part: text, part, layer, head (-1: none), share in logits."""
        rows: list[tuple[int, str, int, int, float]] = []
        for text in range(len(self.logits)):
            rows += [(text, "embedding", -1, -1, self.embedding[text]), (text, "constant", -1, -1, self.constant[text])]
            for layer in range(self.mlps.shape[1]):
                own = enumerate(self.heads[text, layer])
                rows += [(text, "head", layer, head, share) for head, share in own if not np.isnan(share)]
                rows += [
                    (text, "mlp", layer, -1, self.mlps[text, layer]),
                    (text, "rest", layer, -1, self.rest[text, layer]),
                ]
        return pd.DataFrame(rows, columns=["text", "part", "layer", "head", "share"])


def logit_attribution(
    model: Loadable,
    texts: Sequence[str],
    targets: Sequence[Token],
    against: Sequence[Token] | None = None,
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> HeadScores:
    """Each head's direct contribution to the logit of ``targets`` (minus that of ``against``) after each text.

    Args:
        model: load_model's result, or what load_model takes.
        texts: prompts, read at their last token.
        targets: one token a text, an id or a string that is exactly one token (mind its leading space).
        against: tokens to compare with, as many; the difference cancels what raises all logits alike.

    Returns:
        Scores in units of logits (before a final softcap or factor); a trial is a text.

    Raises:
        HeadscopeError: a target is not one token; or W_O z reaches the residual stream neither as it is nor through a
            norm (a factor in between, as in Granite), so that heads have no direct share of the logits in this sense.
    """
    return logit_shares(model, texts, targets, against, batch_size=batch_size, progress=progress).scores()


def logit_shares(
    model: Loadable,
    texts: Sequence[str],
    targets: Sequence[Token],
    against: Sequence[Token] | None = None,
    *,
    batch_size: int = 16,
    progress: bool = True,
) -> LogitShares:
    """As ``logit_attribution``, and beside heads every MLP, the embedding and the constants: they sum to the logit.

    Nothing is approximated but what a share means: norms are held at the scale that the whole stream gave them.
    """
    lm = load_model(model)
    pairs = target_pairs(lm, texts, targets, against)
    paths = find_paths(lm)
    parts = [slice(first, first + batch_size) for first in range(0, len(texts), batch_size)]
    with frozen(lm):
        found = [_attribute(lm, paths, texts[p], pairs[p]) for p in track(parts, "logits", enabled=progress)]
    whole = [np.concatenate(each) for each in zip(*found, strict=True)]
    details = tuple({"example": i, "target": ids} for i, ids in enumerate(pairs))
    made = provenance(lm, prompts=texts, against=against is not None) | {"unit": "logits"}
    heads, mlps, rest, embedding, constant, logits = whole
    return LogitShares(heads, mlps, rest, embedding, constant, logits, made, details)


def read_last(lm: LanguageModel, paths: Paths, texts: Sequence[str]) -> Rows:
    """What passed the last token of each text, in one pass (text, 1, ·)."""
    ends = lm.encode(texts)["attention_mask"].sum(dim=1, keepdim=True) - 1
    options = {"use_cache": False} if takes(lm.inner, "use_cache") else {}
    with rows(paths, ends) as found:
        lm(texts, **options)
    return found


def _attribute(
    lm: LanguageModel, paths: Paths, texts: Sequence[str], pairs: Sequence[tuple[int, ...]]
) -> tuple[Array, ...]:
    """The fields of LogitShares of one batch."""
    found = read_last(lm, paths, texts)
    u, bias = unembedded(paths, pairs)
    direction, shift = in_stream(paths, found, u)
    heads = np.full((len(texts), len(paths.layers), max(path.heads for path in paths.layers)), np.nan)
    mlps, rest = np.zeros(heads.shape[:2]), np.zeros(heads.shape[:2])
    for at, path in enumerate(paths.layers):
        if path.mlp is not None:
            mlps[:, at] = _share(found.mlp[path.layer], direction)
        if path.attention is None or path.mlp is None:
            added = found.after(path.layer) - found.before[path.layer].to(found.after(path.layer).device)
            rest[:, at] = _share(added, direction) - mlps[:, at]
        if path.attention is not None:
            back, beside = before_heads(path, found, direction)
            z = found.z[path.layer][:, 0].reshape(back.shape).to(back)
            heads[:, at, : path.heads] = (z * back).sum(-1).double().cpu().numpy()
            rest[:, at] = (
                rest[:, at] - np.nansum(heads[:, at], 1) if path.mlp is None else beside.double().cpu().numpy()
            )
    embedding = _share(found.before[paths.layers[0].layer], direction)
    with torch.no_grad():
        normed: Tensor = paths.norm(found.last[:, 0])
    constant = (shift.cpu() + bias.cpu()).double().numpy()
    logits = (normed.to(u) * u).sum(-1).double().cpu().numpy() + bias.double().cpu().numpy()
    if not np.isfinite(logits).all():
        raise HeadscopeError(f"{lm.name} gives logits that are not numbers: load it with dtype='float32'")
    return heads, mlps, rest, embedding, constant, logits


def _share(x: Tensor, direction: Tensor) -> Array:
    """x . direction of the first row of ``x`` (text, row, d_model): (text,)."""
    found: Array = (x[:, 0].to(direction) * direction).sum(-1).double().cpu().numpy()
    return found
