"""The TransformerLens site: hooks, handlers inside ``run_with_hooks``, edits, passes that break off; nothing stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from headscope.interp import Tracer, trace
from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import attached, is_attached, verify_once
from headscope.interp.sites.transformer_lens import route as bridge_site
from headscope.interp.statistics import Entropy, HeadOutput, KeyMass, SinkMass, TopKeys
from headscope.interventions import AblateHeads, Intervention, apply

STATISTICS = [Entropy(), SinkMass(), KeyMass(), TopKeys(1), HeadOutput((-1,))]
HEADS = [(0, 1), (1, 3)]


class DoublesValues(Intervention):
    def edit(self, call: AttentionCall) -> AttentionCall:
        return call.with_(value=call.value * 2.0)


class Fails(Handler):
    def observe(self, call: AttentionCall, reduced: Any) -> None:
        raise AssertionError("not asked for anything")

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        if call.layer == 1:
            raise RuntimeError("in the middle")
        return z


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_nothing_stays_on_a_bridge(kit: Any, name: str) -> None:
    bridge, inputs = kit.bridge_of(kit.tiny(name)), kit.prompt(name)
    verify_once(bridge)
    clean = kit.hooks_on(bridge)
    with torch.no_grad():
        before = kit.run_bridge(bridge, inputs)
    with trace(bridge, STATISTICS), trace(bridge, [Entropy()]):
        assert is_attached(bridge)
        kit.run_bridge(bridge, inputs)
    assert not is_attached(bridge) and kit.hooks_on(bridge) == clean
    with pytest.raises(RuntimeError, match="in the middle"), attached(bridge, Fails()):
        kit.run_bridge(bridge, inputs)
    assert not is_attached(bridge) and kit.hooks_on(bridge) == clean
    with torch.no_grad():
        assert torch.equal(before, kit.run_bridge(bridge, inputs))


def test_run_with_hooks_takes_tracers_and_interventions(kit: Any) -> None:
    bridge, inputs = kit.bridge_of(kit.tiny("llama")), kit.prompt("llama")
    edit = AblateHeads(HEADS)
    with apply(bridge, edit), trace(bridge, STATISTICS) as wanted:
        logits = kit.run_bridge(bridge, inputs)
    clean = kit.hooks_on(bridge)
    tracer = Tracer(bridge, STATISTICS)
    hooks = bridge_site.fwd_hooks(bridge, edit, tracer)
    with torch.no_grad():
        hooked = bridge.run_with_hooks(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], fwd_hooks=hooks, return_type="logits"
        )
    assert torch.equal(logits, hooked)
    assert kit.largest_difference(wanted.record, tracer.record) == 0.0
    assert kit.hooks_on(bridge) == clean


def test_the_users_own_hooks_act_first(kit: Any) -> None:
    bridge, ids = kit.bridge_of(kit.tiny("llama")), kit.prompt("llama")["input_ids"]
    seen: dict[str, Tensor] = {}

    def double(q: Tensor, hook: Any) -> Tensor:
        return q * 2.0

    def cut(scores: Tensor, hook: Any) -> Tensor:
        scores = scores.clone()
        scores[:, 1, 5:, 2] = -torch.inf
        return scores

    def keep(pattern: Tensor, hook: Any) -> None:
        seen["pattern"] = pattern

    point = "blocks.0.attn."
    own = [(point + "hook_rot_q", double), (point + "hook_attn_scores", cut), (point + "hook_pattern", keep)]
    with trace(bridge, [Entropy()]) as tracer:
        bridge.run_with_hooks(ids, fwd_hooks=own)
    wanted = -(seen["pattern"] * seen["pattern"].clamp(min=1e-30).log()).sum(-1)
    assert float((torch.from_numpy(tracer.record["entropy"].to_numpy()[:, 0]) - wanted).abs().max()) < 1e-5


def test_a_users_pattern_edit_composes_with_an_edit_of_outputs(kit: Any) -> None:
    bridge, ids = kit.bridge_of(kit.tiny("llama")), kit.prompt("llama")["input_ids"]
    uniform = torch.ones(20, 20).tril() / torch.arange(1, 21)[:, None]

    def flatten(pattern: Tensor, hook: Any) -> Tensor:
        pattern = pattern.clone()
        pattern[:, 2] = uniform
        return pattern

    own = [("blocks.1.attn.hook_pattern", flatten)]
    with apply(bridge, AblateHeads([(1, 2)], "uniform"), AblateHeads([(0, 1)])):
        wanted = bridge(ids)
    with apply(bridge, AblateHeads([(0, 1)])):
        found = bridge.run_with_hooks(ids, fwd_hooks=own)
    assert float((wanted - found).abs().max()) < 1e-5
    with apply(bridge, DoublesValues()), pytest.raises(HeadscopeError, match=r"blocks\.1\.attn"):
        bridge.run_with_hooks(ids, fwd_hooks=own)


def test_the_bridges_cache_shows_the_edited_pattern(kit: Any) -> None:
    bridge, ids = kit.bridge_of(kit.tiny("llama")), kit.prompt("llama")["input_ids"]
    with apply(bridge, AblateHeads([(1, 2)], "uniform")):
        _, cache = bridge.run_with_cache(ids)
    pattern = cache["blocks.1.attn.hook_pattern"][:, 2]
    uniform = torch.ones(20, 20).tril() / torch.arange(1, 21)[:, None]
    assert float((pattern - uniform).abs().max()) < 1e-6
    assert float((cache["blocks.1.attn.hook_pattern"][:, 1] - uniform).abs().max()) > 1e-2


def test_a_changed_value_replaces_hook_z(kit: Any) -> None:
    model, inputs = kit.tiny("llama"), kit.prompt("llama")
    bridge = kit.bridge_of(model)
    with torch.no_grad(), attached(model, DoublesValues()):
        wanted = kit.real(inputs, model(**inputs).logits)
    with torch.no_grad(), attached(bridge, DoublesValues()):
        found = kit.real(inputs, kit.run_bridge(bridge, inputs))
    assert float((wanted - found).abs().max()) < 1e-5
    assert float((wanted - kit.real(inputs, model(**inputs).logits)).abs().max()) > 1e-2


def breaking(error: BaseException) -> Any:
    """A hook of the user's that raises."""

    def hook(tensor: Tensor, hook: Any) -> None:
        raise error

    return hook


