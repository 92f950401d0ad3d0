"""The nnsight site: traces and edits inside nnsight's own contexts and through its graph alone, and what it refuses."""

from __future__ import annotations

from typing import Any

import nnsight
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from headscope.interp import Tracer, trace
from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import attached, is_attached
from headscope.interp.sites import nnsight as nnsight_site
from headscope.interp.statistics import Entropy, HeadOutput, KeyMass, SinkMass, TopKeys
from headscope.interventions import AblateHeads, apply

SHOWN = ["llama", "gemma3", "gpt2", "gpt_neox", "gpt_oss", "deepseek_v3"]
STATISTICS = [Entropy(), SinkMass(), KeyMass(), TopKeys(1), HeadOutput((-1,))]
HEADS = [(0, 1), (1, 3)]


class Fails(Handler):
    def observe(self, call: AttentionCall, reduced: Any) -> None:
        raise AssertionError("not asked for anything")

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        if call.layer == 1:
            raise RuntimeError("in the middle")
        return z


def test_nothing_stays_on_a_wrapped_model(kit: Any) -> None:
    model, inputs = kit.tiny("llama"), kit.prompt("llama")
    wrapper = nnsight.NNsight(model)
    with torch.no_grad():
        before = kit.run_nnsight(wrapper, inputs)
    clean = kit.hooks_on(model)
    with pytest.raises(Exception, match="in the middle"), attached(wrapper, Fails()):
        kit.run_nnsight(wrapper, inputs)
    assert not is_attached(wrapper) and kit.hooks_on(model) == clean
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(before, kit.run_nnsight(wrapper, inputs))


@pytest.mark.parametrize("remote", [False, "local"])
@pytest.mark.parametrize("name", SHOWN)
def test_a_prompt_through_nnsights_graph_alone(kit: Any, name: str, remote: Any) -> None:
    model, inputs = kit.tiny(name), kit.prompt(name)
    wrapper = nnsight.NNsight(model)
    edit = AblateHeads(HEADS, strength=0.5)
    with apply(model, edit), trace(model, STATISTICS) as wanted:
        logits = kit.real(inputs, model(**inputs).logits)
    tracer = Tracer(wrapper, STATISTICS)
    found = nnsight_site.run(wrapper, handlers=[edit, tracer], remote=remote, **inputs)
    assert kit.largest_difference(wanted.record, tracer.record) < 1e-5
    assert float((logits - kit.real(inputs, found)).abs().max()) < 1e-5
    assert float((kit.real(inputs, model(**inputs).logits) - logits).abs().max()) > 1e-3


def test_what_nnsights_graph_cannot_do_is_refused(kit: Any) -> None:
    inputs = kit.prompt("llama")
    wrapper = nnsight.NNsight(kit.tiny("llama"))
    with pytest.raises(HeadscopeError, match="inside attention"):
        nnsight_site.run(wrapper, handlers=[AblateHeads(HEADS, "uniform")], **inputs)

    class Positions(Handler):
        def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
            return z * torch.arange(z.shape[2])[:, None]

    with pytest.raises(HeadscopeError, match="per head"):
        nnsight_site.run(wrapper, handlers=[Positions()], **inputs)
    with pytest.raises(HeadscopeError, match="before o_proj"):
        nnsight_site.run(nnsight.NNsight(kit.tiny("qwen3_next")), handlers=[AblateHeads([(1, 0)])], **inputs)
    with pytest.raises(HeadscopeError, match="BloomForCausalLM"):
        nnsight_site.run(nnsight.NNsight(kit.tiny("bloom")), **inputs)


def test_a_wrapper_without_weights_is_refused_here(kit: Any) -> None:
    wrapper = nnsight.NNsight(kit.tiny("llama"))
    wrapper.dispatched = False
    with pytest.raises(HeadscopeError, match="dispatch"), trace(wrapper, [Entropy()]):
        raise AssertionError("the block must not run")


@pytest.mark.slow
def test_generation_inside_nnsight_is_traced_and_edited(kit: Any, smollm2: Any) -> None:
    wrapper = nnsight.TransformersModel(smollm2.model, tokenizer=smollm2.tokenizer)
    ids = smollm2.encode("The capital of France is")["input_ids"]
    edit = AblateHeads([(5, 3), (7, 1)])
    options = {"max_new_tokens": 4, "do_sample": False}
    with apply(smollm2, edit), trace(smollm2, [Entropy()]) as plain:
        tokens = smollm2.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with apply(wrapper, edit), trace(wrapper, [Entropy()]) as wrapped:
        with wrapper.generate("The capital of France is", **options) as tracer:
            through_nnsight = tracer.result.save()
    assert torch.equal(tokens, through_nnsight)
    assert kit.largest_difference(plain.record, wrapped.record) < 1e-5
    assert plain.record.sizes["query"] == ids.shape[1] + 3


