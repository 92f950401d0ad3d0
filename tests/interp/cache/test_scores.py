"""Every key policy's score against a dense float64 implementation of its specification.

A mistral with two query heads a key head, RoPE and a sliding window of 6 tokens; prompts of unequal length,
padded to the left or to the right, of which the call holds later tokens too. Scores are made in float32 from float32
queries and keys: sums of at most 14 weights, each right to 1e-6, so 1e-5 of the largest score.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.cache import POLICIES
from headscope.interp.cache.budget import Budget
from headscope.interp.cache.reading import Reading
from headscope.interp.cache.rows.neighbourhood import gna_mask
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import attached
from headscope.interp.sites.rotary import rotations
from headscope.kernels.kept import losses
from headscope.kernels.request import Request
from headscope.kernels.streaming.weights import Tile

WINDOW, LATER, GROUP = 6, 4, 2


class Calls(Handler):
    """Keeps every layer's call."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def request(self, call: AttentionCall) -> Request:
        self.calls.append(call)
        return Request()


class One:
    """One example of a call without its padding, dense and in float64: q, k, v (head, token, d), A (head, q, k)."""

    def __init__(self, reading: Reading, b: int) -> None:
        call = reading.call
        first, stop = int(reading.start[b]), int(reading.stop[b])
        self.first, self.stop, self.count = first, stop, stop - first
        end = stop + LATER
        self.q = call.query[b, :, first:end].double()
        self.k, self.v = (x[b, :, first:end].double() for x in (call.key, call.value))
        s = self.q @ self.k.repeat_interleave(GROUP, 0).transpose(1, 2) * call.scale
        gap = torch.arange(end - first)[:, None] - torch.arange(end - first)[None, :]
        hidden = (gap < 0) | (gap > (call.mask.left if call.mask.left is not None else math.inf))
        self.scale, self.whole = call.scale, s.masked_fill(hidden, -torch.inf).softmax(-1)
        self.A = self.whole[:, : self.count, : self.count]

    @property
    def prompt(self) -> Tensor:
        """Its prompt's keys."""
        return self.k[:, : self.count]


