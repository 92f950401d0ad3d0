"""Attention functions of the user's own run as they are; nothing stands in for one that was not vouched for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import verify
from headscope.interp.sites.huggingface.route import attached
from headscope.interp.statistics import Entropy, SpanMass
from headscope.interp.survey.eager import eager_weights
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing.recording import trace
from headscope.interventions import AblateHeads, apply

BEYOND = 32  # the verification prompt is shorter
IDS = torch.randint(5, 90, (1, 64), generator=torch.Generator().manual_seed(0))
REFUSAL = r"layer 0 attends through .*(sparse|plain_enough).*verify\(model, trust="


class Idle(Handler):
    def concerns(self, module: str, layer: int) -> bool:
        return False


def sparse(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
    """StreamingLLM: beyond some tokens each sees the first four and the last eight."""
    if q.shape[2] > BEYOND:
        back = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
        mask = ((back >= 0) & ((back < 8) | (torch.arange(k.shape[2]) < 4)))[None, None].expand(q.shape[0], 1, -1, -1)
    return sdpa_attention_forward(module, q, k, v, mask, **options)


def plain_enough(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
    return sdpa_attention_forward(module, q, k, v, mask, **options)


def sparse_mask(**asked: Any) -> Any:
    return sdpa_mask(**asked)


@pytest.fixture(params=["registered", "replaced", "eager", "mask"])
def model(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made = tiny_model("llama")
    if request.param == "registered":
        monkeypatch.setitem(AttentionInterface._global_mapping, "streaming", sparse)
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, "streaming", sdpa_mask)
        made.set_attn_implementation("streaming")
    elif request.param == "replaced":  # as kvpress does
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", sparse)
    elif request.param == "eager":
        made.set_attn_implementation("eager")
        monkeypatch.setattr(modeling_llama, "eager_attention_forward", sparse)
    else:
        monkeypatch.setitem(AttentionInterface._global_mapping, "streaming", sdpa_attention_forward)
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, "streaming", sparse_mask)
        made.set_attn_implementation("streaming")
    yield made


def test_it_runs_as_it_is_where_nobody_reads_inside(model: Any) -> None:
    with torch.no_grad():
        plain = model(IDS).logits
    with trace(model, [Entropy()], layers=[]):
        assert torch.equal(model(IDS).logits, plain)
    with attached(model, Idle()):  # on the model, and concerned with no layer
        assert torch.equal(model(IDS).logits, plain)
    with apply(model, AblateHeads([(0, 0)], strength=0.0)):
        assert torch.equal(model(IDS).logits, plain)


def test_an_ablation_changes_what_it_gives(model: Any) -> None:
    size = model.config.hidden_size // model.config.num_attention_heads

    def silence(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].clone()
        z[..., size : 2 * size] = 0
        return (z,)

    hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(silence)
    with torch.no_grad():
        wanted = model(IDS).logits
    hook.remove()
    with apply(model, AblateHeads([(1, 1)])):
        assert torch.equal(model(IDS).logits, wanted)


def test_its_pattern_is_refused_by_name(model: Any) -> None:
    with pytest.raises(HeadscopeError, match=r"layer 0 attends through .*verify\(model, trust=\["):
        with trace(model, [Entropy()]):
            model(IDS)
    with pytest.raises(HeadscopeError, match="attends through"):
        with trace(model, [Entropy()], verify=False):
            model(IDS)


def test_a_function_that_was_vouched_for_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with eager_weights(model) as seen, torch.no_grad():
        model(IDS)
    monkeypatch.setitem(AttentionInterface._global_mapping, "mine", plain_enough)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "mine", sdpa_mask)
    model.set_attn_implementation("mine")
    assert verify(model, trust=["mine"]).passed
    with trace(model, [SpanMass({"middle": (4, 40)})]) as tracer:
        model(IDS)
    wanted = torch.stack([p for _, p in seen])[:, 0, :, :, 4:40].sum(-1)
    found = torch.tensor(tracer.record["span_mass"].to_numpy()[0, ..., 0])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_function_that_was_vouched_for_is_still_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setitem(AttentionInterface._global_mapping, "mine", sparse)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "mine", sdpa_mask)
    model.set_attn_implementation("mine")
    assert not verify(model, {"input_ids": IDS}, trust=["mine"]).passed


def test_one_that_gets_no_mask_is_traced_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mask function transformers hides neither padding nor what lies outside a window."""
    model = tiny_model("mistral")
    monkeypatch.setitem(AttentionInterface._global_mapping, "bare", sdpa_attention_forward)
    model.set_attn_implementation("bare")
    padding = torch.ones_like(IDS)
    padding[:, :5] = 0
    inputs = {"input_ids": IDS, "attention_mask": padding}
    with torch.no_grad():
        plain = model(**inputs).logits
    with trace(model, [Entropy()]):
        traced = model(**inputs).logits
    torch.testing.assert_close(traced, plain, atol=1e-4, rtol=0)
