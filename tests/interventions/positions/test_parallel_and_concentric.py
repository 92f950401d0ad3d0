"""Parallel contexts, their selection, and concentric positions against their specifications written out in float64.

Tolerance: 1e-5 of the largest logit (see test_ablate.py); the unedited model is off by more than 1e-2 of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interventions import ConcentricPositions, ParallelContexts, SelectContexts, apply
from headscope.interventions.positions.concentric import rings

CONTEXTS = [(2, 5), (5, 7), (7, 11)]
LENGTH = 14
SCALE = 8**-0.5
Places = tuple[Tensor, Tensor]  # a position for every token (key,), and which pairs see each other (query, key)


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def tokens(count: int = 1) -> Tensor:
    return torch.randint(2, 64, (count, LENGTH), generator=torch.Generator().manual_seed(3))


def placed(dense: Any, places: Places, after: Callable[[Tensor], Tensor] = lambda p: p) -> Callable:
    """The pattern of tokens at these positions."""
    at, seen = places

    def hand(layer: int, q: Tensor, k: Tensor) -> Tensor:
        scores = SCALE * dense.rope(q, at) @ dense.rope(k, at).transpose(2, 3)
        return after(dense.softmax(scores, seen))

    return hand


def parallel(mode: str, contexts: list[tuple[int, int]], length: int) -> Places:
    """As ``mspx/core/cache.py`` of the authors lists positions, and its mask."""
    sizes = [b - a for a, b in contexts]
    most = {"M": max(sizes), "A": sum(sizes) / len(sizes), "H": len(sizes) / sum(1 / n for n in sizes), "o": sum(sizes)}
    whole, begin, end = most[mode[0]], contexts[0][0], contexts[-1][1]
    at, of = list(map(float, range(begin))), [-1] * begin
    for number, n in enumerate(sizes):
        step = {"E": [i * whole / n for i in range(n)], "L": list(range(n)), "R": [whole - n + i for i in range(n)]}
        own = step[mode[1]] if mode != "order" else [contexts[number][0] - begin + i for i in range(n)]
        at += [begin + x for x in own]
        of += [number] * n
    at += [begin + whole + i for i in range(length - end)]
    of += [-1] * (length - end)
    context = torch.tensor(of)
    apart = (context[:, None] >= 0) & (context >= 0) & (context[:, None] != context)
    return torch.tensor(at), torch.ones(length, length).tril().bool() & ~apart


@pytest.mark.parametrize("mode", ["ME", "ML", "MR", "AE", "HL", "HR", "order"])
def test_parallel_contexts_are_the_specification(model: Any, dense: Any, mode: str) -> None:
    ids = tokens()
    with apply(model, ParallelContexts(contexts=CONTEXTS, mode=mode)):
        found = dense.logits(model, ids)
    wanted = dense.expected(model, ids, placed(dense, parallel(mode, CONTEXTS, LENGTH)))
    assert off(found, wanted) <= 1e-5 and off(dense.logits(model, ids), wanted) > 1e-2
    every = [(layer, head) for layer in range(2) for head in range(4)]
    with apply(model, ParallelContexts(every, contexts=CONTEXTS, mode=mode)):  # as edited scores
        assert off(dense.logits(model, ids), wanted) <= 1e-5


def test_contexts_of_padded_batches_and_in_pieces(model: Any, dense: Any) -> None:
    """Each example has contexts of its own; a prompt may be cut anywhere, for contexts see nothing later."""
    ids, each = tokens(2), [CONTEXTS, [(1, 4), (4, 8)]]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    edit = ParallelContexts(contexts=each)
    with apply(model, edit):
        found = dense.logits(model, ids, mask)
    for row, pad in ((0, 0), (1, 3)):
        alone = ids[row : row + 1, pad:]
        wanted = dense.expected(model, alone, placed(dense, parallel("ME", each[row], LENGTH - pad)))
        assert off(found[row : row + 1, pad:], wanted) <= 1e-5
    with apply(model, ParallelContexts(contexts=CONTEXTS)), torch.no_grad():
        first = model(ids[:1, :6], use_cache=True)
        rest = model(ids[:1, 6:], past_key_values=first.past_key_values).logits
    assert off(torch.cat([first.logits, rest], 1), found[:1]) <= 1e-5


def test_one_context_alone_is_as_it_was(model: Any, dense: Any) -> None:
    ids = tokens()
    plain = dense.logits(model, ids)
    for mode in ("ME", "AL", "HR", "order"):
        with apply(model, ParallelContexts(contexts=[(2, 9)], mode=mode)):
            assert off(dense.logits(model, ids), plain) <= 1e-5


@pytest.mark.parametrize("over", ["head", "heads", "pass"])
def test_selected_contexts_are_the_specification(model: Any, dense: Any, over: str) -> None:
    """After parallel encoding: the largest weights of each context, the best two kept, the row normalised again."""
    ids = tokens()

    def selected(p: Tensor) -> Tensor:
        scores = torch.stack([p[..., a:b].topk(min(2, b - a)).values.sum(-1) for a, b in CONTEXTS], -1)
        if over == "heads":
            scores = scores.topk(4, 1).values.sum(1, keepdim=True).expand_as(scores)
        if over == "pass":
            after = scores[:, :, CONTEXTS[-1][1] :].flatten(1, 2)
            scores = after.topk(5, 1).values.sum(1)[:, None, None].expand_as(scores)
        lost, new = scores.argmin(-1), p.clone()
        for number, (a, b) in enumerate(CONTEXTS):
            rows = (lost == number) & (torch.arange(LENGTH) >= CONTEXTS[-1][1])
            new[..., a:b] = torch.where(rows[..., None], 0.0, p[..., a:b])
        return new / new.sum(-1, keepdim=True)

    places = parallel("ME", CONTEXTS, LENGTH)
    wanted = dense.expected(model, ids, placed(dense, places, selected))
    both = ParallelContexts(contexts=CONTEXTS) + SelectContexts(contexts=CONTEXTS, top=2, over=over)
    with apply(model, both):
        assert off(dense.logits(model, ids), wanted) <= 1e-5
    assert off(dense.expected(model, ids, placed(dense, places)), wanted) > 1e-2
    with pytest.warns(UserWarning, match="changed nothing"), apply(model, SelectContexts(contexts=CONTEXTS, keep=3)):
        dense.logits(model, ids)


def concentric(first: int, rows: int, columns: int, length: int) -> Places:
    """Ring by ring as the authors write it: positions, and the image's block of the mask."""
    ring = [min(r, c, rows - 1 - r, columns - 1 - c) for r in range(rows) for c in range(columns)]
    stop, after = first + len(ring), first + max(ring) + 1
    at = [*range(first), *(first + one for one in ring), *(after + i for i in range(length - stop))]
    seen = torch.ones(length, length).tril().bool()
    place = torch.tensor(at)
    seen[first:stop, first:stop] = place[None, first:stop] <= place[first:stop, None]
    return place.double(), seen