@pytest.mark.parametrize("error", [RuntimeError("broke"), KeyboardInterrupt()], ids=["exception", "interrupt"])
@pytest.mark.parametrize("place", ["blocks.1.attn.hook_rot_q", "blocks.1.hook_mlp_out"])
def test_a_pass_that_breaks_off_leaves_nothing_in_the_record(kit: Any, place: str, error: BaseException) -> None:
    bridge, ids = kit.bridge_of(kit.tiny("llama")), kit.prompt("llama")["input_ids"]
    with trace(bridge, STATISTICS) as wanted:
        bridge(ids)
    with trace(bridge, STATISTICS) as tracer:
        bridge(ids)
        with pytest.raises(type(error)):
            bridge.run_with_hooks(ids[:, :7], fwd_hooks=[(place, breaking(error))])
        assert kit.largest_difference(wanted.record, tracer.record) == 0.0
        bridge(ids)
    assert tracer.record.sizes["example"] == 4
    again = tracer.record.isel(example=slice(2, 4)).assign_coords(example=[0, 1])
    assert kit.largest_difference(wanted.record, again) == 0.0


@pytest.mark.parametrize("error", [RuntimeError("broke"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_a_hooked_run_that_breaks_off_leaves_nothing_in_the_record(kit: Any, error: BaseException) -> None:
    bridge, ids = kit.bridge_of(kit.tiny("llama")), kit.prompt("llama")["input_ids"]
    tracer = Tracer(bridge, STATISTICS)
    hooks = bridge_site.fwd_hooks(bridge, tracer)
    with pytest.raises(type(error)):
        bridge.run_with_hooks(ids[:, :7], fwd_hooks=[("blocks.1.hook_mlp_out", breaking(error)), *hooks])
    with pytest.raises(HeadscopeError, match="nothing was recorded"):
        _ = tracer.record
    bridge.run_with_hooks(ids, fwd_hooks=hooks)
    with trace(bridge, STATISTICS) as wanted:
        bridge(ids)
    assert kit.largest_difference(wanted.record, tracer.record) == 0.0


def test_a_pass_that_stops_at_a_layer_records_the_layers_before_it(kit: Any) -> None:
    bridge, ids = kit.bridge_of(kit.tiny("llama")), kit.prompt("llama")["input_ids"]
    with trace(bridge, STATISTICS) as wanted:
        bridge(ids)
    with trace(bridge, STATISTICS) as tracer:
        bridge.run_with_hooks(ids, stop_at_layer=1)
    assert kit.largest_difference(wanted.record.isel(layer=[0]), tracer.record) == 0.0


def test_passes_of_the_base_model_alone_are_told_apart(kit: Any) -> None:
    bridge, ids = kit.bridge_of(kit.tiny("llama")), kit.prompt("llama")["input_ids"]
    with trace(bridge, STATISTICS) as wanted:
        bridge(ids)
    with trace(bridge, STATISTICS) as tracer:
        for rows in (ids[:1], ids[1:]):
            bridge.original_model.model(rows)
    assert tracer.record.sizes["example"] == 2
    assert kit.largest_difference(wanted.record, tracer.record) < 1e-5


@pytest.mark.parametrize("how", ["zero", "mean", "uniform"])
def test_every_ablation_acts_inside_run_with_hooks_as_it_does_in_apply(kit: Any, how: Any) -> None:
    bridge, ids = kit.bridge_of(kit.tiny("llama")), kit.prompt("llama")["input_ids"]
    means = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)) if how == "mean" else None
    edit = AblateHeads(HEADS, how, strength=0.7, means=means)
    with torch.no_grad():
        untouched = bridge(ids)
        with apply(bridge, edit):
            wanted = bridge(ids)
        found = bridge.run_with_hooks(ids, fwd_hooks=bridge_site.fwd_hooks(bridge, edit))
    assert float((wanted - untouched).abs().max()) > 1e-3
    assert torch.equal(wanted, found)
