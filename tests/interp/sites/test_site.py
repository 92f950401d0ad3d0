"""The Hugging Face site: what it leaves behind, what it refuses, and that verification can fail."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.masking_utils import AttentionMaskInterface

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import attached, is_attached, verify
from headscope.interp.sites.huggingface import attention as hf_attention
from headscope.interp.sites.huggingface import calls as hf_calls
from headscope.interp.sites.huggingface import route as huggingface
from headscope.interp.sites.inputs import example_inputs
from headscope.interp.statistics import Entropy
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing.recording import trace


def llama(**sizes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    options = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    model = LlamaForCausalLM(LlamaConfig(**{**options, **sizes})).eval()
    for parameter in model.parameters():  # queries and keys that make patterns far from uniform
        parameter.data.mul_(8.0 if parameter.dim() == 2 else 1.0)
    return model


def tokens(batch: int = 2, length: int = 16, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


class Counter(Handler):
    """Keeps every call."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def edit(self, call: AttentionCall) -> AttentionCall:
        self.calls.append(call)
        return call


def registered() -> set[str]:
    return {name for name in (*AttentionInterface._global_mapping, *AttentionMaskInterface._global_mapping)}


def test_nothing_is_registered_before_and_nothing_stays_after():
    model, before = llama(), registered()
    ids = tokens()
    with torch.no_grad():
        plain = model(ids).logits
    with attached(model, Handler()):
        assert model.config._attn_implementation == huggingface.NAME
        assert is_attached(model)
    assert registered() == before
    assert model.config._attn_implementation == "sdpa"
    assert not is_attached(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)


def test_restored_after_an_exception_inside_a_layer():
    model, before = llama(), registered()

    class Breaks(Handler):
        def edit(self, call):
            raise RuntimeError("inside layer")

    with pytest.raises(RuntimeError, match="inside layer"):
        with attached(model, Breaks()):
            model(tokens())
    assert model.config._attn_implementation == "sdpa"
    assert registered() == before
    assert not is_attached(model)


def test_every_implementation_of_a_model_with_towers_is_restored():
    model = tiny_model("llava", "image-text")
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    with attached(model, Handler()):
        assert model.config.text_config._attn_implementation == huggingface.NAME
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_contexts_nest_and_the_last_to_leave_restores():
    model, outer, inner = llama(), Counter(), Counter()
    with attached(model, outer):
        with attached(model, inner):
            model(tokens())
        assert is_attached(model)
        model(tokens())
    assert not is_attached(model)
    assert (len(outer.calls), len(inner.calls)) == (4, 2)


def test_two_models_at_once_do_not_mix():
    one, two, first, second = llama(), llama(num_attention_heads=2), Counter(), Counter()
    with attached(one, first), attached(two, second):
        one(tokens())
    assert (len(first.calls), len(second.calls)) == (2, 0)
    with attached(one, first):
        with attached(two, second):
            pass
        one(tokens())  # leaving the other model must not unregister what this one needs
    assert len(first.calls) == 4


def test_a_copy_made_while_attached_is_not_traced():
    model, counter = llama(), Counter()
    with attached(model, counter), torch.no_grad():
        copied = copy.deepcopy(model)
        assert copied.config._attn_implementation == "sdpa"
        found = copied(tokens()).logits
        assert not counter.calls
        torch.testing.assert_close(found, model(tokens()).logits)
    assert len(counter.calls) == 2


def test_a_model_is_not_kept_alive():
    import weakref

    model = llama()
    gone = weakref.ref(model)
    with trace(model, [Entropy()]):
        model(tokens())
    del model
    gc.collect()
    assert gone() is None


def test_active_dropout_is_refused():
    model = llama(attention_dropout=0.5).train()
    with attached(model, Handler()):
        with pytest.raises(HeadscopeError, match="dropout"):
            model(tokens())


def test_a_module_that_is_no_model_is_refused():
    with pytest.raises(HeadscopeError, match="not a Hugging Face model"):
        with attached(torch.nn.Linear(2, 2), Handler()):
            raise AssertionError("the block must not be entered")


@pytest.mark.parametrize("name", ["doge", "git"])
def test_models_that_read_their_mask_are_refused_by_name(name):
    model = tiny_model(name)
    with pytest.raises(HeadscopeError, match=type(model).__name__):
        with trace(model, [Entropy()]):
            raise AssertionError("the block must not be entered")


def test_layers_that_share_their_weights_are_refused():
    model = tiny_model("albert", "encoder")
    inputs = example_inputs(model)
    with pytest.raises(HeadscopeError, match="attends more than once"):
        with trace(model, [Entropy()]):
            raise AssertionError("the block must not be entered")
    with pytest.raises(HeadscopeError, match="attends more than once"):
        with trace(model, [Entropy()], verify=False):
            model(**inputs)


WRONG = {
    "scale": lambda call: call.with_(scale=call.scale * 1.01),
    "mask": lambda call: call.with_(mask=type(call.mask)(query_offset=0, right=1)),
    "softcap": lambda call: call.with_(softcap=5.0),
    "window": lambda call: call.with_(mask=type(call.mask).causal(window=20)),
    "sinks": lambda call: call.with_(sinks=torch.zeros(call.query.shape[1])),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_verification_notices_a_planted_mistake(monkeypatch, mistake):
    model = llama()
    assert verify(model).passed
    right = hf_calls.make_call
    monkeypatch.setattr(hf_calls, "make_call", lambda *args: WRONG[mistake](right(*args)))
    found = verify(model)
    assert not found.passed
    assert "differs from ours" in found.problems[0]


def test_a_tower_is_verified_when_its_first_call_comes(monkeypatch):
    model = tiny_model("llava", "image-text")
    inputs = example_inputs(model)
    right = hf_calls.make_call

    def wrong_vision(module, place, *args):
        call = right(module, place, *args)
        return call.with_(scale=call.scale * 1.01) if place.tower == "vision" else call

    monkeypatch.setattr(hf_attention, "make_call", wrong_vision)
    with trace(model, [Entropy()]) as tracer:  # nobody reads the vision tower, so it runs the model's own attention
        model(**inputs)
    assert tracer.record["layer"].to_numpy().tolist() == [0, 1]
    with trace(model, [Entropy()], tower="vision"):
        model(input_ids=inputs["input_ids"][:, -8:])  # text alone does not reach the vision tower
        with pytest.raises(HeadscopeError, match="Llava.*pattern of layer 0"):
            model(**inputs)
