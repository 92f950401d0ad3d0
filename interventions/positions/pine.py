"""PINE: what a model says of several documents does not depend on their order."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.sites.rotary import Rotation
from headscope.interventions.positions.documents import Documents, listed
from headscope.interventions.positions.position_edit import BEHIND_WINDOWS, IN_PIECES, PositionEdit, require_causal
from headscope.interventions.positions.rescored import Rescored
from headscope.kernels.attention import attend
from headscope.kernels.masks import Mask
from headscope.kernels.request import Request
from headscope.kernels.scores import Scores


@dataclass(frozen=True, eq=False)
class Pine(PositionEdit):
    """Position-invariant inference (Wang et al. 2024): documents see one another, and each row places them by their
    importance to it.

    A prompt is a prefix of P tokens, documents d of n_d tokens (S in all), and a suffix, continued by generated tokens.
    In every layer and head, a = softmax of the scores of q and k before RoPE over the documents' tokens (a document's
    own left out), and importance is

        s[i, d] = sum over tokens x of document i (or one token x of the suffix) of the mean over y in d of a[x, y].

    Documents are ranked by it, a row's own first. RoPE then places the last token of d at P + S - 1 - (tokens of the
    documents that rank before it): the most important document stands nearest. Rows of documents stand at the end of
    P .. P + S - 1 themselves, and see the prefix, their own document causally and the others whole; rows of the suffix
    see all before them. A generated token ranks for itself, keys of a cache being turned back.

    In all heads and layers, as the authors have it, logits of the suffix do not change with the order of the documents,
    but for rounding, and for documents of equal importance, which keep their order. In some heads or layers alone they
    do. A token of a document sees those of later ones: a log-likelihood of what stands in a document has seen it.

    What differs from the authors' code (LlamaForCausalLMWithPS, one prompt at a time): any RoPE model, batches with
    padding, no rotated copy of the keys for every query. Attention with a softcap has it in the importance too [OURS].
    Where a prompt has one document nothing changes. Documents must be read in one pass.

    Args:
        documents: a list of (first, stop) from the example's first token, which follow one another without a gap; one
            such list an example; or a name, ``"document"``: the published spans document_0, document_1 ...
        strength: moves scores from the model's to these (see ``PositionEdit``).
    """

    _: KW_ONLY
    documents: Any = "document"

    source: ClassVar[str] = "Wang et al. 2024, arXiv 2407.01100; wzq016/PINE @ 5c2e9de"
    unit: ClassVar[str] = "share of the change of scores"
    nothing: ClassVar[str] = "no row that was meant is of two documents or more, or after them"
    refused: ClassVar[dict[str, str]] = PositionEdit.refused | BEHIND_WINDOWS | IN_PIECES

    def __post_init__(self) -> None:
        if not isinstance(self.documents, str):
            listed(self.documents, "documents")
        super().__post_init__()

    def change(self, call: AttentionCall, mine: Tensor) -> AttentionCall:
        """The scores by rank, and documents that see one another."""
        rotation = self.rotation(call)
        docs = Documents.of(self.documents, call, "documents")
        if not docs.reached or docs.first.shape[1] < 2:
            return call
        require_causal(call, "PINE")
        docs.require_whole("PINE")
        several = (docs.length > 0).sum(1) > 1
        after = torch.arange(call.query.shape[2], device=mine.device) + call.mask.query_offset >= docs.begin[:, None]
        mine = mine & (several[:, None] & after)[:, None]
        self.note(mine)
        ranked = _Ranked.of(call, rotation, docs)
        angle = rotation.frequencies.to(call.query.device)

        def queries(slot: int, examples: Tensor, heads: Tensor, rows: Tensor) -> Tensor:
            moved = ranked.moved(slot - 1, examples, heads, rows)
            return rotation.turn(call.query[examples][:, heads][:, :, rows], moved[..., None] * angle)

        of_rows, of_keys = docs.of_rows, docs.of_keys
        first_row, first_key = call.mask.query_offset, call.mask.key_offset

        def shows(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            own, other = of_rows[b, q - first_row], of_keys[b, k - first_key]
            return (k <= q) | ((own >= 0) & (other >= 0) & (own != other))

        ahead = docs.columns[1] - docs.columns[0] if bool((of_rows >= 0).any()) else 0
        return self.rescored(call, mine, Rescored(call, queries, call.key, of_keys + 1), shows, ahead)


@dataclass(frozen=True, eq=False)
class _Ranked:
    """Tokens of the documents that rank before each document: for rows of a document, ``of_documents`` (batch, head,
    document, document), and for the rows from ``first`` on that come after them, ``of_rows`` (batch, head, row,
    document)."""

    docs: Documents
    of_documents: Tensor
    of_rows: Tensor
    first: int

    @classmethod
    def of(cls, call: AttentionCall, rotation: Rotation, docs: Documents) -> _Ranked:
        received = _received(call, rotation, docs)  # (batch, head, query, document)
        length = docs.length[:, None, None]
        count = docs.first.shape[1]
        number = torch.arange(count, device=length.device)
        rows = (docs.of_rows[..., None] == number).to(received.dtype)
        summed = torch.einsum("bhqd,bqe->bhed", received, rows)
        summed = summed.masked_fill(number == number[:, None], torch.inf)
        first = max(0, int(docs.end.min()) - call.mask.query_offset)
        return cls(docs, _before(summed, length), _before(received[:, :, first:], length), first)

    def moved(self, document: int, examples: Tensor, heads: Tensor, rows: Tensor) -> Tensor:
        """By how many tokens further than its column each row stands from the keys of a document (-1: from keys of
        none): (example, head, row), float."""
        docs = self.docs
        own = docs.of_rows[examples][:, rows]
        inside, at = own >= 0, own.clamp(min=0)
        right = torch.where(inside, docs.end[examples, None] - docs.stop[examples].gather(1, at), 0)[:, None]
        if document < 0:
            return right.expand(-1, len(heads), -1).float()
        of_documents = self.of_documents[examples][:, heads][..., document]
        ranked = of_documents.gather(2, at[:, None].expand(-1, len(heads), -1))
        if self.of_rows.shape[2]:
            row = (rows - self.first).clamp(min=0)
            of_rows = self.of_rows[examples][:, heads][:, :, row, document]
            ranked = torch.where(inside[:, None], ranked, of_rows)
        keys = docs.end[examples] - docs.stop[examples, document]
        return (ranked + right - keys[:, None, None]).float()


def _before(importance: Tensor, length: Tensor) -> Tensor:
    """Tokens of the documents that rank before each one, ``importance`` (..., document) falling, ties by place."""
    importance = importance.masked_fill(length == 0, -torch.inf)
    order = importance.argsort(dim=-1, descending=True, stable=True)
    sizes = length.expand(importance.shape).gather(-1, order)
    return torch.zeros_like(sizes).scatter(-1, order, sizes.cumsum(-1) - sizes)


def _received(call: AttentionCall, rotation: Rotation, docs: Documents) -> Tensor:
    """The mean attention, before RoPE and over other documents' tokens, of each row to each document's tokens:
    (batch, head, query, document)."""
    first, stop = docs.columns
    stop = min(stop, call.key.shape[2])
    device, mask = call.query.device, call.mask
    rows = torch.arange(call.query.shape[2], device=device) + mask.query_offset
    query = rotation.turn(call.query, -rotation.angles(rows))
    key = rotation.turn(call.key[:, :, first:stop], -rotation.angles(torch.arange(first, stop, device=device)))
    of_rows, of_keys = docs.of_rows, docs.of_keys
    number = torch.arange(docs.first.shape[1], device=device)

    def others(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        other = of_keys[b, k]
        return (other >= 0) & (other != of_rows[b, q - mask.query_offset])

    seen = Mask(mask.query_offset, first, right=None, rule=others, examples=call.query.shape[0])
    scores = Scores(query, key, seen, call.scale / rotation.scaling**2, call.softcap)
    share = (of_keys[:, first:stop, None] == number) / docs.length.clamp(min=1)[:, None].to(scores.dtype)
    found = attend(scores, key, request=Request(output=False, linear=share)).linear
    assert found is not None
    return found
