"""The three sites agree: TransformerLens bridges and nnsight wrappers give the numbers of the Hugging Face model."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import nnsight
import pytest
import torch
import transformers as tf
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from headscope.interp import Tracer, trace
from headscope.interp.attention import AttentionCall, Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import attached, dense_masks, is_attached
from headscope.interp.sites import nnsight as nnsight_site
from headscope.interp.sites import transformer_lens as bridge_site
from headscope.interp.statistics import Entropy, HeadOutput, KeyMass, SinkMass, TopKeys
from headscope.interp.verify import verify_once
from headscope.interventions import AblateHeads, Intervention, apply
from headscope.kernels.masks import Mask

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = SIZES | {"max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
GROUPED = COMMON | {"num_key_value_heads": 2, "head_dim": 8}
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
TWO_KINDS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "eos_token_id": None}
TINY = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, GROUPED),
    "gemma3": (tf.Gemma3ForCausalLM, tf.Gemma3TextConfig, GROUPED | TWO_KINDS),
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config, GPT2),
    "gpt_neox": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig, COMMON | {"rotary_pct": 0.25}),
    "gpt_oss": (
        tf.GptOssForCausalLM,
        tf.GptOssConfig,
        GROUPED | TWO_KINDS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "deepseek_v3": (
        tf.DeepseekV3ForCausalLM,
        tf.DeepseekV3Config,
        COMMON | MLA | EXPERTS | {"num_key_value_heads": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "opt": (
        tf.OPTForCausalLM,
        tf.OPTConfig,
        {key: value for key, value in COMMON.items() if key != "intermediate_size"}
        | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "bloom": (tf.BloomForCausalLM, tf.BloomConfig, {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "qwen3_next": (
        tf.Qwen3NextForCausalLM,
        tf.Qwen3NextConfig,
        GROUPED
        | LINEAR
        | {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
}
SHOWN = ["llama", "gemma3", "gpt2", "gpt_neox", "gpt_oss", "deepseek_v3"]
STATISTICS = [Entropy(), SinkMass(), KeyMass(), TopKeys(1), HeadOutput((-1,))]
HEADS = [(0, 1), (1, 3)]


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    model, config, sizes = TINY[name]
    made = model(config(**sizes)).eval()
    for parameter in made.parameters():  # large enough that every head attends its own way
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)
    return made


def bridge_of(model: Any) -> Any:
    own = copy.deepcopy(model)  # a bridge changes its model in place
    return build_bridge_from_module(own, type(own).__name__, hf_config=own.config)


def prompt(name: str) -> dict[str, Tensor]:
    ids = torch.randint(2, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    if name not in ("gpt2", "opt"):  # a bridge gives left-padded tokens other absolute positions than transformers does
        mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def real(inputs: dict[str, Tensor], logits: Tensor) -> Tensor:
    return logits[inputs["attention_mask"].bool()]


def run_bridge(bridge: Any, inputs: dict[str, Tensor]) -> Tensor:
    return bridge(inputs["input_ids"], attention_mask=inputs["attention_mask"])


def run_nnsight(wrapper: Any, inputs: dict[str, Tensor]) -> Tensor:
    with wrapper.trace(**inputs):
        logits = wrapper.output.logits.save()
    return logits


def largest_difference(one: Any, other: Any) -> float:
    assert dict(one.sizes) == dict(other.sizes) and list(one.data_vars) == list(other.data_vars)
    assert one.attrs["site"] == other.attrs["site"]
    return max(float(abs(one[name].astype(float) - other[name].astype(float)).max()) for name in one.data_vars)


def hooks_on(model: Any) -> list[Any]:
    return [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), len(getattr(module, "fwd_hooks", ())))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("name", [*SHOWN, "opt"])
def test_bridge_and_nnsight_record_what_hugging_face_records(name: str) -> None:
    model, inputs = tiny(name), prompt(name)
    bridge, wrapper = bridge_of(model), nnsight.NNsight(model)
    with trace(model, STATISTICS) as plain:
        logits = model(**inputs).logits
    with trace(bridge, STATISTICS) as bridged:
        through_bridge = run_bridge(bridge, inputs)
    with trace(wrapper, STATISTICS) as wrapped:
        through_nnsight = run_nnsight(wrapper, inputs)
    assert float(plain.record["entropy"].max()) > 0.1
    assert largest_difference(plain.record, bridged.record) < 1e-5
    assert largest_difference(plain.record, wrapped.record) == 0.0
    assert float((real(inputs, logits) - real(inputs, through_bridge)).abs().max()) < 1e-5
    assert torch.equal(logits, through_nnsight)


@pytest.mark.parametrize("how", ["zero", "uniform"])
@pytest.mark.parametrize("name", SHOWN)
def test_ablation_gives_the_same_logits_through_each_site(name: str, how: Any) -> None:
    model, inputs = tiny(name), prompt(name)
    bridge, wrapper = bridge_of(model), nnsight.NNsight(model)
    with torch.no_grad():
        untouched = real(inputs, model(**inputs).logits)
        before = run_bridge(bridge, inputs)
    edit = AblateHeads(HEADS, how)
    with apply(model, edit):
        wanted = real(inputs, model(**inputs).logits)
    with apply(bridge, edit):
        through_bridge = real(inputs, run_bridge(bridge, inputs))
    with apply(wrapper, edit):
        through_nnsight = real(inputs, run_nnsight(wrapper, inputs))
    assert float((wanted - untouched).abs().max()) > 1e-3
    assert float((wanted - through_bridge).abs().max()) < 1e-5
    assert torch.equal(wanted, through_nnsight)
    with torch.no_grad():
        assert torch.equal(before, run_bridge(bridge, inputs))


@pytest.mark.parametrize("name", SHOWN)
def test_generation_with_a_cache_is_recorded_alike(name: str) -> None:
    model = tiny(name)
    bridge = bridge_of(model)
    ids = prompt(name)["input_ids"][:1]
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with trace(model, STATISTICS) as plain:
        tokens = model.generate(ids, **options)
    with trace(bridge, STATISTICS) as bridged:
        through_bridge = bridge.original_model.generate(ids, **options)
    assert torch.equal(tokens, through_bridge)
    assert plain.record.sizes["query"] == 25
    assert largest_difference(plain.record, bridged.record) < 1e-5


def test_the_bridge_splits_latent_attention_wrongly_and_we_do_not() -> None:
    bridge = bridge_of(tiny("deepseek_v3"))
    inputs = prompt("deepseek_v3")
    shapes: list[tuple[int, ...]] = []
    hooks = [("blocks.0.attn.hook_z", lambda z, hook: shapes.append(tuple(z.shape)))]
    bridge.run_with_hooks(inputs["input_ids"], fwd_hooks=hooks)
    assert shapes == [(2, 20, 8, 8)]  # four heads of 16, shown as eight of 8: why its own hook_z is not to be trusted
    with trace(bridge, [HeadOutput((-1,))]) as tracer:
        run_bridge(bridge, inputs)
    assert dict(tracer.record["z"].sizes) == {"example": 2, "layer": 2, "head": 4, "position": 1, "d_head": 16}


def test_rotary_hooks_of_gpt_neox_never_fire_and_we_do_not_need_them() -> None:
    bridge = bridge_of(tiny("gpt_neox"))
    fired: list[str] = []
    hooks = [("blocks.0.attn.hook_rot_q", lambda q, hook: fired.append("rot"))]
    bridge.run_with_hooks(prompt("gpt_neox")["input_ids"], fwd_hooks=hooks)
    assert fired == []
    assert verify_once(bridge).calls == 2


@pytest.mark.parametrize("name", ["bloom", "qwen3_next"])
def test_a_bridge_that_does_not_show_its_attention_is_refused_by_name(name: str) -> None:
    bridge = bridge_of(tiny(name))
    bridge(prompt(name)["input_ids"])
    clean = hooks_on(bridge)
    with pytest.raises(HeadscopeError, match=TINY[name][0].__name__), trace(bridge, STATISTICS):
        raise AssertionError("the block must not run")
    assert hooks_on(bridge) == clean


class DoublesValues(Intervention):
    def edit(self, call: AttentionCall) -> AttentionCall:
        return call.with_(value=call.value * 2.0)


class Fails(Handler):
    def observe(self, call: AttentionCall, attended: Any) -> None:
        raise AssertionError("not asked for anything")

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        if call.layer == 1:
            raise RuntimeError("in the middle")
        return z


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_nothing_stays_on_a_bridge(name: str) -> None:
    bridge, inputs = bridge_of(tiny(name)), prompt(name)
    verify_once(bridge)
    clean = hooks_on(bridge)
    with torch.no_grad():
        before = run_bridge(bridge, inputs)
    with trace(bridge, STATISTICS), trace(bridge, [Entropy()]):
        assert is_attached(bridge)
        run_bridge(bridge, inputs)
    assert not is_attached(bridge) and hooks_on(bridge) == clean
    with pytest.raises(RuntimeError, match="in the middle"), attached(bridge, Fails()):
        run_bridge(bridge, inputs)
    assert not is_attached(bridge) and hooks_on(bridge) == clean
    with torch.no_grad():
        assert torch.equal(before, run_bridge(bridge, inputs))


def test_nothing_stays_on_a_wrapped_model() -> None:
    model, inputs = tiny("llama"), prompt("llama")
    wrapper = nnsight.NNsight(model)
    with torch.no_grad():
        before = run_nnsight(wrapper, inputs)
    clean = hooks_on(model)
    with pytest.raises(Exception, match="in the middle"), attached(wrapper, Fails()):
        run_nnsight(wrapper, inputs)
    assert not is_attached(wrapper) and hooks_on(model) == clean
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(before, run_nnsight(wrapper, inputs))


def test_run_with_hooks_takes_tracers_and_interventions() -> None:
    bridge, inputs = bridge_of(tiny("llama")), prompt("llama")
    edit = AblateHeads(HEADS)
    with apply(bridge, edit), trace(bridge, STATISTICS) as wanted:
        logits = run_bridge(bridge, inputs)
    clean = hooks_on(bridge)
    tracer = Tracer(bridge, STATISTICS)
    hooks = bridge_site.fwd_hooks(bridge, edit, tracer)
    with torch.no_grad():
        hooked = bridge.run_with_hooks(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], fwd_hooks=hooks, return_type="logits"
        )
    assert torch.equal(logits, hooked)
    assert largest_difference(wanted.record, tracer.record) == 0.0
    assert hooks_on(bridge) == clean


def test_hooks_in_the_wrong_order_or_on_a_cache_are_refused() -> None:
    bridge, ids = bridge_of(tiny("llama")), prompt("llama")["input_ids"]
    hooks = bridge_site.fwd_hooks(bridge, Tracer(bridge, STATISTICS))
    later = [("blocks.0.attn.hook_rot_q", lambda q, hook: q * 2.0)]
    with pytest.raises(HeadscopeError, match="last"):
        bridge.run_with_hooks(ids, fwd_hooks=[*hooks, *later])
    with torch.no_grad():
        cache = bridge.original_model(ids[:, :10], use_cache=True).past_key_values
        with bridge.hooks(fwd_hooks=hooks), pytest.raises(HeadscopeError, match="cache"):
            bridge.original_model(ids[:, 10:], past_key_values=cache)


def test_the_users_own_hooks_act_first() -> None:
    bridge, ids = bridge_of(tiny("llama")), prompt("llama")["input_ids"]
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


def test_a_users_pattern_edit_that_statistics_would_miss_is_refused() -> None:
    bridge, ids = bridge_of(tiny("llama")), prompt("llama")["input_ids"]
    own = [("blocks.1.attn.hook_pattern", lambda pattern, hook: torch.zeros_like(pattern))]
    with trace(bridge, [Entropy()]), pytest.raises(HeadscopeError, match=r"blocks\.1\.attn"):
        bridge.run_with_hooks(ids, fwd_hooks=own)


def test_a_users_pattern_edit_composes_with_an_edit_of_outputs() -> None:
    bridge, ids = bridge_of(tiny("llama")), prompt("llama")["input_ids"]
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


def test_the_bridges_cache_shows_the_edited_pattern() -> None:
    bridge, ids = bridge_of(tiny("llama")), prompt("llama")["input_ids"]
    with apply(bridge, AblateHeads([(1, 2)], "uniform")):
        _, cache = bridge.run_with_cache(ids)
    pattern = cache["blocks.1.attn.hook_pattern"][:, 2]
    uniform = torch.ones(20, 20).tril() / torch.arange(1, 21)[:, None]
    assert float((pattern - uniform).abs().max()) < 1e-6
    assert float((cache["blocks.1.attn.hook_pattern"][:, 1] - uniform).abs().max()) > 1e-2


def test_a_changed_value_replaces_hook_z() -> None:
    model, inputs = tiny("llama"), prompt("llama")
    bridge = bridge_of(model)
    with torch.no_grad(), attached(model, DoublesValues()):
        wanted = real(inputs, model(**inputs).logits)
    with torch.no_grad(), attached(bridge, DoublesValues()):
        found = real(inputs, run_bridge(bridge, inputs))
    assert float((wanted - found).abs().max()) < 1e-5
    assert float((wanted - real(inputs, model(**inputs).logits)).abs().max()) > 1e-2


def test_active_dropout_is_refused() -> None:
    model = tiny("llama")
    bridge = bridge_of(model)
    verify_once(bridge)
    bridge.blocks[0].attn.original_component.attention_dropout = 0.1
    bridge.train()
    with trace(bridge, [Entropy()]), pytest.raises(HeadscopeError, match="dropout"):
        bridge(prompt("llama")["input_ids"])


@pytest.mark.parametrize("remote", [False, "local"])
@pytest.mark.parametrize("name", SHOWN)
def test_a_prompt_through_nnsights_graph_alone(name: str, remote: Any) -> None:
    model, inputs = tiny(name), prompt(name)
    wrapper = nnsight.NNsight(model)
    edit = AblateHeads(HEADS, strength=0.5)
    with apply(model, edit), trace(model, STATISTICS) as wanted:
        logits = real(inputs, model(**inputs).logits)
    tracer = Tracer(wrapper, STATISTICS)
    found = nnsight_site.run(wrapper, handlers=[edit, tracer], remote=remote, **inputs)
    assert largest_difference(wanted.record, tracer.record) < 1e-5
    assert float((logits - real(inputs, found)).abs().max()) < 1e-5
    assert float((real(inputs, model(**inputs).logits) - logits).abs().max()) > 1e-3


def test_what_nnsights_graph_cannot_do_is_refused() -> None:
    inputs = prompt("llama")
    wrapper = nnsight.NNsight(tiny("llama"))
    with pytest.raises(HeadscopeError, match="inside attention"):
        nnsight_site.run(wrapper, handlers=[AblateHeads(HEADS, "uniform")], **inputs)

    class Positions(Handler):
        def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
            return z * torch.arange(z.shape[2])[:, None]

    with pytest.raises(HeadscopeError, match="per head"):
        nnsight_site.run(wrapper, handlers=[Positions()], **inputs)
    with pytest.raises(HeadscopeError, match="before o_proj"):
        nnsight_site.run(nnsight.NNsight(tiny("qwen3_next")), handlers=[AblateHeads([(1, 0)])], **inputs)
    with pytest.raises(HeadscopeError, match="BloomForCausalLM"):
        nnsight_site.run(nnsight.NNsight(tiny("bloom")), **inputs)


def test_a_wrapper_without_weights_is_refused_here() -> None:
    wrapper = nnsight.NNsight(tiny("llama"))
    wrapper.dispatched = False
    with pytest.raises(HeadscopeError, match="dispatch"), trace(wrapper, [Entropy()]):
        raise AssertionError("the block must not run")


def test_missing_packages_and_wrong_objects_have_clear_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    with pytest.raises(HeadscopeError, match="expected a TransformerBridge, got LlamaForCausalLM"):
        bridge_site.fwd_hooks(model, Fails())
    with pytest.raises(HeadscopeError, match="expected an nnsight wrapper"):
        nnsight_site.run(model)
    for package in ("transformer_lens", "nnsight"):
        monkeypatch.setitem(sys.modules, package, None)
    for call in (lambda: bridge_site.fwd_hooks(model), lambda: nnsight_site.run(model)):
        with pytest.raises(HeadscopeError, match=r"pip install 'headscope\[sites\]'"):
            call()


def test_a_plain_model_imports_neither_package() -> None:
    code = """