@pytest.fixture
def wrapper(kit: Any) -> Any:
    """A tiny llama in nnsight's own wrapper for language models."""
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(90)}, "<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<unk>")
    return nnsight.TransformersModel(kit.tiny("llama"), tokenizer=tokenizer)


@pytest.mark.parametrize("how", ["zero", "mean", "uniform"])
def test_generation_is_traced_and_edited_as_without_nnsight(kit: Any, wrapper: Any, how: Any) -> None:
    model, ids = kit.tiny("llama"), kit.prompt("llama")["input_ids"][:1]
    means = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)) if how == "mean" else None
    edit, options = AblateHeads(HEADS, how, means=means), {"max_new_tokens": 5, "do_sample": False}
    with trace(model, STATISTICS) as untouched:
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with apply(model, edit), trace(model, STATISTICS) as plain:
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with apply(wrapper, edit), trace(wrapper, STATISTICS) as wrapped:
        with wrapper.generate(ids, **options) as tracer:
            through_nnsight = tracer.result.save()
    assert torch.equal(tokens, through_nnsight)
    assert kit.largest_difference(untouched.record, plain.record) > 1e-2
    assert wrapped.record.sizes["query"] == 24
    assert kit.largest_difference(plain.record, wrapped.record) == 0.0


def test_edits_of_ours_and_of_the_users_graph_meet(kit: Any, wrapper: Any) -> None:
    """The user's code in the traced block reads and changes what our edit left."""
    model, ids = kit.tiny("llama"), kit.prompt("llama")["input_ids"]
    with apply(model, AblateHeads([(0, 1), (1, 3)])):
        wanted = model(ids).logits
    with apply(wrapper, AblateHeads([(0, 1)])), wrapper.trace(ids):
        z = wrapper.model.layers[0].self_attn.o_proj.input.save()
        wrapper.model.layers[1].self_attn.o_proj.input[:, :, 24:] = 0
        logits = wrapper.output.logits.save()
    assert not z[..., 8:16].any() and z[..., 16:].any()
    assert torch.equal(wanted, logits)


def test_a_pass_that_breaks_off_leaves_nothing_in_the_record(kit: Any, wrapper: Any) -> None:
    ids = kit.prompt("llama")["input_ids"]
    with trace(wrapper, STATISTICS) as wanted:
        with wrapper.trace(ids):
            wrapper.output.logits.save()
    with trace(wrapper, STATISTICS) as tracer:
        with wrapper.trace(ids):
            wrapper.output.logits.save()
        with pytest.raises(Exception, match="too many indices"):
            with wrapper.trace(ids[:, :7]):
                wrapper.model.layers[1].self_attn.o_proj.input[0, 0, 0, 0] = 1
    assert kit.largest_difference(wanted.record, tracer.record) == 0.0


def test_a_pass_that_is_stopped_records_the_layers_before(kit: Any, wrapper: Any) -> None:
    ids = kit.prompt("llama")["input_ids"]
    with trace(wrapper, STATISTICS) as wanted:
        with wrapper.trace(ids):
            wrapper.output.logits.save()
    with trace(wrapper, STATISTICS) as tracer:
        with wrapper.trace(ids) as graph:
            wrapper.model.layers[0].output.save()
            graph.stop()
    assert kit.largest_difference(wanted.record.isel(layer=[0]), tracer.record) == 0.0


def test_a_graph_run_that_breaks_off_leaves_nothing_in_the_record(kit: Any) -> None:
    class Breaks(Handler):
        def request(self, call: AttentionCall) -> None:
            if call.layer == 1:
                raise RuntimeError("in the middle")

    inputs = kit.prompt("llama")
    wrapper = nnsight.NNsight(kit.tiny("llama"))
    tracer = Tracer(wrapper, STATISTICS)
    with pytest.raises(RuntimeError, match="in the middle"):
        nnsight_site.run(wrapper, handlers=[tracer, Breaks()], **inputs)
    with pytest.raises(HeadscopeError, match="nothing was recorded"):
        _ = tracer.record
    nnsight_site.run(wrapper, handlers=[tracer], **inputs)
    assert tracer.record.sizes["example"] == 2


@pytest.mark.parametrize("remote", [False, "local"])
def test_mean_ablation_travels_through_the_graph(kit: Any, remote: Any) -> None:
    """``remote="local"`` serialises the request and runs it from the bytes, as a server would."""
    model, inputs = kit.tiny("llama"), kit.prompt("llama")
    edit = AblateHeads(HEADS, "mean", means=torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)))
    with apply(model, edit):
        wanted = kit.real(inputs, model(**inputs).logits)
    found = kit.real(inputs, nnsight_site.run(nnsight.NNsight(model), handlers=[edit], remote=remote, **inputs))
    assert float((wanted - found).abs().max()) < 1e-5
    with torch.no_grad():
        assert float((wanted - kit.real(inputs, model(**inputs).logits)).abs().max()) > 1e-3