@pytest.mark.parametrize(("first", "grid"), [(2, (3, 3)), (0, (2, 4)), (1, (3, 4))])
def test_concentric_positions_are_the_specification(model: Any, dense: Any, first: int, grid: tuple[int, int]) -> None:
    ids, stop = tokens(), first + grid[0] * grid[1]
    wanted = dense.expected(model, ids, placed(dense, concentric(first, *grid, LENGTH)))
    edit = ConcentricPositions(span=(first, stop), grid=grid)
    every = [(layer, head) for layer in range(2) for head in range(4)]
    for one in (edit, edit.with_settings(heads=every)):  # by queries and keys, and as edited scores
        with apply(model, one):
            assert off(dense.logits(model, ids), wanted) <= 1e-5
    assert off(dense.logits(model, ids), wanted) > 1e-2


def test_images_at_places_of_their_own_and_what_follows_them(model: Any, dense: Any) -> None:
    """A padded batch, and cached generation: a step's position is that of the text."""
    ids = tokens(2)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    edit = ConcentricPositions(span=[(2, 11), (1, 10)], grid=(3, 3))
    with apply(model, edit):
        found = dense.logits(model, ids, mask)
    for row, pad, first in ((0, 0, 2), (1, 3, 1)):
        alone = ids[row : row + 1, pad:]
        wanted = dense.expected(model, alone, placed(dense, concentric(first, 3, 3, LENGTH - pad)))
        assert off(found[row : row + 1, pad:], wanted) <= 1e-5
    with apply(model, ConcentricPositions(span=(2, 11), grid=(3, 3))), torch.no_grad():
        first_part = model(ids[:1, :12], use_cache=True)
        rest = model(ids[:1, 12:], past_key_values=first_part.past_key_values).logits
    assert off(torch.cat([first_part.logits, rest], 1), found[:1]) <= 1e-5


def test_rings_are_those_of_the_authors_table() -> None:
    found = rings(24, 24)
    assert [int((found == ring).sum()) for ring in range(12)] == list(range(92, 3, -8)) and int(found.max()) == 11


def test_what_they_refuse(model: Any, dense: Any) -> None:
    ids = tokens()
    with pytest.raises(HeadscopeError, match="a grid of 24 x 24 has 576 tokens, and the span 9"):
        with apply(model, ConcentricPositions(span=(2, 11))):
            dense.logits(model, ids)
    with pytest.raises(HeadscopeError, match="read in one pass"):
        with apply(model, ConcentricPositions(span=(2, 11), grid=(3, 3))):
            dense.logits(model, ids[:, :6])
    with pytest.raises(HeadscopeError, match="leaves tokens between them"):
        with apply(model, ConcentricPositions(span=[[(2, 6), (7, 12)]], grid=(3, 3))):
            dense.logits(model, ids)
    for bad in ({"grid": (3,)}, {"grid": (0, 4)}):
        with pytest.raises(HeadscopeError, match="grid must be"):
            ConcentricPositions(span=(2, 11), **bad)
    with pytest.raises(HeadscopeError, match="mode must be one of ME"):
        ParallelContexts(contexts=CONTEXTS, mode="XE")
    for bad in ({"keep": 0}, {"top": 0.5}, {"over": "seq"}):
        with pytest.raises(HeadscopeError, match="SelectContexts"):
            SelectContexts(contexts=CONTEXTS, **bad)
