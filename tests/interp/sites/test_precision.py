"""Precision: half precision and quantized weights, statistics and verification held to float32."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from headscope.interp import load_model, trace
from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import output_projections
from headscope.interp.runs.provenance import fingerprint, provenance
from headscope.interp.sites import attached, verify
from headscope.interp.sites.agreement import pattern_bound, relative_error
from headscope.interp.sites.huggingface import calls as hf_calls
from headscope.interp.sites.huggingface import verify as verification
from headscope.interp.sites.unwrap import model_device
from headscope.interp.statistics import Entropy, KeyMass, LogSumExp, SinkMass
from headscope.interp.survey.tiny import tiny_model
from headscope.interventions import AblateHeads, apply
from headscope.kernels.masks import Mask

HALF = [torch.bfloat16, torch.float16]
STATISTICS = [LogSumExp(), Entropy(), SinkMass(first=2), KeyMass()]


def tokens(length: int = 24, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 60, (2, length), generator=torch.Generator().manual_seed(seed))


def inputs(length: int = 24) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": tokens(length), "attention_mask": mask}


def generate(model, **options):
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(**{k: v.to(model_device(model)) for k, v in inputs().items()}, **settings, **options)


class Calls(Handler):
    """Keeps every call as it came."""

    def __init__(self) -> None:
        self.seen: list[AttentionCall] = []

    def edit(self, call: AttentionCall) -> AttentionCall:
        self.seen.append(call)
        return call


# -- half precision ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def dense_scores(call: AttentionCall, dtype: torch.dtype) -> torch.Tensor:
    """Scores (batch, head, query, key) written out, with every intermediate result in ``dtype``."""
    query, key = call.query.to(dtype), call.key.to(dtype)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(2, 3) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    rows, keys = torch.arange(scores.shape[2]), torch.arange(scores.shape[3])
    seen = call.mask.tile(rows, keys)
    return scores if seen is None else scores.masked_fill(~seen, -math.inf)


@torch.no_grad()
def dense(call: AttentionCall, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """The statistics of a call's own q and k in float64, from scores computed in ``dtype``."""
    scores = dense_scores(call, dtype).double()
    lse = scores.logsumexp(-1)
    if call.sinks is not None:
        lse = torch.logaddexp(lse, call.sinks.double()[None, :, None])
    p = torch.exp(scores - lse[..., None]).nan_to_num()
    return {"logsumexp": lse, "entropy": -(p * p.clamp(min=1e-300).log()).sum(-1)}


def share_of_bound(model, rounded_to: torch.dtype = torch.float32) -> tuple[float, float]:
    """The largest error of traced logsumexp and entropy against float64 on the model's own q and k, as a share of what
    float32 allows; and that of the same from scores kept in ``rounded_to``."""
    calls = Calls()
    with trace(model, [LogSumExp(), Entropy()]) as tracer, attached(model, calls):
        model(**inputs())
    assert len(calls.seen) == 2
    traced = kept = 0.0
    for call in calls.seen:
        relative = relative_error(call.with_(query=call.query.float(), key=call.key.float()))
        exact, rounded = dense(call), dense(call, rounded_to)
        for example, first in ((0, 3), (1, 0)):
            here = tracer.record.sel(layer=call.layer).isel(example=example, query=slice(0, 24 - first))
            for name in exact:
                got, wanted = torch.from_numpy(here[name].to_numpy()), exact[name][example, :, first:]
                # log p is off by log(1 + relative) at most; entropy sums p log p, whose weights are off as well
                bound = relative * (1.0 + 3.0 * wanted.abs())
                traced = max(traced, float(((got - wanted).abs() / bound).max()))
                kept = max(kept, float(((rounded[name][example, :, first:] - wanted).abs() / bound).max()))
    return traced, kept


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mistral", "gpt_oss"])
def test_statistics_of_a_half_precision_model_are_float32_ones_of_its_own_q_and_k(architecture, dtype):
    traced, kept_in_half = share_of_bound(tiny_model(architecture, dtype=dtype), dtype)
    assert traced <= 1.0 < kept_in_half


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3"])
def test_a_half_precision_model_writes_the_same_tokens_when_traced(architecture, dtype):
    model = tiny_model(architecture, dtype=dtype)
    untraced = generate(model)
    with trace(model, STATISTICS):
        traced = generate(model)
    assert torch.equal(traced, untraced)
    assert torch.equal(generate(model), untraced)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("architecture", "kind"), [("whisper", "encoder-decoder"), ("siglip", "encoder")])
def test_sound_and_images_reach_a_half_precision_model(architecture, kind, dtype):
    assert verify(tiny_model(architecture, kind, dtype=dtype)).passed


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_smollm2_in_half_precision(dtype):
    lm = load_model("smollm2-135m", dtype=dtype)
    found = verify(lm)
    assert found.passed and found.worst < 0.5
    untraced = lm.generate("The capital of France is", max_new_tokens=16)
    with trace(lm, STATISTICS) as tracer:
        traced = lm.generate("The capital of France is", max_new_tokens=16)
    assert traced == untraced
    assert tracer.record["entropy"].dtype == "float32"


def loud_llama(factor: float, dtype: torch.dtype = torch.float32, **sizes) -> LlamaForCausalLM:
    """A llama with scores ``factor`` squared times as large as a new one's."""
    torch.manual_seed(0)
    options = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**{**options, **sizes})).eval()
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data.mul_(factor)
    return model.to(dtype)


