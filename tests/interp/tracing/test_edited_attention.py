"""Edits of a layer's scores and of its mass: the output, the statistics and the pattern are those of the edited one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.sites import attached
from headscope.interp.statistics import Entropy, KeyMass, SinkMass
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing.recording import trace
from headscope.kernels.redistribution import Redistribution
from headscope.kernels.redistribution import dense as redistributed
from headscope.kernels.score_edits import ScoreEdit, distance_slope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# scores of 16 or so keys and d_head 16 to 32, in float32: products, softmax and the sum over values
NEAR = 64 * torch.finfo(torch.float32).eps


def weigh(call: AttentionCall) -> AttentionCall:
    """The first key counts a tenth in head 1."""
    bias = torch.zeros(1, call.query.shape[1], call.key.shape[2], device=DEVICE)
    bias[0, 1, 0] = np.log(0.1)
    return call.with_key_bias(bias)


def slope(call: AttentionCall) -> AttentionCall:
    """Every second head loses a score of 0.2 a token of distance."""
    heads = call.query.shape[1]
    edit = distance_slope(torch.full((heads,), 0.2, device=DEVICE)).on_heads(range(0, heads, 2), heads, device=DEVICE)
    return call.with_score_edit(edit)


def move(call: AttentionCall) -> AttentionCall:
    """Head 1 gives half of the first key's mass to the keys after the third."""
    keep = torch.ones(call.query.shape[1])
    keep[1] = 0.5
    at = torch.arange(call.key.shape[2])
    return call.with_redistribution(Redistribution(at < 1, keep, onto=at > 2))


def twice(call: AttentionCall) -> AttentionCall:
    """Then every head's second key gives a third of what it has by now to all others, the first key too."""
    keys = torch.arange(call.key.shape[2]) == 1
    return move(call).with_redistribution(Redistribution(keys, 2 / 3))


def inputs_of(kind: str) -> dict[str, Tensor]:
    ids = torch.randint(4, 100, (2, 16), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :9]} if kind == "encoder-decoder" else {})


class Edit(Handler):
    """Changes every call, and keeps what each gave."""

    def __init__(self, change) -> None:
        self.change = change
        self.seen: list[tuple[AttentionCall, Tensor]] = []

    def edit(self, call: AttentionCall) -> AttentionCall:
        return self.change(call)

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        self.seen.append((call, z))
        return z


def dense(call: AttentionCall) -> Tensor:
    """The edited pattern (batch, head, query, key) in float64, from the definition."""
    q, k = call.query.double(), call.key.double().repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    s = q @ k.transpose(2, 3) * call.scale
    if call.softcap is not None:
        s = call.softcap * torch.tanh(s / call.softcap)
    if call.position_bias is not None:
        s = s + call.position_bias
    if call.key_bias is not None:
        s = s + call.key_bias[:, :, None]
    batch, heads, queries, keys = s.shape
    rows, columns = torch.arange(queries, device=DEVICE), torch.arange(keys, device=DEVICE)
    each = torch.arange(heads, device=DEVICE)
    if call.score_edit is not None:
        at = rows + call.mask.query_offset, columns + call.mask.key_offset
        s = call.score_edit.tile(s, torch.arange(batch, device=DEVICE), each, *at)
    seen = call.mask.tile(rows, columns, each)
    s = s if seen is None else s.masked_fill(~seen, -torch.inf)
    if call.sinks is not None:
        s = torch.cat([s, call.sinks.detach().double()[None, :, None, None].expand(batch, -1, queries, 1)], -1)
    p = s.softmax(-1)[..., :keys]
    return p if call.redistribution is None else redistributed(p, call.redistribution)


def both(call: AttentionCall) -> AttentionCall:
    """Edits of scores add up, each twice, and mass moves after them."""
    return slope(weigh(slope(weigh(twice(call)))))


def test_edits_add_up():
    calls = Edit(lambda call: call)
    model = tiny_model("llama").to(DEVICE)
    with attached(model, calls), torch.no_grad():
        model(**inputs_of("causal-lm"))
    call = calls.seen[0][0]
    once, twice = weigh(call), weigh(weigh(call))
    assert torch.equal(twice.key_bias, 2 * once.key_bias)
    ones = torch.ones(1, 1, 1, 1, device=DEVICE)
    at = (ones.long() * 0, ones.long() * 0, ones.long() * 9, ones.long() * 4)  # head 0, five tokens away
    assert float(slope(slope(call)).score_edit(ones, *at)) == pytest.approx(1.0 - 2 * 5 * 0.2)


@pytest.mark.parametrize("change", [weigh, slope, move, twice, both])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "causal-lm"), ("gemma2", "causal-lm"), ("gpt_oss", "causal-lm"), ("t5", "encoder-decoder")],
)
def test_outputs_and_statistics_are_of_the_edited_scores(name, kind, change):
    model = tiny_model(name, kind).to(DEVICE)
    edit = Edit(change)
    with trace(model, [Entropy(), SinkMass(1), KeyMass()]) as tracer, attached(model, edit):
        model(**inputs_of(kind))
    site = tracer.record.attrs["module"]
    calls = [(call, z) for call, z in edit.seen if call.module == site]
    assert calls
    for (call, z), layer in zip(calls, tracer.record["layer"].to_numpy(), strict=True):
        pattern = dense(call)
        values = call.value.double().repeat_interleave(z.shape[1] // call.value.shape[1], 1)
        assert (z - pattern @ values).abs().max() <= NEAR * max(1.0, float(values.abs().max()))
        assert (call.pattern() - pattern).abs().max() <= NEAR
        found = tracer.record.sel(layer=layer)
        assert np.abs(found.sink_mass.values - pattern[..., 0].cpu().numpy()).max() <= NEAR
        assert np.abs(found.entropy.values - torch.special.entr(pattern).sum(-1).cpu().numpy()).max() <= 4 * NEAR
        assert np.abs(found.key_mass.values - pattern.sum(2).cpu().numpy()).max() <= pattern.shape[2] * NEAR


@pytest.mark.parametrize("change", [weigh, move])
def test_an_edit_changes_the_heads_it_names_alone(change):
    model = tiny_model("llama").to(DEVICE)
    inputs = inputs_of("causal-lm")
    plain, edited = Edit(lambda call: call), Edit(change)
    for handler in (plain, edited):
        with attached(model, handler), torch.no_grad():
            model(**inputs)
    before, after = plain.seen[0][1], edited.seen[0][1]  # the first layer: the same queries and keys
    changed = (before - after).abs().amax((0, 2, 3)) > NEAR  # another engine computes the other heads as well
    assert changed.tolist() == [head == 1 for head in range(before.shape[1])]


def test_nothing_is_left_and_a_wrong_edit_says_so():
    model = tiny_model("llama").to(DEVICE)
    inputs = inputs_of("causal-lm")
    with torch.no_grad():
        before = model(**inputs).logits
    wrong = Edit(lambda call: call.with_score_edit(ScoreEdit(lambda s, b, h, q, k: s[..., :1])))
    with pytest.raises(ValueError, match="a score edit was given"):
        with attached(model, wrong), torch.no_grad():
            model(**inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
