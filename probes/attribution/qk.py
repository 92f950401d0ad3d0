"""Why a head attends: the score of one query and one key, split over what wrote the two positions' streams."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites import attached
from headscope.interp.sites.given import Loadable
from headscope.interp.sites.gradients import frozen
from headscope.interp.sites.sizes import tower_size
from headscope.probes.paths.readers import reading
from headscope.probes.paths.rows import Rows, rows, wrote
from headscope.probes.paths.writers import LayerPath, Paths, find_paths


@dataclass(frozen=True, eq=False)
class QKAttribution:
    """A score's table: ``table`` (source of the query, source of the key), in nats, before a softcap; it sums to
    ``score``, what the model attends with.

    ``sources``, the same for rows and columns: "embedding", "L0H1" (a head), "L0 beside" (biases of its output
    projection, a norm's shift, a mixer without softmax), "L0 MLP", and last "constant" (biases of the query and key
    projections, shifts of norms before them).
    """

    table: NDArray[np.float64]
    sources: tuple[str, ...]
    score: float
    layer: int
    head: int
    query: int
    key: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def by_query(self) -> pd.Series:
        """What each source of the query's stream adds, summed over the key's, largest size first."""
        return self._sorted(self.table.sum(1))

    def by_key(self) -> pd.Series:
        """What each source of the key's stream adds, summed over the query's, largest size first."""
        return self._sorted(self.table.sum(0))

    def to_frame(self, top: int = 20) -> pd.DataFrame:
        """The ``top`` pairs of the largest size: source of the query, source of the key, nats."""
        order = np.argsort(-np.abs(self.table), axis=None, kind="stable")[:top]
        row, column = np.unravel_index(order, self.table.shape)
        names = np.array(self.sources, dtype=object)
        return pd.DataFrame({"query": names[row], "key": names[column], "nats": self.table[row, column]})

    def _sorted(self, values: NDArray[np.float64]) -> pd.Series:
        found = pd.Series(values, index=list(self.sources), name="nats")
        return found.reindex(found.abs().sort_values(ascending=False, kind="stable").index)


def qk_attribution(model: Loadable, text: str, layer: int, head: int, query: int, key: int) -> QKAttribution:
    """Split the score of one query-key pair exactly over upstream heads, MLPs and the embedding, on both sides.

    The score is bilinear in the two positions' normed streams (Elhage et al. 2021, "A Mathematical Framework for
    Transformer Circuits", QK circuits), and each stream is the sum of what was written to it: scale * q_a . k_b for
    sources a and b. Norms keep the scale that they had in the pass (the layer's own, QK-norm, one after attention);
    the rotation of each position is applied. Only the two positions' streams are held, at any length.

    What it does not show: the weight, which depends on the other keys' scores too (a part that all keys share moves
    nothing: compare pairs); why an upstream part wrote what it did; and what changes where a norm's scale does.

    Args:
        model: load_model's result, or what it takes.
        text: one prompt.
        layer, head: of the query head.
        query, key: positions from the first token, or from the end where negative.

    Raises:
        HeadscopeError: no such head or position; a query that does not see the key; queries that are not a function of
            one position's stream, or a stream that its writers do not sum to (a factor, as in Granite).
    """
    lm = load_model(model)
    encoded = lm.encode(text)
    length = encoded["input_ids"].shape[1]
    i, j = (at + length if at < 0 else at for at in (query, key))
    size = tower_size(lm)
    size.check_layers([layer])
    if not (0 <= i < length and 0 <= j < length and 0 <= head < lm.info.heads):
        raise HeadscopeError(f"qk_attribution: no head {head} or no positions {query}, {key} in {length} tokens")
    paths = find_paths(lm)
    path = next(each for each in paths.layers if each.layer == layer)
    pair = _Pair(layer, head, i, j)
    with frozen(lm), torch.no_grad():
        with reading(lm, path) as readers, attached(lm, pair, layers={layer: f"layer {layer}"}):
            with rows(paths, torch.tensor([[i, j]])) as found:
                lm.forward(encoded["input_ids"], logits=1)
        names, written = _sources(paths, found, layer)
        whole = found.before[layer][0].to(written)
        _same(lm, written.sum(1), whole, f"the stream before layer {layer} is not the sum of what was written to it")
        q, _, own_q, _ = readers[-1].parts(written[0], whole[0], i)
        _, k, _, own_k = readers[-1].parts(written[1], whole[1], j)
    kv = head // (own_q.shape[0] // own_k.shape[0])
    q, k = q[:, head], k[:, kv]
    for parts, whole_one, seen in ((q, own_q[head], pair.query), (k, own_k[kv], pair.key)):
        words = f"queries and keys of layer {layer} are not those of one position's stream"
        _same(lm, whole_one[None], seen.to(whole_one)[None], words)
        _same(lm, parts.sum(0)[None], whole_one[None], words)
    table = pair.scale * (q.double() @ k.double().T).cpu().numpy()
    score = pair.scale * float(pair.query.double() @ pair.key.double())
    made = provenance(lm, prompts=[text], layer=layer, head=head, query=i, key=j) | {"unit": "nats"}
    return QKAttribution(table, (*names, "constant"), score, layer, head, i, j, made)


class _Pair(Handler):
    """Keeps one query and one key of one head."""

    only_reads = True

    def __init__(self, layer: int, head: int, i: int, j: int) -> None:
        self.layer, self.head, self.i, self.j = layer, head, i, j
        self.query = self.key = torch.zeros(0)
        self.scale = 1.0

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        if call.position_bias is not None or call.score_edit is not None or call.moved:
            raise HeadscopeError("the score is not q . k alone (a position bias, or an edit of scores): not split here")
        if not bool(call.pattern(rows=slice(self.i, self.i + 1), keys=slice(self.j, self.j + 1))[0, self.head] > 0):
            raise HeadscopeError(f"the query at {self.i} gives the key at {self.j} no weight: it does not see it")
        kv = self.head // (call.query.shape[1] // call.key.shape[1])
        self.query, self.key = call.query[0, self.head, self.i], call.key[0, kv, self.j]
        self.scale = call.scale
        return z


def _sources(paths: Paths, found: Rows, layer: int) -> tuple[list[str], Tensor]:
    """Names, and what each wrote to the stream before ``layer`` at both rows (row, source, d_model)."""
    first = found.before[paths.layers[0].layer]
    names, parts = ["embedding"], [first.to(torch.promote_types(first.dtype, torch.float32))[0][:, None]]
    for path in paths.layers:
        if path.layer >= layer:
            break
        own = [_layer(path, found, row) for row in range(2)]
        names += own[0][0]
        parts.append(torch.stack([each for _, each in own]).to(parts[0]))
    return names, torch.cat(parts, 1)


def _layer(path: LayerPath, found: Rows, row: int) -> tuple[list[str], Tensor]:
    """Names, and what each part of a layer added to the stream at one row (source, d_model)."""
    added = (found.after(path.layer) - found.before[path.layer])[0, row]
    names, parts = list[str](), list[Tensor]()
    rest = added.to(torch.promote_types(added.dtype, torch.float32))
    if path.attention is not None:
        heads, beside = wrote(path, found, row)
        names += [f"L{path.layer}H{head}" for head in range(path.heads)]
        parts += list(heads[0])
        rest = beside[0] if path.mlp is not None else rest - heads[0].sum(0)
    if path.mlp is not None:
        mlp = found.mlp[path.layer][0, row].to(rest)
        rest = rest if path.attention is not None else rest - mlp
        names, parts = [*names, f"L{path.layer} MLP"], [*parts, mlp]
    return [*names, f"L{path.layer} beside"], torch.stack([*parts, rest])


def _same(lm: LanguageModel, found: Tensor, wanted: Tensor, words: str) -> None:
    """Refuse where sums differ by more than their roundings."""
    room = 64 * torch.finfo(lm.model.dtype).eps * float(wanted.abs().max())
    if not float((found - wanted).abs().max()) <= room:
        raise HeadscopeError(f"{lm.name}: {words}, so its scores are not split")