import sys, torch, transformers
from headscope.interp import trace
from headscope.interp.statistics import Entropy
config = transformers.LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                  num_attention_heads=2)
model = transformers.LlamaForCausalLM(config)
with trace(model, [Entropy()]):
    model(input_ids=torch.ones(1, 3, dtype=torch.long))
assert not {"transformer_lens", "nnsight"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("window", [None, 3])
def test_dense_masks_become_rules(window: int | None) -> None:
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[0, :2] = False
    padding[1, 7:] = False
    at = torch.arange(9)
    visible = (at[:, None] >= at) & (at[:, None] - at < (window or 99)) & padding[:, None, None]
    rule = dense_masks.rule_of(visible, real=padding)
    assert rule.rule is None and rule.right == 0
    assert rule.left == (None if window is None else window - 1)
    assert dense_masks.agrees(rule, visible)
    assert not dense_masks.agrees(Mask.causal(), visible)
    decoding = dense_masks.rule_of(visible[:, :, 6:7], query_offset=6, real=padding)
    assert dense_masks.agrees(decoding, visible[:, :, 6:7])
    holes = visible.clone()
    holes[:, :, 5, 4] = False
    looked_up = dense_masks.rule_of(holes, real=padding)
    assert looked_up.rule is not None and dense_masks.agrees(looked_up, holes)


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


@pytest.mark.slow
def test_generation_inside_nnsight_is_traced_and_edited(smollm2: Any) -> None:
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
    assert largest_difference(plain.record, wrapped.record) < 1e-5
    assert plain.record.sizes["query"] == ids.shape[1] + 3
