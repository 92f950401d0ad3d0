"""Two runs held against each other, and what heads write from spans: against dense patterns of the same calls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from headscope.interp import keep_attention, trace
from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import attached
from headscope.interp.statistics import Divergence, HeadOutput, SpanOutput
from headscope.interp.statistics.queries import Last
from headscope.interp.survey.tiny import tiny_model
from headscope.kernels.divergence import dense
from headscope.kernels.redistribution import Redistribution
from headscope.kernels.score_edits import distance_slope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("js_divergence", "kl_divergence", "total_variation", "cosine_similarity")
NEAR = 256 * torch.finfo(torch.float32).eps  # logarithms of float32 weights of up to 24 keys, and their sums


class Edit(Handler):
    """Changes every call, and keeps each call and its pattern."""

    def __init__(self, change=lambda call: call) -> None:
        self.change = change
        self.calls: list[AttentionCall] = []
        self.patterns: list[Tensor] = []

    def edit(self, call: AttentionCall) -> AttentionCall:
        return self.change(call)

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        self.calls.append(call)
        self.patterns.append(call.pattern().double().cpu())
        return z


def weigh(call: AttentionCall) -> AttentionCall:
    """Head 1 sees a tenth of the first key."""
    bias = torch.zeros(1, call.query.shape[1], call.key.shape[2], device=DEVICE)
    bias[0, 1, 0] = np.log(0.1)
    return call.with_key_bias(bias)


def slope(call: AttentionCall) -> AttentionCall:
    """Every head another score a token of distance."""
    return call.with_score_edit(distance_slope(0.1 * torch.arange(1.0, 1 + call.query.shape[1], device=DEVICE)))


def move(call: AttentionCall) -> AttentionCall:
    """Heads give the first key's mass away, some all of it."""
    keep = torch.linspace(0, 1, call.query.shape[1])
    return call.with_redistribution(Redistribution(torch.arange(call.key.shape[2]) < 1, keep))


def interrupt(call: AttentionCall) -> AttentionCall:
    if call.layer == 1:
        raise KeyboardInterrupt
    return call


def window(call: AttentionCall) -> AttentionCall:
    """Three keys are seen, with other scores."""
    return call.with_(mask=replace(call.mask, left=2), scale=3 * call.scale)


def batch(side: str | None = None) -> dict[str, Tensor]:
    ids = torch.randint(4, 100, (2, 17), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids)
    if side is not None:
        real[0, slice(0, 5) if side == "left" else slice(12, 17)] = 0
    return {"input_ids": ids.to(DEVICE), "attention_mask": real.to(DEVICE)}


@pytest.mark.parametrize("change", [weigh, slope, window])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_what_an_edit_does_to_every_pattern(name, side, change):
    model, inputs = tiny_model(name).to(DEVICE), batch(side)
    before, after = Edit(), Edit(change)
    with keep_attention(model) as kept, attached(model, before):
        model(**inputs)
    with trace(model, [Divergence(kept)]) as tracer, attached(model, after):
        model(**inputs)
    n = len(tracer.record["layer"])
    real = inputs["attention_mask"].bool().cpu()
    for layer, (p, r) in enumerate(zip(before.patterns[-n:], after.patterns[-n:], strict=True)):
        for field, want in zip(NAMES, dense(p.log(), r.log()), strict=True):
            found = tracer.record[field].values[:, layer]
            for b in range(2):
                own = want[b][:, real[b]].numpy()
                mine = found[b, :, : own.shape[1]]
                same = np.isposinf(mine) & np.isposinf(own)  # where a run hides a key that the other looks at
                with np.errstate(invalid="ignore"):
                    assert (same | (np.abs(mine - own) < NEAR * np.maximum(1.0, np.abs(own)))).all()
                assert np.isnan(found[b, :, own.shape[1] :]).all()
    first = tracer.record["js_divergence"].values[1, 0]
    assert (first.max(-1) > 1e-4).tolist() == [change is not weigh or head == 1 for head in range(first.shape[0])]


def test_a_packed_text_of_other_lengths_is_its_own_pattern():
    """Sequences that end elsewhere hide other keys."""
    model, ids = tiny_model("llama").to(DEVICE), batch()["input_ids"][:1]
    runs = [torch.tensor([[*range(n), *range(17 - n)]], device=DEVICE) for n in (6, 11)]
    sides = []
    for positions in runs:
        with keep_attention(model, layers=[0]) as kept, attached(model, seen := Edit()):
            model(ids, position_ids=positions, use_cache=False)
        sides.append((kept, seen.patterns[-2]))
    with trace(model, [Divergence(sides[0][0])], layers=[0]) as tracer:
        model(ids, position_ids=runs[1], use_cache=False)
    want = dense(sides[0][1].log(), sides[1][1].log()).tv
    assert np.abs(tracer.record["total_variation"].values[:, 0] - want.numpy()).max() < NEAR and want.max() > 0.1