def planted(monkeypatch, change) -> None:
    """Every call that the verification makes is changed."""
    real = hf_calls.make_call
    monkeypatch.setattr(hf_calls, "make_call", lambda *args: change(real(*args)))


FAULTS = {
    "scale": lambda call: call.with_(scale=call.scale * 1.02),
    "window": lambda call: call.with_(mask=Mask.causal(window=20)),
    "one key ahead": lambda call: call.with_(mask=Mask(right=1)),
    "a sink": lambda call: call.with_(sinks=torch.full((4,), -2.0)),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("fault", FAULTS)
def test_verification_in_half_precision_finds_what_rounding_could_hide(monkeypatch, dtype, fault):
    assert verify(loud_llama(8.0, dtype)).passed
    planted(monkeypatch, FAULTS[fault])
    assert not verify(loud_llama(8.0, dtype)).passed
    if fault == "scale":  # within half precision's own rounding: float32 finds it
        monkeypatch.setattr(verification, "_compare_wide", lambda *_: None)
        assert verify(loud_llama(8.0, dtype)).passed


def test_a_sum_over_a_wide_head_may_round_more_than_its_products():
    """A right computation that adds d_head products one after the other is outside 8 eps + 2 eps |q||k|, the bound that
    leaves d_head out, and inside ours."""
    width, scale = 512, 50.0
    query = torch.full((1, 1, 1, width), 0.7)
    key = torch.full((1, 1, 2, width), 0.37)
    key[:, :, 1, : width // 2] *= 1.1
    key[:, :, 1, width // 2 :] *= 0.9
    call = AttentionCall(query, key, torch.ones(1, 1, 2, 4), Mask.full(), scale, 0, "attn")
    products, scores = query * key, torch.zeros(1, 1, 2)
    for i in range(width):
        scores = scores + products[..., i]
    theirs, ours = torch.softmax(scores[:, :, None] * scale, -1), call.pattern()
    difference = (theirs - ours).abs()
    reach = float(query.norm() * key.norm(dim=-1).max()) * scale
    assert float(difference.max()) > torch.finfo(torch.float32).eps * (8 + 2 * reach)
    assert bool((difference <= pattern_bound(call, ours)).all())


@pytest.mark.parametrize("factor", [10.0, 100.0, 300.0])
def test_an_exact_model_is_not_refused_for_its_large_scores(factor):
    model, calls = loud_llama(factor, head_dim=256), Calls()
    found = verify(model)
    assert found.passed
    with attached(model, calls), torch.no_grad():
        model(tokens())
    assert max(float(call.query.norm(dim=-1).max()) for call in calls.seen) > factor


# -- quantized weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_quantized_weights(tmp_path, quantize, dtype):
    pytest.importorskip("bitsandbytes")
    plain = tiny_model("llama")
    plain.save_pretrained(tmp_path)
    lm = load_model(tmp_path, quantize=quantize, dtype=dtype, device="cpu")
    assert lm.info.quantization == f"bitsandbytes {quantize}" == provenance(lm)["model"]["quantization"]
    assert lm.info.parameters == sum(p.numel() for p in plain.parameters())
    assert str(lm.model.dtype) == str(dtype)
    found = verify(lm)
    assert found.passed and found.worst < 0.5
    assert output_projections(lm) == output_projections(plain)
    assert share_of_bound(lm.model)[0] <= 1.0
    untraced = generate(lm.model)
    with trace(lm, STATISTICS) as tracer:
        traced = generate(lm.model)
    assert torch.equal(traced, untraced)
    assert tracer.record.sizes["layer"] == 2
    with torch.no_grad():
        with apply(lm, AblateHeads([(0, 0), (0, 1)])):
            edited = lm.model(**inputs()).logits
        assert float((edited - lm.model(**inputs()).logits).abs().max()) > 1e-2


def test_weights_that_torchao_quantized(tmp_path):
    """Packed tensors of their own class, of which a sweep takes the fingerprint."""
    quantization = pytest.importorskip("torchao.quantization")
    tiny_model("llama").save_pretrained(tmp_path)
    lm = load_model(tmp_path, quantize=TorchAoConfig(quantization.Int8WeightOnlyConfig()), device="cpu")
    assert lm.info.quantization == "torchao" and verify(lm).passed and share_of_bound(lm.model)[0] <= 1.0
    with trace(lm, STATISTICS) as tracer:
        traced = generate(lm.model)
    assert torch.equal(traced, generate(lm.model)) and tracer.record.sizes["layer"] == 2
    before = fingerprint(lm.model)
    lm.model.model.layers[0].self_attn.q_proj.weight.qdata[0, 0] += 1
    assert fingerprint(lm.model) != before


def test_a_quantization_config_of_transformers_and_a_quantized_checkpoint(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    own = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    lm = load_model(tmp_path / "plain", quantize=own, device="cpu")
    assert lm.model.config.quantization_config.bnb_4bit_quant_type == "fp4"
    lm.model.save_pretrained(tmp_path / "packed")
    again = load_model(tmp_path / "packed", device="cpu")
    assert again.info.quantization == "bitsandbytes 4bit"
    with torch.no_grad():
        assert torch.equal(again.model(**inputs()).logits, lm.model(**inputs()).logits)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_quantized_checkpoint_without_bitsandbytes_names_the_extra(tmp_path):
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model.save_pretrained(tmp_path)
    with pytest.raises(HeadscopeError, match=r"pip install 'headscope\[quantized\]'"):
        load_model(tmp_path)