def grouped(x: Tensor) -> Tensor:
    return torch.stack([x[2 * g : 2 * g + 2].mean(0) for g in range(x.shape[0] // GROUP)])


def snapkv(one: One, w: int = 3) -> Tensor:
    mass = one.A[:, -w:, : one.count - w].mean(1)
    pooled = torch.zeros_like(mass)
    for k in range(mass.shape[1]):
        pooled[:, k] = mass[:, max(0, k - 2) : k + 3].sum(-1) / 5
    kept = grouped(pooled)
    return torch.cat([kept, torch.full((kept.shape[0], w), float(kept.max()) + 1)], 1)


def observed(one: One) -> Tensor:
    return grouped(one.A.sum(1) / (one.count - torch.arange(one.count)))


def tova(one: One) -> Tensor:
    score = one.A[:, -1].mean(0, keepdim=True)
    score[:, -1] = score.max() + 1
    return score


def keydiff(one: One) -> Tensor:
    direction = one.prompt / one.prompt.norm(dim=-1, keepdim=True)
    anchor = direction.mean(1, keepdim=True)
    return -(one.prompt * anchor).sum(-1) / (one.prompt.norm(dim=-1) * anchor.norm(dim=-1))


def rotary(at: Tensor, d: int, base: float = 10_000.0) -> Tensor:
    """HF's rotation of positions as matrices (position, d, d): cos + sin P, P = rotate_half."""
    angle = at[:, None].double() * base ** (-torch.arange(0, d, 2).double() / d)
    cos, sin = (torch.diag_embed(torch.cat([f(angle), f(angle)], -1)) for f in (torch.cos, torch.sin))
    half = torch.zeros(d, d).double()
    half[d // 2 :, : d // 2], half[: d // 2, d // 2 :] = torch.eye(d // 2), -torch.eye(d // 2)
    return cos + sin @ half


def expected(one: One, sink: int = 2, ahead: int = 50) -> Tensor:
    d = one.q.shape[-1]
    back = rotary(torch.arange(one.count), d).transpose(1, 2)
    q = torch.einsum("tij,htj->hti", back, one.q[:, : one.count])[:, sink:]
    mu = q.mean(1)
    sigma = torch.stack([torch.cov(x.T, correction=0) for x in q])
    R = rotary(torch.arange(one.count, one.count + ahead), d).mean(0)
    mu, sigma = mu @ R.T, R @ sigma @ R.T
    k, scores = one.prompt.repeat_interleave(GROUP, 0)[:, sink:], []
    for h in range(k.shape[0]):
        scores.append(k[h] @ mu[h] / d**0.5 + torch.einsum("ti,ij,tj->t", k[h], sigma[h], k[h]) / (2 * d))
    score = grouped(torch.stack(scores).softmax(-1)) * one.v[:, sink : one.count].norm(dim=-1)
    return torch.cat([torch.full((score.shape[0], sink), float(score.max()) + 1), score], 1)


def ems(one: One, w: int = 3) -> Tensor:
    everywhere, local = grouped(one.A.sum(1)), grouped(one.A[:, -w:].sum(1))
    return torch.maximum(everywhere * local.mean(-1, keepdim=True) / everywhere.mean(-1, keepdim=True), local)


FEATURES = torch.randn(8, 20, generator=torch.Generator().manual_seed(5)).double()


def s3(one: One, active: int = 4, window: int = 3) -> Tensor:
    """Feature by feature: what the last 3 queries and a key activate, both before RoPE."""
    n, d = one.count, one.q.shape[-1]
    back = rotary(torch.arange(n), d)

    def features(x: Tensor) -> list[list[dict[int, float]]]:
        z = (torch.einsum("tji,htj->hti", back, x[:, :n]) @ FEATURES).relu()
        return [[{int(f): float(v) for v, f in zip(*t.topk(active), strict=True) if v > 0} for t in h] for h in z]

    keys, queries, score = features(one.k), features(one.q), torch.zeros(one.k.shape[0], n).double()
    for g, mine in enumerate(keys):
        for t, own in enumerate(mine):
            for h in range(g * GROUP, (g + 1) * GROUP):
                for query in queries[h][-window:]:
                    for f in query.keys() & own.keys():
                        many = sum(f in other for other in mine)
                        score[g, t] += query[f] / (math.log(1 + many) + 1) / GROUP
    return score


def oracle(one: One) -> Tensor:
    return grouped(one.whole[:, one.count :, : one.count].sum(1))


WRITTEN: dict[str, tuple[dict[str, Any], Callable[[One], Tensor]]] = {
    "snapkv": ({"window": 3}, snapkv),
    "h2o": ({"recent_share": 0.0}, lambda one: grouped(one.A.sum(1))),
    "observed_attention": ({}, observed),
    "tova": ({}, tova),
    "knorm": ({}, lambda one: -one.prompt.norm(dim=-1)),
    "keydiff": ({}, keydiff),
    "expected_attention": ({"sink": 2, "ahead_tokens": 50}, expected),
    "ems": ({"window": 3}, ems),
    "oracle": ({}, oracle),
    "s3": ({"encoder": lambda x, layer: x @ FEATURES.to(x), "active": 4, "window": 3}, s3),
}


def tiny(window: int | None) -> MistralForCausalLM:
    """Two layers with grouped heads that see a window of so many tokens."""
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    more = dict(vocab_size=64, num_hidden_layers=2, initializer_range=0.3, max_position_embeddings=128)
    return MistralForCausalLM(MistralConfig(sliding_window=window, **sizes, **more)).eval()


@pytest.fixture(scope="module")
def model() -> MistralForCausalLM:
    return tiny(WINDOW)


@pytest.fixture(scope="module", params=["left", "right", "none"])
def readings(request: pytest.FixtureRequest, model: MistralForCausalLM) -> list[Reading]:
    """Each layer's reading of three prompts of 14, 9 and 12 tokens, of which the last 4 come after the prompt."""
    lengths = (14, 9, 12) if request.param != "none" else (14,)
    ids = torch.randint(0, 60, (len(lengths), 14), generator=torch.Generator().manual_seed(2))
    mask = torch.zeros_like(ids)
    for row, n in zip(mask, lengths, strict=True):
        row[14 - n :] = 1 if request.param == "left" else row[14 - n :]
        row[:n] = 1 if request.param != "left" else row[:n]
    handler = Calls()
    with attached(model, handler), torch.no_grad():
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    last = torch.tensor([14 if request.param == "left" else n for n in lengths])
    measured = (10, 14) if request.param != "right" else None
    turned = rotations(model, None)
    return [Reading(call, last - LATER, measured, turned[call.module, call.layer]) for call in handler.calls]


@pytest.mark.parametrize("name", WRITTEN)
def test_the_score_is_its_specification(readings: list[Reading], name: str) -> None:
    settings, written = WRITTEN[name]
    policy = POLICIES[name](**settings)
    for reading in readings:
        if name in ("oracle",) and reading.measured is None:
            continue
        scores = policy.scores(reading)
        kept = policy.sets(reading, [Budget(keys=5)])[0]
        for b in range(scores.shape[0]):
            one = One(reading, b)
            wanted = written(one)
            mine = scores[b, :, one.first : one.stop].double()
            forced = wanted == wanted.max(-1, keepdim=True).values if name in ("snapkv", "tova") else wanted > math.inf
            if name == "expected_attention":
                forced = (torch.arange(one.count) < 2).expand_as(wanted)
            close = (mine - wanted).abs() <= 1e-5 * wanted[~forced].abs().max()
            assert bool((close | forced).all()), f"{name}: {(mine - wanted).abs().max()}"
            best = wanted.argsort(dim=-1, descending=True, stable=True)[:, :5]
            if name == "snapkv":
                best = torch.cat(
                    [wanted[:, :-3].topk(2).indices, torch.arange(one.count - 3, one.count).expand(2, -1)], 1
                )
            assert kept[b, :, one.first : one.stop].nonzero()[:, -1].view(-1, 5).tolist() == best.sort().values.tolist()
            assert not kept[b, :, : one.first].any() and not kept[b, :, one.stop :].any()


def test_h2o_keeps_recent_tokens_with_half_of_its_budget(readings: list[Reading]) -> None:
    for reading in readings:
        kept = POLICIES["h2o"]().sets(reading, [Budget(keys=5)])[0]
        for b in range(kept.shape[0]):
            one = One(reading, b)
            score = grouped(one.A.sum(1))
            score[:, -2:] = math.inf
            assert kept[b, :, one.first : one.stop].nonzero()[:, 1].view(-1, 5).tolist() == (
                score.topk(5).indices.sort().values.tolist()
            )


def test_keydiff_block_by_block(readings: list[Reading]) -> None:
    n, block = 4, 2
    for reading in readings:
        kept = POLICIES["keydiff"](block=block).sets(reading, [Budget(keys=n)])[0]
        for b in range(kept.shape[0]):
            one = One(reading, b)
            for g in range(2):
                held = list(range(min(n, one.count)))
                for begin in range(n, one.count, block):
                    held += range(begin, min(begin + block, one.count))
                    own = one.prompt[g, held]
                    anchor = (own / own.norm(dim=-1, keepdim=True)).mean(0)
                    score = -torch.nn.functional.cosine_similarity(own, anchor[None], dim=-1)
                    held = sorted(held[i] for i in score.topk(n).indices.tolist())
                assert kept[b, g, one.first : one.stop].nonzero()[:, 0].tolist() == held


def test_rows_that_stream_and_rows_that_choose(readings: list[Reading]) -> None:
    """Every row by hand: the first 2 tokens and the last 3, and the best 3 of the prompt with all later keys."""
    for reading in readings:
        keeps = [POLICIES["streaming_llm"](sink=2).keeps(reading, [Budget(keys=5)])[0]]
        keeps += POLICIES["top_k"]().keeps(reading, [Budget(keys=3)])
        stream, best = losses(reading.call.inputs(), reading.call.value, keeps, held=200)
        for b in range(reading.stop.shape[0]):
            one = One(reading, b)
            gap = torch.arange(one.count + LATER)[:, None] - torch.arange(one.count + LATER)[None, :]
            shown = (torch.arange(one.count + LATER) < 2) | ((gap < 3) & (gap >= 0))
            rows = slice(one.first, one.stop + LATER)
            assert (stream.recall[b, :, rows] - (one.whole * shown).sum(-1)).abs().max() < 1e-5
            top = one.whole[..., : one.count].topk(3).values.sum(-1) + one.whole[..., one.count :].sum(-1)
            assert (best.recall[b, :, rows] - top).abs().max() < 1e-5


def kept_by_hand(reading: Reading, keep: Callable[[One], Tensor]) -> list[Tensor]:
    """Recall of every real row (head, row) of each example, from a dense bool (head, row, key)."""
    return [(one.whole * keep(one)).sum(-1) for one in (One(reading, b) for b in range(reading.stop.shape[0]))]


def vertical_and_slash(one: One) -> Tensor:
    """Three of the last rows; two columns beside the first key, and three distances of which one is the nearest."""
    n, total = one.count, one.count + LATER
    gap = torch.arange(total)[:, None] - torch.arange(total)[None, :]
    shown = torch.zeros_like(one.whole, dtype=torch.bool)
    for h in range(one.whole.shape[0]):
        rows = one.A[h, -3:]
        columns = rows.sum(0)
        columns[0] = math.inf
        slash = torch.tensor([rows[gap[n - 3 : n, :n] == x].sum() for x in range(n)])
        slash[0] = math.inf
        best = set(columns.topk(2).indices.tolist()), set(slash.topk(3).indices.tolist())
        for q in range(total):
            for k in range(q + 1):
                shown[h, q, k] = k in best[0] or q - k in best[1]
    return shown


def gates(one: One, block: int = 3, top: int = 2) -> Tensor:
    """MoBA, row by row."""
    total = one.count + LATER
    shown = torch.zeros_like(one.whole, dtype=torch.bool)
    for h in range(one.whole.shape[0]):
        for t in range(total):
            own, score = t // block, {}
            for n in range(own):
                score[n] = float(one.q[h, t] @ one.k[h // GROUP, n * block : (n + 1) * block].mean(0))
            for n in [own, *sorted(score, key=lambda n: -score[n])[: top - 1]]:
                shown[h, t, n * block : (n + 1) * block] = True
    return shown


def pooled(one: One, block: int = 4, top: int = 2) -> Tensor:
    """MInference's blocks: mean queries by mean keys of blocks that begin no later."""
    total = one.count + LATER
    shown = torch.zeros_like(one.whole, dtype=torch.bool)
    starts = range(0, total, block)
    for h in range(one.whole.shape[0]):
        for r in starts:
            q = one.q[h, r : r + block].mean(0)
            score = {c: float(q @ one.k[h // GROUP, c : c + block].mean(0)) for c in starts if c <= r}
            for c in sorted(score, key=lambda c: -score[c])[:top]:
                shown[h, r : r + block, c : c + block] = True
    return shown


def flexprefill(one: One, b: int = 2, gamma: float = 0.8, tau: float = 0.3, few: int = 1) -> Tensor:
    """FlexPrefill by its specification, with coverages divided by 3 tokens; rows after the prompt see everything."""
    n = one.count
    blocks = -(-n // b)
    shown = torch.ones_like(one.whole, dtype=torch.bool)
    if n <= max(2 * b, few * b):
        return shown
    parts = [slice(c * b, min((c + 1) * b, n)) for c in range(blocks)]
    for h in range(one.whole.shape[0]):
        a, q, k = one.A[h, -b:], one.q[h, :n], one.k[h // GROUP, :n]
        vert, slash = a.mean(0), torch.zeros(n).double()
        for i in range(b):
            for j in range(n - b + i + 1):
                slash[n - 1 - (n - b + i - j)] += a[i, j] / b
        vb, sb = (torch.stack([x[part].sum() for part in parts]) for x in (vert, slash))
        mean_q, mean_k = (torch.stack([x[part].mean(0) for part in parts]) for x in (q, k))
        e = (one.scale * mean_k @ q[-b:].mean(0)).softmax(-1)
        m = (e + vb) / 2
        aware = bool(torch.sqrt(0.5 * (e * (e / m).log()).sum() + 0.5 * (vb * (vb / m).log()).sum()) < tau)
        cover = [int((x.sort(descending=True).values.cumsum(0) <= gamma).sum()) + 1 for x in (vert, slash)]
        counts = [few if aware else min(max(c // 3 + 1, few), blocks) for c in cover]
        vb[0] = sb[-1] = math.inf
        columns = set(vb.topk(counts[0]).indices.tolist())
        offsets = {blocks - 1 - x for x in sb.topk(counts[1]).indices.tolist()}
        active = {(r, c) for r in range(blocks) for c in range(r + 1) if c in columns or r - c in offsets}
        if aware:
            s = one.scale * mean_q @ mean_k.T
            P = s.masked_fill(torch.ones(blocks, blocks).triu(1).bool(), -math.inf).softmax(-1).flatten()
            value, order = P.sort(descending=True)
            kept = order[value.cumsum(0) <= gamma * blocks].tolist()
            active |= {divmod(x, blocks) for x in kept if x % blocks <= x // blocks} | {(0, 0)}
        shown[h, :n, :n] = False
        for r, c in active:
            shown[h, parts[r], parts[c]] = True
    return shown


def longheads(one: One, w: int = 2, n: int = 3, begin: int = 3) -> Tensor:
    """LongHeads, token by token, from queries and keys turned back by matrices; a row of the prompt without itself."""
    d, total = one.q.shape[-1], one.count + LATER
    turn = rotary(torch.arange(total), d)
    q, k = (torch.einsum("tji,htj->hti", turn, x) for x in (one.q, one.k))  # R^T: before RoPE
    shown = torch.ones_like(one.whole, dtype=torch.bool)
    for h in range(q.shape[0]):
        summary = []
        for g in range(total // w):
            here = slice(g * w, g * w + w)
            local_q, local_k = (torch.einsum("tij,tj->ti", turn[:w], x[here]) for x in (q[h], k[h // GROUP]))
            c = ((one.scale * local_q @ local_k.T).softmax(-1) @ one.v[h // GROUP, here]).mean(0)
            summary.append((one.scale * local_k @ c).softmax(-1) @ local_k)
        for t in range(begin, total):
            own = t // w
            forced = {0, own - 1, own}
            score = {g: float(q[h, t] @ summary[g]) for g in range(1, own - 1)}
            kept = forced | set(sorted(score, key=lambda g: -score[g])[: n - len(forced)])
            shown[h, t] = torch.tensor([j // w in kept and (j != t or t >= one.count) for j in range(total)])
    return shown


def critical_blocks(one: One, S: int = 4, c: int = 2) -> Tensor:
    """CritiPrefill's P of one layer by itself: (kv_head, segment, block), 0 where a block is not before it."""
    n = one.count
    P = torch.zeros(one.k.shape[0], -(-n // S), -(-n // c)).double()
    for g in range(P.shape[0]):
        for s in range(1, P.shape[1]):
            score = torch.zeros(s * S // c).double()
            for b in range(len(score)):
                keys = one.prompt[g, b * c : (b + 1) * c]
                for q in one.q[g * GROUP : (g + 1) * GROUP, s * S : min((s + 1) * S, n)]:
                    middle = (q.amax(0) + q.amin(0)) / 2
                    score[b] += max(float(middle @ keys.amax(0)), float(middle @ keys.amin(0))) / GROUP
            P[g, s, : len(score)] = score.softmax(-1)
    return P


def critiprefill(one: One, S: int = 2, c: int = 1, top: int = 1) -> Tensor:
    """The first segment, the last and what comes later are dense; the others see themselves and the best block."""
    P = critical_blocks(one, S, c)
    shown = torch.ones_like(one.whole, dtype=torch.bool)
    for h in range(one.whole.shape[0]):
        for t in range(S, (one.count - 1) // S * S):
            best = P[h // GROUP, t // S, : t // S * S // c].topk(top).indices.tolist()
            shown[h, t] = torch.tensor([j // c in best or j // S == t // S for j in range(shown.shape[-1])])
    return shown


def rectified(
    one: One, b: int = 2, share: float = 0.6, alone: int = 1, least: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Rectified SpaAttn block by block: what is seen, the kept share R of every row, and the rectified output."""
    total, scale = one.count + LATER, one.scale
    parts = [slice(alone, alone)] + [slice(x, min(x + b, total)) for x in range(alone, total, b)]
    shown = torch.zeros_like(one.whole, dtype=torch.bool)
    kept, out = torch.ones(one.whole.shape[:2]).double(), torch.zeros_like(one.q)
    for h in range(one.whole.shape[0]):
        q, k, v = one.q[h], one.k[h // GROUP], one.v[h // GROUP]
        shown[h, :alone] = True
        rest = torch.zeros_like(q)
        for r in range(1, len(parts)):
            mean_q, single = q[parts[r]].mean(0), k[:alone]
            mean_k = torch.stack([k[parts[c]].mean(0) for c in range(1, r + 1)])
            p = (scale * torch.cat([single, mean_k]) @ mean_q).softmax(-1)
            sizes = torch.tensor([parts[c].stop - parts[c].start for c in range(1, r + 1)]).double()
            P = torch.cat([p[:alone].sum()[None], sizes * p[alone:]])
            P = P / P.sum()
            order = P.argsort(descending=True)
            many = max(int((P[order].cumsum(0) <= share).sum()) + 1, least)
            critical = set(order[:many].tolist()) | {0, r, max(r - 1, 0)}
            dq = (q[parts[r]] - mean_q).abs().mean(0)
            for c in range(r + 1):
                if c in critical:
                    shown[h, parts[r], parts[c] if c else slice(0, alone)] = True
                    continue
                own = mean_k[c - 1]
                dk = (k[parts[c]] - own).abs().mean(0)
                if abs(mean_q @ own) > abs(dq @ own) + abs(mean_q @ dk):
                    kept[h, parts[r]] -= P[c]
                    rest[parts[r]] += P[c] * v[parts[c]].mean(0)
        a = one.whole[h] * shown[h]
        out[h] = kept[h, :, None] * (a @ v) / a.sum(-1, keepdim=True) + rest
    return shown, kept, out


def neighbours(one: One) -> Tensor:
    """A window of 3 around tiles of 3, of every second key, of a text that goes on: rows of a longer axis."""
    total = one.count + LATER
    return gna_mask(60, 3, 3, 2)[:total, :total].expand_as(one.whole)


ROWS: dict[str, tuple[dict[str, Any], int, Callable[[One], Tensor]]] = {
    "vertical_slash": ({"window": 3, "vertical": 2, "slash": 3, "first": 1, "near": 1}, 5, vertical_and_slash),
    "moba": ({"block": 3}, 7, gates),
    "block_sparse": ({"block": 4}, 8, pooled),  # short last blocks, some of them before padding
    "flexprefill": ({"block": 2, "gamma": 0.8, "tau": 0.3}, 2, flexprefill),
    "longheads": ({"chunk": 2, "begin": 3}, 7, longheads),
    "critiprefill": ({"segment": 2, "block": 1, "begin": 1, "skip": 0}, 1, critiprefill),
    "rectified_spaattn": ({"block": 2, "share": 0.6, "alone": 1}, 2, lambda one: rectified(one)[0]),
    "neighbourhood": ({"stride": 3, "dilation": 2, "causal": False}, 3, neighbours),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_see_what_the_specification_shows(
    readings: list[Reading], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headscope.interp.cache.rows.vertical_slash.LEAST", (1, 1))
    monkeypatch.setattr("headscope.interp.cache.rows.flexprefill.TOKENS", 3)
    settings, budget, written = ROWS[name]
    for reading in readings:
        keep = POLICIES[name](**settings).keeps(reading, [Budget(keys=budget)])
        found = losses(reading.call.inputs(), reading.call.value, keep, held=200)[0].recall
        for b, wanted in enumerate(kept_by_hand(reading, written)):
            one = One(reading, b)
            mine = found[b, :, one.first : one.stop + LATER]
            assert (mine - wanted).abs().max() < 1e-5
            assert 0.2 < float(wanted.mean()) < 0.999


def test_critiprefill_blends_in_the_layer_before(readings: list[Reading]) -> None:
    """The same calls as layers 1 and 2 of a model: 0.25 P' + 0.75 P; a layer that is skipped is whole."""
    policy = POLICIES["critiprefill"](segment=4, block=2, begin=1)
    carried: dict[int, Tensor] = {}
    each = [replace(x, call=x.call.with_(layer=i + 1), carried=carried) for i, x in enumerate(readings)]
    found = [policy.criticality(reading) for reading in each]
    for b in range(found[0].shape[0]):
        own = [critical_blocks(One(reading, b)) for reading in each]
        wanted = own[0], 0.25 * own[0] + 0.75 * own[1]
        for mine, P in zip(found, wanted, strict=True):
            assert (mine[b, :, 1 : P.shape[1], : P.shape[2]] - P[:, 1:]).abs().max() < 1e-5
    tile = policy.keeps(readings[0], [Budget(keys=4)])[0](Tile(slice(0, 9), slice(0, 9), torch.zeros(1, 4, 9, 9)))
    assert tile.all() and readings[0].call.layer == 0


def test_the_rectified_output_and_the_estimated_recall(readings: list[Reading]) -> None:
    """Sums of at most 18 weights of 1e-7 each, times values of a few units: 1e-5."""
    policy, budget, repaired = POLICIES["rectified_spaattn"](block=2, share=0.6, alone=1), Budget(keys=2), 0
    for reading in readings:
        kept, out = policy.implicit(reading, budget).kept, policy.output(reading, budget)
        for b in range(out.shape[0]):
            one = One(reading, b)
            _, wanted, z = rectified(one)
            assert (out[b, :, one.first : one.stop + LATER] - z).abs().max() < 1e-5
            mine = kept[b, :, 1:].repeat_interleave(2, -1)[:, : wanted.shape[1] - 1]
            assert (mine - wanted[:, 1:]).abs().max() < 1e-5
            repaired += int((wanted < 1).sum())
    assert repaired


def test_layers_that_keep_enough_of_the_last_rows_are_sparse(readings: list[Reading]) -> None:
    """By hand from the last 3 rows; whichever the threshold, a text is whole or is the sparse policy's."""
    budget, policy = [Budget(keys=3)], POLICIES["routed"](sparse="knorm", window=3)
    for reading in readings:
        sparse = POLICIES["knorm"]().keeps(reading, budget)[0]
        assert isinstance(sparse, Tensor)
        recall = []
        for b in range(reading.stop.shape[0]):
            one = One(reading, b)
            shown = sparse[b, :, one.first : one.stop].repeat_interleave(4 // sparse.shape[1], 0)
            recall.append(float((one.A[:, -3:] * shown[:, None]).sum(-1).mean()))
        for least in (*((x + 1e-4) for x in recall), *((x - 1e-4) for x in recall)):
            whole = [x < least for x in recall]
            routed = replace(policy, least=least)
            assert routed.kept_whole(reading, budget)[0].tolist() == whole
            keep = routed.keeps(reading, budget)[0]
            assert isinstance(keep, Tensor)
            for b, dense in enumerate(whole):
                assert keep[b].all() if dense else torch.equal(keep[b], sparse[b])
        rows = replace(policy, sparse="moba", least=1.0).keeps(reading, budget)[0]
        tile = Tile(slice(4, 9), slice(0, 9), torch.zeros(1, 4, 5, 9))
        assert callable(rows) and rows(tile).shape[-2:] == (5, 9)
    with pytest.raises(HeadscopeError, match="oracle needs measured"):
        POLICIES["routed"](sparse="oracle")
    with pytest.raises(HeadscopeError, match="did you mean 'knorm'"):
        POLICIES["routed"](sparse="knrm")


def grid_by_hand(shape: tuple[int, ...], w: int, s: int, dl: int, causal: bool) -> Tensor:
    """The definition, place by place, of windows alike along every axis."""
    places = list(product(*map(range, shape)))
    mask = torch.ones(len(places), len(places), dtype=torch.bool)
    for a, query in enumerate(places):
        for b, key in enumerate(places):
            for x, i, j in zip(shape, query, key, strict=True):
                members = [y for y in range(x) if y % dl == i % dl]
                at, other, last = i // dl, j // dl, len(members) - 1
                if causal:
                    seen = other <= at and min(at // s * s + s - 1, last) - other < w
                else:
                    leader = min(at // s * s + s // 2, last)
                    centre = min(max(leader, w // 2), last - (w // 2 + w % 2 - 1))
                    seen = centre - w // 2 <= other <= centre + w // 2 + w % 2 - 1
                mask[a, b] &= seen and j % dl == i % dl
    return mask


def test_neighbourhoods_of_grids() -> None:
    settings = [(4, 1, 1), (5, 1, 1), (4, 3, 2), (3, 2, 3), (6, 6, 1)]
    cases = [((13,), *one) for one in settings] + [((6, 7), 3, 2, 2)]
    for (shape, w, s, dl), causal in product(cases, [False, True]):
        mask = gna_mask(shape if len(shape) > 1 else shape[0], w, s, dl, causal)
        assert torch.equal(mask, grid_by_hand(shape, w, s, dl, causal)), (shape, w, s, dl, causal)
        if not causal:
            assert (mask.sum(-1) == w ** len(shape)).all()  # windows move at borders, and do not shrink
    both = gna_mask((6, 5), (3, 2), (1, 2), causal=(True, False))
    assert torch.equal(both, torch.kron(gna_mask(6, 3, 1, 1, True).int(), gna_mask(5, 2, 2).int()).bool())
    with pytest.raises(HeadscopeError, match="a stride of 1 to the window"):
        gna_mask(8, 3, 4)
    with pytest.raises(HeadscopeError, match="2 values for 1 axes"):
        gna_mask(8, (3, 3))
    with pytest.raises(HeadscopeError, match="more than the window, 2"):
        POLICIES["neighbourhood"](stride=3).shows(torch.arange(4), torch.arange(4), torch.tensor(2))


def test_a_stride_of_one_is_a_sliding_window() -> None:
    at = torch.arange(9)
    seen = POLICIES["neighbourhood"]().shows(at[:, None], at[None, :], torch.tensor(3))
    gap = at[:, None] - at[None, :]
    assert torch.equal(seen, (gap >= 0) & (gap < 3))


def test_flexprefill_takes_more_blocks_of_query_aware_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every block holds mass (without a window) heads of both kinds are found."""
    monkeypatch.setattr("headscope.interp.cache.rows.flexprefill.TOKENS", 3)
    handler, tau = Calls(), 0.25
    whole = tiny(None)
    with attached(whole, handler), torch.no_grad():
        whole(torch.arange(3, 27)[None])
    kinds = []
    for call in handler.calls:
        reading = Reading(call, torch.tensor([20]))
        policy = POLICIES["flexprefill"](block=2, gamma=0.8, tau=tau)
        kinds += policy.decide(reading, 0, 2).query_aware.tolist()
        found = losses(call.inputs(), call.value, policy.keeps(reading, [Budget(keys=2)]))[0].recall[0]
        one = One(reading, 0)
        assert (found - (one.whole * flexprefill(one, tau=tau)).sum(-1)).abs().max() < 1e-5
    assert any(kinds) and not all(kinds)


def test_pseudo_queries_are_read_where_the_answer_will_stand(model: MistralForCausalLM) -> None:
    """Scores of DapQ from queries of tokens that were appended: softmax over the prompt's keys alone."""
    policy = POLICIES["dapq"](tokens=4, kernel=3)
    ids = torch.arange(5, 15)[None]
    assert policy.appended(ids[0].tolist()) == [5, 6, 13, 14]
    handler = Calls()
    with attached(model, handler), torch.no_grad():
        model(torch.cat([ids, torch.tensor([[5, 6, 13, 14]])], 1))
    for call in handler.calls:
        reading = Reading(call, torch.tensor([10]), ahead=call.query[:, :, 10:])
        s = call.query[0, :, 10:].double() @ call.key[0, :, :10].double().repeat_interleave(2, 0).transpose(1, 2)
        gap = torch.arange(10, 14)[:, None] - torch.arange(10)[None, :]
        hidden = gap > (call.mask.left if call.mask.left is not None else math.inf)
        mass = (s * call.scale).masked_fill(hidden, -torch.inf).softmax(-1).mean(1)
        wide = torch.nn.functional.pad(mass, (1, 1))
        wanted = grouped((wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]) / 3)
        assert (policy.scores(reading)[0, :, :10] - wanted).abs().max() < 1e-5


def test_budgets_and_ties() -> None:
    assert Budget.of("0.29").count(torch.tensor([100, 7])).tolist() == [29, 2]
    assert str(Budget.of(64)) == "64" and Budget.of("64") == Budget(keys=64)
    for bad in (0, -1, 1.5, "many", True, None, 1.0, "1.0"):
        with pytest.raises(HeadscopeError, match="a budget (is|of)"):
            Budget.of(bad)
