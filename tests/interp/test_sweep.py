"""The sweep over architectures, and the table it left."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import sweep as module
from headscope.interp.models.shrink import HEADS, shrink
from headscope.interp.models.sweep import Finding, check_type, model_types, sweep, to_markdown
from headscope.interp.models.tiny import tiny_config, tiny_model

FOLDER = Path(module.__file__).parent
NAMED = (
    "llama llama4 mistral mixtral qwen2 qwen3 qwen3_moe qwen3_next gemma2 gemma3 gemma3n_text gemma4 phi phi3 gpt2 opt "
    "gpt_neox gpt_bigcode starcoder2 cohere olmo2 granite smollm3 gpt_oss deepseek_v3 stablelm bert modernbert vit "
    "dinov2 siglip clip whisper t5 llava llava_next llava_onevision qwen2_vl qwen2_5_vl qwen3_vl idefics3 smolvlm "
    "paligemma"
).split()


def test_each_outcome_is_told_apart():
    assert check_type("causal-lm", "llama").outcome == "right"
    refused = check_type("causal-lm", "falcon")
    assert refused.outcome == "refused" and "FalconForCausalLM" in refused.why
    assert check_type("image-text", "perception_lm").outcome in ("not buildable", "right")  # right where timm is there
    assert check_type("causal-lm", "musicgen").outcome == "not buildable"


def test_a_wrong_statistic_is_found(monkeypatch):
    from headscope.interp import attention

    right = attention.AttentionCall.attend

    def wrong(self, request):
        seen = right(self, request)
        if seen.entropy is not None:
            seen.entropy = seen.entropy * 1.01
        return seen

    monkeypatch.setattr(attention.AttentionCall, "attend", wrong)
    found = check_type("causal-lm", "llama")
    assert found.outcome == "wrong" and "entropy differs" in found.why


def test_a_crash_or_a_hang_ends_only_its_own_check(monkeypatch):
    monkeypatch.setattr(module, "check_type", lambda kind, name: 1 / 0)
    found = module.check_apart("causal-lm", "llama")
    assert found.outcome == "wrong" and "ZeroDivisionError" in found.why
    monkeypatch.setattr(module, "check_type", lambda kind, name: __import__("time").sleep(60))
    assert "more than 1 s" in module.check_apart("causal-lm", "llama", timeout=1.0).why


def test_sweep_reports_each_type_and_writes_a_row():
    seen: list[Finding] = []
    found = sweep(["causal-lm"], ["gpt2", "bloom"], report=seen.append)
    assert found == seen and [f.model_type for f in found] == ["bloom", "gpt2"]
    written = to_markdown(found)
    assert "| gpt2 | right | `transformer.h.*.attn` |" in written
    assert "| bloom | refused | BloomForCausalLM (bloom) is refused" in written
    assert "| causal-lm | 1 | 1 | 0 | 0 |" in written


def test_the_committed_table_holds_nothing_wrong_and_every_named_architecture():
    findings = [Finding(**entry) for entry in json.loads((FOLDER / "SUPPORT.json").read_text())]
    count = Counter(f.outcome for f in findings)
    assert count["wrong"] == 0 and count["right"] > 250
    assert set(NAMED) <= {f.model_type for f in findings if f.outcome == "right"}
    assert {f.kind for f in findings} == {"causal-lm", "image-text", "encoder", "encoder-decoder"}
    table = (FOLDER / "SUPPORT.md").read_text()
    assert all(f"| {f.model_type} | {f.outcome} |" in table for f in findings)


def test_the_kinds_list_transformers_types():
    assert {"llama", "gpt2"} <= set(model_types("causal-lm"))
    assert (
        "llava" in model_types("image-text")
        and "bert" in model_types("encoder")
        and "t5" in model_types("encoder-decoder")
    )


def test_shrinking_keeps_one_layer_of_each_kind_and_grouped_heads():
    small = shrink(
        {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "image_token_id": 99999,
            "eos_token_id": 2,
        }
    )
    assert small["layer_types"] == ["sliding_attention", "full_attention"] and small["num_hidden_layers"] == 2
    assert small["num_attention_heads"] == HEADS and small["num_key_value_heads"] < HEADS
    assert small["sliding_window"] <= 8 and small["image_token_id"] < 128 and small["eos_token_id"] == 2


def test_tiny_models_are_tiny_and_repeatable():
    import torch

    before = torch.random.get_rng_state()
    one, two, other = tiny_model("llama"), tiny_model("llama"), tiny_model("llama", seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sum(p.numel() for p in one.parameters()) < 1_000_000
    pairs = list(zip(one.parameters(), two.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize(
    ("name", "kind", "why"),
    [
        ("nosuch", "causal-lm", "no model type"),
        ("bert", "image-text", "no image-text"),
        ("llama", "x", "kind is one of"),
    ],
)
def test_what_does_not_exist_is_named(name, kind, why):
    with pytest.raises(HeadscopeError, match=why):
        tiny_model(name, kind)
    if name == "nosuch":
        with pytest.raises(HeadscopeError, match=why):
            tiny_config(name)
