"""The three sites agree: TransformerLens bridges and nnsight wrappers give the numbers of the Hugging Face model."""

from __future__ import annotations

import sys
from typing import Any

import nnsight
import pytest
import torch

from headscope.interp import Tracer, trace
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import nnsight as nnsight_site
from headscope.interp.sites.transformer_lens import route as bridge_site
from headscope.interp.statistics import Entropy, HeadOutput, KeyMass, SinkMass, TopKeys
from headscope.interventions import AblateHeads, apply

SHOWN = ["llama", "gemma3", "gpt2", "gpt_neox", "gpt_oss", "deepseek_v3"]
STATISTICS = [Entropy(), SinkMass(), KeyMass(), TopKeys(1), HeadOutput((-1,))]
HEADS = [(0, 1), (1, 3)]


@pytest.mark.parametrize("name", [*SHOWN, "opt"])
def test_bridge_and_nnsight_record_what_hugging_face_records(kit: Any, name: str) -> None:
    model, inputs = kit.tiny(name), kit.prompt(name)
    bridge, wrapper = kit.bridge_of(model), nnsight.NNsight(model)
    with trace(model, STATISTICS) as plain:
        logits = model(**inputs).logits
    with trace(bridge, STATISTICS) as bridged:
        through_bridge = kit.run_bridge(bridge, inputs)
    with trace(wrapper, STATISTICS) as wrapped:
        through_nnsight = kit.run_nnsight(wrapper, inputs)
    assert float(plain.record["entropy"].max()) > 0.1
    assert kit.largest_difference(plain.record, bridged.record) < 1e-5
    assert kit.largest_difference(plain.record, wrapped.record) == 0.0
    assert float((kit.real(inputs, logits) - kit.real(inputs, through_bridge)).abs().max()) < 1e-5
    assert torch.equal(logits, through_nnsight)


@pytest.mark.parametrize("how", ["zero", "uniform"])
@pytest.mark.parametrize("name", SHOWN)
def test_ablation_gives_the_same_logits_through_each_site(kit: Any, name: str, how: Any) -> None:
    model, inputs = kit.tiny(name), kit.prompt(name)
    bridge, wrapper = kit.bridge_of(model), nnsight.NNsight(model)
    with torch.no_grad():
        untouched = kit.real(inputs, model(**inputs).logits)
        before = kit.run_bridge(bridge, inputs)
    edit = AblateHeads(HEADS, how)
    with apply(model, edit):
        wanted = kit.real(inputs, model(**inputs).logits)
    with apply(bridge, edit):
        through_bridge = kit.real(inputs, kit.run_bridge(bridge, inputs))
    with apply(wrapper, edit):
        through_nnsight = kit.real(inputs, kit.run_nnsight(wrapper, inputs))
    assert float((wanted - untouched).abs().max()) > 1e-3
    assert float((wanted - through_bridge).abs().max()) < 1e-5
    assert torch.equal(wanted, through_nnsight)
    with torch.no_grad():
        assert torch.equal(before, kit.run_bridge(bridge, inputs))


@pytest.mark.parametrize("name", SHOWN)
def test_generation_with_a_cache_is_recorded_alike(kit: Any, name: str) -> None:
    model = kit.tiny(name)
    bridge = kit.bridge_of(model)
    ids = kit.prompt(name)["input_ids"][:1]
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with trace(model, STATISTICS) as plain:
        tokens = model.generate(ids, **options)
    with trace(bridge, STATISTICS) as bridged:
        through_bridge = bridge.original_model.generate(ids, **options)
    assert torch.equal(tokens, through_bridge)
    assert plain.record.sizes["query"] == 25
    assert kit.largest_difference(plain.record, bridged.record) < 1e-5


def test_missing_packages_and_wrong_objects_have_clear_errors(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kit.tiny("llama")
    with pytest.raises(HeadscopeError, match="expected a TransformerBridge, got LlamaForCausalLM"):
        bridge_site.fwd_hooks(model, Handler())
    with pytest.raises(HeadscopeError, match="expected an nnsight wrapper"):
        nnsight_site.run(model)
    for package in ("transformer_lens", "nnsight"):
        monkeypatch.setitem(sys.modules, package, None)
    for call in (lambda: bridge_site.fwd_hooks(model), lambda: nnsight_site.run(model)):
        with pytest.raises(HeadscopeError, match=r"pip install 'headscope\[sites\]'"):
            call()


@pytest.mark.slow
def test_three_sites_one_number_on_smollm2(smollm2: Any) -> None:
    from headscope.interp import load_model

    text = "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over"
    second = load_model("smollm2-135m")
    bridge = bridge_site.boot(second.name, second.model, second.tokenizer)
    wrapper = nnsight.TransformersModel(smollm2.model, tokenizer=smollm2.tokenizer)
    with trace(smollm2, STATISTICS) as plain:
        logits = smollm2(text).logits
    with trace(bridge, STATISTICS) as bridged:
        through_bridge = bridge(smollm2.encode(text)["input_ids"])
    with trace(wrapper, STATISTICS) as wrapped:
        with wrapper.trace(text):
            through_nnsight = wrapper.output.logits.save()
    remote = Tracer(wrapper, STATISTICS)
    nnsight_site.run(wrapper, text, handlers=[remote], remote="local")
    for other in (bridged, wrapped, remote):
        difference = max(
            float(abs(plain.record[name].astype(float) - other.record[name].astype(float)).max())
            for name in ("entropy", "sink_mass", "key_mass", "top_mass")
        )
        assert difference < 1e-5
    assert float((logits - through_bridge).abs().max()) < 1e-3
    assert torch.equal(logits, through_nnsight)
