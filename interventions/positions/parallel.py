"""Parallel contexts: several contexts are read side by side, without seeing one another."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interventions.positions.documents import Documents, listed
from headscope.interventions.positions.position_edit import BEHIND_WINDOWS, PositionEdit, require_causal

MODES = tuple(size + place for size in "MAH" for place in "ELR") + ("order",)


@dataclass(frozen=True, eq=False)
class ParallelContexts(PositionEdit):
    """Parallel context encoding: a token of a context sees what stands before all contexts, and its own context.

    With P tokens before them, contexts of n_1 .. n_m tokens take up the positions P .. P + M; what comes after them
    sees all of them and goes on at P + M. ``mode`` says M and where the i-th token of a context of n tokens stands:

    - M, A, H: M is the largest n, their mean, or their harmonic mean;
    - E: evenly spread, P + i M / n, no whole number; L: from the left, P + i; R: to the right, P + M - n + i;
    - ``"order"``: contexts stand one after the other, as they are written, and only do not see one another.

    Zhang et al. 2025 read contexts so to ask why models that were not trained for it lose by it: attention entropy
    rises with the number of contexts. Their first repair is text: a prefix that every context sees (``SINK_LM``,
    ``SINK_TASKS`` are theirs, to stand before the contexts, without special tokens); the second is ``SelectContexts``.

    What differs from the authors' code: heads and layers may be chosen; a batch may be padded on either side (there,
    rows of unequal length get shifted positions). One context alone is as it was in mode E, L, R and "order". Contexts
    may be read in several passes.

    Args:
        contexts: a list of (first, stop) from the example's first token, which follow one another without a gap; one
            such list an example; or a name, ``"document"``: the published spans document_0, document_1 ...
        mode: see above.
        strength: moves scores from the model's to these (see ``PositionEdit``).
    """

    _: KW_ONLY
    contexts: Any = "document"
    mode: str = "ME"

    source: ClassVar[str] = "arXiv 2412.16545; zzsfornlp/parallel_context_encoding_analysis @ fb284f3"
    unit: ClassVar[str] = "share of the change of scores"
    nothing: ClassVar[str] = "no row that was meant is of a context, or after one"
    refused: ClassVar[dict[str, str]] = PositionEdit.refused | BEHIND_WINDOWS

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise HeadscopeError(f"ParallelContexts: mode must be one of {', '.join(MODES)}, not {self.mode!r}")
        if not isinstance(self.contexts, str):
            listed(self.contexts, "contexts")
        super().__post_init__()

    def change(self, call: AttentionCall, mine: Tensor) -> AttentionCall:
        """Positions by ``mode``, and contexts that do not see one another."""
        rotation = self.rotation(call)
        docs = Documents.of(self.contexts, call, "contexts")
        if not docs.reached:
            return call
        require_causal(call, "parallel encoding of contexts")
        first_row, first_key = call.mask.query_offset, call.mask.key_offset
        of_rows, of_keys = docs.of_rows, docs.of_keys

        def shows(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            own, other = of_rows[b, q - first_row], of_keys[b, k - first_key]
            return (k <= q) & ((own < 0) | (other < 0) | (own == other))

        def turned(x: Tensor, of: Tensor, offset: int) -> Tensor:
            at = torch.arange(x.shape[2], device=x.device) + offset
            places = context_positions(docs, of, at, self.mode)
            return rotation.turn(x, (rotation.angles(places) - rotation.angles(at))[:, None])

        after = torch.arange(call.query.shape[2], device=mine.device) + first_row >= docs.begin[:, None]
        self.note(mine & (after & (docs.end > docs.begin)[:, None])[:, None])
        query, key = turned(call.query, of_rows, first_row), turned(call.key, of_keys, first_key)
        return self.placed(call, mine, query, key, shows)


def context_positions(docs: Documents, of: Tensor, at: Tensor, mode: str) -> Tensor:
    """Where columns ``at`` (column,), of the documents ``of`` (batch, column), are placed: (batch, column), float64."""
    columns = at.double()[None].expand(of.shape[0], -1)
    if mode == "order":
        return columns
    length = docs.length.double()
    count = (length > 0).sum(1).clamp(min=1)
    inverse = torch.where(length > 0, 1 / length.clamp(min=1), 0.0).sum(1)
    sizes = {"M": length.amax(1), "A": length.sum(1) / count, "H": count / inverse.clamp(min=1e-30)}
    size = torch.where(docs.end > docs.begin, sizes[mode[0]], 0.0)[:, None]
    inside, own = of >= 0, of.clamp(min=0)
    n = length.gather(1, own).clamp(min=1)
    i = columns - docs.first.gather(1, own)
    placed = {"E": i * size / n, "L": i, "R": size - n + i}[mode[1]] + docs.begin[:, None]
    after = columns - (docs.end - docs.begin)[:, None] + size
    return torch.where(inside, placed, torch.where(columns >= docs.end[:, None], after, columns))


SINK_LM = "Given the following partial context, predicting the next sequence of words:\n\n"
SINK_TASKS = "Given the following contexts, answer the final question accordingly:\n\n"
