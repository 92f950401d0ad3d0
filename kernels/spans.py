"""What a head wrote from each named span of keys: sum over the span of p_ij v_j, every key read once.

1. Attention over some keys S alone gives o_S = sum_S exp(s_ij - lse_S) v_j and lse_S; as p_ij = exp(s_ij - lse_i),
   their share of the output is exp(lse_S - lse) o_S, and their mass exp(lse_S - lse).
2. The ends of all spans cut the keys into segments. A span is the sum of its segments, so that overlapping spans read
   no key twice, and lse is the log of the sum over all segments, those outside any span without an output: one pass.
3. A segment is a call on a slice of the keys whose mask has a larger key offset; where the examples of a batch name
   different spans, the mask's ``start`` and ``end`` tell them apart.
4. The output of a span that is one segment goes where it will stay, and is scaled there once lse is known; only
   segments of which spans are sums are kept beside the result.
5. Where Triton computes, one launch does all spans, as if each were an example whose mask starts and ends with it: no
   program visits a key outside its span. Rows are scaled as they are stored where lse is known, by a pass of its own or
   from the caller; spans that cut up the keys give it themselves, and are scaled once more. A key is read once a span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from headscope.kernels import attention, reference
from headscope.kernels.fallback import falls_back
from headscope.kernels.masks import Mask
from headscope.kernels.replay import again
from headscope.kernels.request import Request
from headscope.kernels.scores import Scores

Span = tuple[int, int]
Named = tuple[tuple[Span, ...], ...]  # the spans of every example, or of all


class SpanOutputs(NamedTuple):
    """``output`` (batch, head, query, span, d_value) in the value's dtype; ``mass`` (batch, head, query, span)."""

    output: Tensor
    mass: Tensor


class _Segment(NamedTuple):
    """Attention over one segment, and which spans hold it: bool (batch or 1, span); no output where no sum needs it."""

    output: Tensor | None
    lse: Tensor
    inside: Tensor


@torch.no_grad()
def span_outputs(
    scores: Scores,
    v: Tensor,
    spans: Sequence[Span] | Tensor,
    *,
    lse: Tensor | None = None,
    engine: attention.Engine = "auto",
) -> SpanOutputs:
    """The output split by span; ``spans`` are key *indices* ``(start, stop)``, or a tensor (batch or 1, span, 2).

    ``v`` (batch, kv_head, key, d_value). Spans may overlap. ``lse`` (batch, head,
    query), if known, saves reading the keys outside every span. Raises ValueError for a span outside the keys.
    """
    batch, heads, queries, count = scores.shape
    device = scores.q.device
    every = _checked(spans, batch, count)
    if every[0] and v.numel() and scores.q.numel() and _by_triton(scores, v, engine):
        with falls_back("attention over one segment after the other"):
            return _at_once(scores, v, every, lse)
    named = torch.tensor(every, dtype=torch.int64).view(len(every), -1, 2)
    ends = named.new_tensor([[0, count]]).expand(named.shape[0], -1)
    cuts = torch.cat([named.flatten(1), ends], 1).sort().values
    whole = replace(scores, sinks=None)
    shape = (batch, heads, queries, named.shape[1])
    output, segments = v.new_zeros(*shape, v.shape[3]), []
    parts = list(zip(cuts[:, :-1].T, cuts[:, 1:].T, strict=True))
    holds = [(named[..., 0] <= start[:, None]) & (stop[:, None] <= named[..., 1]) for start, stop in parts]
    holds = [held & (start < stop)[:, None] for held, (start, stop) in zip(holds, parts, strict=True)]
    alone = torch.stack([held.any(0) for held in holds]).sum(0) == 1  # (span,): it is one segment
    for inside, (start, stop) in zip(holds, parts, strict=True):
        if not (start < stop).any() or (lse is not None and not inside.any()):
            continue
        keys, here = _slice(whole, start, stop)
        request = Request(output=bool(inside.any()), lse=True)
        got = attention.attend(here, v[:, :, keys], request=request, engine=engine)
        assert got.lse is not None
        mine = inside.any(0)
        for n in (mine & alone).nonzero()[:, 0].tolist():
            assert got.output is not None
            output[..., n, :] = got.output
        segments.append(_Segment(got.output if (mine & ~alone).any() else None, got.lse, inside.to(device)))
    if not segments:
        return SpanOutputs(output, v.new_zeros(shape).to(_wide(v)))
    lse = reference.log_total(torch.stack([x.lse for x in segments], -1), scores.sinks) if lse is None else lse
    return SpanOutputs(output, _summed(segments, lse, output, alone.tolist()))


def _by_triton(scores: Scores, v: Tensor, engine: attention.Engine) -> bool:
    return scores.in_kernels and attention.uses_triton(engine, scores) and scores.k.dtype == v.dtype


