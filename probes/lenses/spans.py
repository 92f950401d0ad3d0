"""Direct logit attribution of a head and a span of the text: what it writes towards a token from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.progress import track
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites.given import Loadable
from headscope.interp.sites.gradients import frozen
from headscope.interp.statistics import SpanOutput
from headscope.interp.statistics.spans import by_example
from headscope.interp.tracing.recording import trace
from headscope.probes.lenses.attribution import read_last
from headscope.probes.lenses.targets import Token, before_heads, in_stream, target_pairs, unembedded
from headscope.probes.paths.writers import Paths, find_paths


@dataclass(frozen=True, eq=False)
class SpanShares:
    """Shares of a logit (or a difference of two) by head and span, in logits before a final softcap or factor.

    Attributes:
        shares: (text, layer, head, span); NaN where a layer does not attend.
        spans: their names, in order.
    """

    shares: NDArray[np.float64]
    spans: tuple[str, ...]
    provenance: dict[str, Any] = field(default_factory=dict)
    details: tuple[dict[str, Any], ...] = ()

    def of(self, span: str) -> HeadScores:
        """The shares of one span as scores of heads; a trial is a text.

        Raises:
            HeadscopeError: there is no span of that name.
        """
        if span not in self.spans:
            raise HeadscopeError(f"no span is called {span!r}: name one of ({', '.join(self.spans)})")
        made = {**self.provenance, "span": span}
        one = self.shares[..., self.spans.index(span)]
        return HeadScores("span_attribution", one, made, None, self.details)

    def to_frame(self) -> pd.DataFrame:
        """A tidy table: text, layer, head, span, share in logits."""
        index = np.indices(self.shares.shape)
        columns = {name: each.ravel() for name, each in zip(("text", "layer", "head"), index, strict=False)}
        frame = pd.DataFrame(columns | {"span": np.array(self.spans)[index[3].ravel()], "share": self.shares.ravel()})
        return frame.dropna(subset="share").reset_index(drop=True)


def span_attribution(
    model: Loadable,
    texts: Sequence[str],
    targets: Sequence[Token],
    against: Sequence[Token] | None = None,
    *,
    spans: Mapping[str, Any],
    batch_size: int = 16,
    progress: bool = True,
) -> SpanShares:
    """``logit_attribution`` of what heads write at a text's last token from each span of keys, sum_j p_ij v_j over it.

    Over spans that part the text, shares sum to the head's. The sum over a span of LOCOS' phi (arXiv 2607.01002), with
    the final norm's scale frozen where that has none. No map is built: memory is that of one row of the pattern.
    What it does not show: what stood in the span before earlier layers moved it to other positions.

    Args:
        spans: by name, as ``SpanOutput`` takes them: one pair for all texts, or one (or a list of pairs) a text;
            positions count from a text's first token.

    Raises:
        HeadscopeError: as ``logit_attribution``; a span for another number of texts.
    """
    lm = load_model(model)
    pairs = target_pairs(lm, texts, targets, against)
    paths = find_paths(lm)
    named = {name: by_example(span) for name, span in spans.items()}
    wrong = [name for name, rows in named.items() if len(rows) not in (1, len(texts))]
    if wrong or not named:
        raise HeadscopeError(f"give spans for all texts or one a text ({len(texts)}): {wrong or 'none were given'}")
    parts = [slice(first, first + batch_size) for first in range(0, len(texts), batch_size)]
    found = []
    with frozen(lm):
        for part in track(parts, "logits by span", enabled=progress):
            here = {name: rows if len(rows) == 1 else rows[part] for name, rows in named.items()}
            found.append(_attribute(lm, paths, texts[part], pairs[part], here))
    details = tuple({"example": i, "target": ids} for i, ids in enumerate(pairs))
    made = provenance(lm, prompts=texts, against=against is not None, spans=named) | {"unit": "logits"}
    return SpanShares(np.concatenate(found), tuple(named), made, details)


def _attribute(
    lm: LanguageModel, paths: Paths, texts: Sequence[str], pairs: Sequence[tuple[int, ...]], spans: Mapping[str, Any]
) -> NDArray[np.float64]:
    """Shares (text, layer, head, span) of one batch."""
    with trace(lm, [SpanOutput(spans)]) as tracer:
        found = read_last(lm, paths, texts)
    record = tracer.record["z_span"].isel(position=0)  # (example, layer, head, span, d_value)
    direction, _ = in_stream(paths, found, unembedded(paths, pairs)[0])
    heads = max(path.heads for path in paths.layers)
    shares = np.full((len(texts), len(paths.layers), heads, len(spans)), np.nan)
    for at, path in enumerate(paths.layers):
        if path.attention is None:
            continue
        back, _ = before_heads(path, found, direction)
        z = torch.from_numpy(record.sel(layer=path.layer).to_numpy())[:, : path.heads].to(back)
        shares[:, at, : path.heads] = (z * back[:, :, None]).sum(-1).double().cpu().numpy()
    return shares