def test_the_tower_that_reads_text_is_kept():
    """A vision tower beside it attends image by image."""
    model = tiny_model("gemma3", "image-text")
    with keep_attention(model) as kept:
        model(input_ids=torch.tensor([[5, 6, 7, 8]]))
    with trace(model, [Divergence(kept)]) as tracer:
        model(input_ids=torch.tensor([[5, 6, 7, 8]]))
    assert "language" in tracer.record.attrs["module"] and float(tracer.record["js_divergence"].max()) < NEAR


def test_another_text_through_a_cache_and_of_some_rows():
    model = tiny_model("llama").to(DEVICE)
    one, other = (torch.randint(4, 100, (1, 12), generator=torch.Generator().manual_seed(n)).to(DEVICE) for n in (0, 1))
    with keep_attention(model, layers=[1], device="cpu") as kept:
        model(one)
    with trace(model, [Divergence(kept)], layers=[1]) as tracer:
        model(other)
    whole = tracer.record
    with trace(model, [Divergence(kept)], layers=[1], queries=Last(3)) as tracer:
        model(other)
    np.testing.assert_array_equal(tracer.record["js_divergence"].values, whole["js_divergence"].values[..., -3:])
    with keep_attention(model, layers=[1]) as parts:
        cache = DynamicCache(config=model.config)
        for at in range(0, 12, 5):
            model(one[:, at : at + 5], past_key_values=cache)
    cache = DynamicCache(config=model.config)
    with trace(model, [Divergence(parts)], layers=[1]) as tracer:
        for at in range(0, 12, 5):
            model(other[:, at : at + 5], past_key_values=cache)
    assert np.abs(tracer.record["js_divergence"].values - whole["js_divergence"].values).max() < NEAR


def test_runs_that_cannot_be_held_against_each_other():
    model, inputs = tiny_model("llama").to(DEVICE), batch()
    with keep_attention(model, layers=[0]) as kept:
        model(**inputs)
    with pytest.raises(HeadscopeError, match="nothing was kept"), trace(model, [Divergence(kept)]):
        model(**inputs)
    with pytest.raises(HeadscopeError, match="other padding"), trace(model, [Divergence(kept)], layers=[0]):
        model(**batch("left"))
    with pytest.raises(HeadscopeError, match="other padding"), trace(model, [Divergence(kept)], layers=[0]):
        model(inputs["input_ids"][:, :9])
    with pytest.raises(HeadscopeError, match="once more"), keep_attention(model):
        model(**inputs)
        model(**inputs)
    with keep_attention(model, layers=[0]) as again:
        with pytest.raises(KeyboardInterrupt), attached(model, Edit(interrupt)):
            model(**inputs)
        model(**inputs)  # the pass that broke off left nothing
    assert str(again) == str(kept) == "ReferenceRun(1 calls)"
    vision = tiny_model("qwen2_vl", "image-text")
    with pytest.raises(HeadscopeError, match="no tower"), keep_attention(vision, tower="eyes"):
        pass
    moved = attached(model, Edit(move))
    with pytest.raises(HeadscopeError, match="mass was moved"), trace(model, [Divergence(kept)], layers=[0]), moved:
        model(**inputs)


@pytest.mark.parametrize("change", [lambda call: call, slope, move])
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_what_heads_write_from_spans(name, side, change):
    model, inputs, seen = tiny_model(name).to(DEVICE), batch(side), Edit(change)
    spans = {"sink": (0, 1), "each": [(1, 4), (2, 6)], "scattered": [[(5, 6), (8, 9)], [(6, 9)]]}
    spans |= {"all": (0, 17)}
    positions = (7, -1)
    statistics = [SpanOutput(spans, positions), HeadOutput(positions)]
    with trace(model, statistics) as tracer, attached(model, seen):
        model(**inputs)
    record = tracer.record
    assert record["z_span"].dims == ("example", "layer", "head", "position", "span", "d_head")
    assert np.abs(record["z_span"].sel(span="all").values - record["z"].values).max() < NEAR
    n = len(record["layer"])
    real = inputs["attention_mask"].bool().cpu()
    for layer, (call, p) in enumerate(zip(seen.calls[-n:], seen.patterns[-n:], strict=True)):
        v = call.value.double().cpu().repeat_interleave(p.shape[1] // call.value.shape[1], 1)
        for b in range(2):
            tokens = real[b].nonzero()[:, 0]
            for i, position in enumerate(positions):
                row = tokens[position]
                spans_of = {"sink": [0], "each": [[1, 2, 3], [2, 3, 4, 5]][b], "scattered": [[5, 8], [6, 7, 8]][b]}
                for span, held in spans_of.items():
                    keys = tokens[held]
                    want = (p[b, :, row, keys][..., None] * v[b][:, keys]).sum(1)
                    found = record["z_span"].sel(layer=layer, span=span).values[b, :, i]
                    assert np.abs(found - want.numpy()).max() < NEAR


def test_spans_that_do_not_fit():
    with pytest.raises(HeadscopeError, match="at least one named span"):
        SpanOutput()
    with pytest.raises(HeadscopeError, match="dimension position"):
        with trace(tiny_model("llama").to(DEVICE), [SpanOutput({"all": (0, 9)}), HeadOutput((0,))]):
            pass