def _at_once(scores: Scores, v: Tensor, named: Named, lse: Tensor | None) -> SpanOutputs:
    """Step 5. Spans ``named`` become examples: those of an example follow one another."""
    from headscope.kernels.gpu_passes import rows
    from headscope.kernels.triton.span_shares import span_shares

    (batch, heads, queries, keys), spans, sinks = scores.shape, len(named[0]), scores.sinks
    options = scores.device_arguments
    if lse is None and not _cuts(named, keys):
        lse = rows(scores.q, scores.k, None, sinks=sinks, **options).lse
    each = (batch, spans, heads, queries)
    total = None if lse is None else lse.float().contiguous()
    within = None if total is None else total[:, None].expand(each).reshape(-1, heads, queries).contiguous()
    mask, bias = _in_spans(scores.mask, named, batch, scores.q.device), _repeated(scores.bias, spans)
    options |= {"mask": mask, "repeat": spans, "bias": bias}

    def run() -> tuple[Tensor, Tensor]:
        wants = frozenset({"lse", "output"})
        found = rows(scores.q, scores.k, v, wants=wants, within=within, **options)
        assert found.lse is not None and found.output is not None
        return found.output, span_shares(found.lse, found.output, total, sinks, spans)

    tensors = (scores.q, scores.k, v, sinks, total, within, bias, *mask.tensors)
    about = ("spans", spans, scores.scale, scores.softcap, *mask.numbers)
    output, mass = run() if scores.edit is not None else again(run, tensors, about)
    assert output is not None and mass is not None
    return SpanOutputs(output.view(*each, -1).movedim(1, 3), mass.view(each).movedim(1, 3))


@lru_cache(256)
def _cuts(named: Named, keys: int) -> bool:
    """Whether every example's spans cut up the ``keys``: none is in two of them, or in none."""
    for spans in named:
        ends = [0, *(end for span in sorted(span for span in spans if span[0] < span[1]) for end in span), keys]
        if any(a != b for a, b in zip(ends[::2], ends[1::2], strict=True)):
            return False
    return True


def _in_spans(mask: Mask, named: Named, batch: int, device: torch.device) -> Mask:
    """``mask`` for an example of every span, which sees the keys of the span alone."""
    begin, end = _bounds(named, batch, mask.key_offset, device)
    spans = len(named[0])
    if mask.start is not None:
        begin = torch.maximum(begin.view(batch, spans), mask.start[:, None]).flatten()
    if mask.end is not None:
        end = torch.minimum(end.view(batch, spans), mask.end[:, None]).flatten()
    origin, segments = (_repeated(x, spans) for x in (mask.origin, mask.segments))
    return replace(mask, start=begin, end=end, origin=origin, segments=segments)


@lru_cache(256)  # all layers of a model ask for the same, and a copy to the card waits for all that it is to do before
def _bounds(named: Named, batch: int, offset: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where every example's spans start and stop, as positions (batch * span,) on ``device``."""
    every = torch.tensor(named).expand(batch, -1, -1) + offset
    begin, end = (x.flatten().contiguous().to(device) for x in every.unbind(-1))
    return begin, end


def _repeated(x: Tensor | None, spans: int) -> Tensor | None:
    return x if x is None or x.shape[0] == 1 else x.repeat_interleave(spans, 0)


def _checked(spans: Sequence[Span] | Tensor, batch: int, keys: int) -> Named:
    """The spans of every example, or of all."""
    each = spans.tolist() if isinstance(spans, Tensor) else [spans]
    try:
        named = tuple(tuple([(int(start), int(stop)) for start, stop in one]) for one in each)
    except (TypeError, ValueError):
        named = ()
    if len(named) not in (1, batch):
        shape = tuple(spans.shape) if isinstance(spans, Tensor) else spans
        raise ValueError(f"spans must be (start, stop) pairs or a tensor ({batch} or 1, span, 2); got {shape}")
    for start, stop in (span for one in named for span in one):
        if not 0 <= start <= stop <= keys:
            raise ValueError(f"span {start}:{stop} lies outside the {keys} keys")
    return named


def _slice(scores: Scores, start: Tensor, stop: Tensor) -> tuple[slice, Scores]:
    """The keys to slice, and their scores, for each example's segment ``start:stop`` (batch or 1,)."""
    some, mask = start < stop, scores.mask
    keys = slice(int(start[some].min()), int(stop[some].max()))
    here = scores.keys(keys)
    if bool((start == keys.start).all() and (stop == keys.stop).all()):
        return keys, here
    begin, end = ((x + mask.key_offset).to(scores.q.device) for x in (start, stop))
    begin = begin if mask.start is None else torch.maximum(begin, mask.start)
    end = end if mask.end is None else torch.minimum(end, mask.end)
    return keys, replace(here, mask=replace(here.mask, start=begin, end=end))


def _summed(segments: list[_Segment], lse: Tensor, output: Tensor, alone: list[bool]) -> Tensor:
    """Steps 1, 2 and 4: the mass (batch, head, query, span), of the segments in every span; ``output`` is completed."""
    mass = torch.zeros(output.shape[:-1], dtype=_wide(output), device=output.device)
    weights = [torch.exp(x.lse - lse).masked_fill_(x.lse == -torch.inf, 0.0) for x in segments]
    for n, one in enumerate(alone):
        total = None
        for segment, weight in zip(segments, weights, strict=True):
            if not segment.inside[:, n].any():
                continue
            share = weight * segment.inside[:, n, None, None]
            mass[..., n] += share
            if one:
                output[..., n, :] *= share[..., None]
            else:
                assert segment.output is not None
                total = output.new_zeros((), dtype=mass.dtype) if total is None else total
                total = torch.addcmul(total, segment.output, share[..., None])
        if total is not None:
            output[..., n, :] = total
    return mass


def _wide(v: Tensor) -> torch.dtype:
    return torch.promote_types(v.dtype, torch.float32)
