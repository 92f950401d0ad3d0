"""Placement: offloaded and dispatched weights, layers on several devices, and what cannot be loaded so."""

from __future__ import annotations

import accelerate
import pytest
import torch
from transformers import LlamaForCausalLM

from headscope.interp import load_model, trace
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import output_projections
from headscope.interp.models.placement import fetched
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites import attached, verify
from headscope.interp.sites.huggingface.masks import _on, lazy_mask
from headscope.interp.sites.unwrap import model_device
from headscope.interp.statistics import Entropy, KeyMass, LogSumExp, SinkMass
from headscope.interp.survey.tiny import tiny_model
from headscope.interventions import AblateHeads, apply

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


def largest_difference(one, other) -> float:
    assert set(one.data_vars) == set(other.data_vars)
    return max(float(abs(one[name] - other[name]).fillna(0).max()) for name in one.data_vars)


# -- weights that are elsewhere ----------------------------------------------------------------------------------------

SPREAD = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
SPREAD |= {"model.rotary_emb": "cpu", "lm_head": "disk"}


def offloaded(folder, model):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(folder, model):
    return accelerate.disk_offload(model, str(folder / "weights"), execution_device=torch.device("cpu"))


def dispatched(folder, model):
    return accelerate.dispatch_model(model, SPREAD, main_device="cpu", offload_dir=str(folder / "weights"))


def loaded(folder, model):
    model.save_pretrained(folder / "model")
    return load_model(folder / "model", device_map=SPREAD).model


WAYS = {offloaded: "cpu (offloaded)", on_disk: "cpu (offloaded)", dispatched: "cpu, disk", loaded: "cpu, disk"}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_whose_weights_are_elsewhere(tmp_path, way):
    twin, model = tiny_model("llama"), way(tmp_path, tiny_model("llama"))
    assert {parameter.device.type for parameter in model.model.layers[1].parameters()} == {"meta"}
    assert verify(model).passed
    lm = load_model(model)
    assert (str(lm.device), lm.info.device) == ("cpu", WAYS[way])
    assert provenance(lm)["model"]["device"] == WAYS[way]
    assert output_projections(model) == output_projections(twin)
    with trace(model, STATISTICS) as tracer:
        traced = model(**inputs()).logits
    with trace(twin, STATISTICS) as plain:
        expected = twin(**inputs()).logits
    assert torch.equal(traced, expected)
    assert largest_difference(tracer.record, plain.record) == 0.0
    heads = AblateHeads([(0, 1), (1, 2)])
    with apply(model, heads):
        edited = generate(model)
    with apply(twin, heads):
        assert torch.equal(edited, generate(twin))
    assert {parameter.device.type for parameter in model.model.layers[1].parameters()} == {"meta"}
    with torch.no_grad():
        assert torch.equal(model(**inputs()).logits, twin(**inputs()).logits)


def test_fetched_weights_are_there_inside_the_block_and_gone_after_it(tmp_path):
    twin, model = tiny_model("llama"), dispatched(tmp_path, tiny_model("llama"))
    with fetched(model.lm_head) as head:
        assert torch.equal(head.weight, twin.lm_head.weight)
    assert model.lm_head.weight.is_meta


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_model("llama").config)
    with pytest.raises(HeadscopeError, match="has no weights"):
        with trace(model, STATISTICS):
            pass


@pytest.mark.slow
def test_direct_logit_attribution_of_offloaded_weights():
    from headscope.probes import logit_attribution

    texts, targets = ["The capital of France is", "Two and two make"], [" Paris", " four"]
    lm = load_model("smollm2-135m")
    layers = {f"model.layers.{i}": "disk" if i > 26 else "cpu" for i in range(30)}
    names = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", **layers}
    spread = load_model("smollm2-135m", device_map=names)
    assert spread.info.device == "cpu, disk"
    plain = logit_attribution(lm, texts, targets, progress=False)
    elsewhere = logit_attribution(spread, texts, targets, progress=False)
    assert float(abs(plain.trials - elsewhere.trials).max()) == 0.0


# -- several devices ---------------------------------------------------------------------------------------------------


def test_a_mask_moves_with_what_a_layer_is_called_with():
    """accelerate sends every argument of a layer to the layer's device; only values are out of reach without two."""
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[0, :2] = padding[1, 4] = 0  # one padded on the left, one with a hole: a rule
    mask = lazy_mask(2, 9, 9, attention_mask=padding)
    assert mask.rule.rule is not None and mask.gaps
    moved = accelerate.utils.send_to_device({"attention_mask": mask}, "meta")["attention_mask"]
    assert (moved.device.type, moved.shape, moved.gaps) == ("meta", mask.shape, True)
    assert moved.rule.start.device.type == moved.rule.end.device.type == "meta"
    assert moved.rule is mask.to("meta").rule  # one object for all layers there
    assert mask.to("cpu") is mask
    assert moved.original("sdpa").device.type == "meta"
    rows = torch.arange(9)
    here = torch.device("cpu")
    assert torch.equal(_on(mask.rule, here, here).tile(rows, rows), mask.rule.tile(rows, rows))
    with pytest.raises(HeadscopeError, match="reads its attention mask itself"):
        mask.to(torch.float32)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_layers_on_two_devices(architecture):
    twin, model = tiny_model(architecture), tiny_model(architecture)
    head = 0 if model.config.tie_word_embeddings else 1
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": head}
    model = accelerate.dispatch_model(model, {**places, "model.rotary_emb": 0})
    assert load_model(model).info.device == "cuda:0, cuda:1"
    assert verify(model).passed
    placed = {name: x.to("cuda:0") for name, x in inputs().items()}
    devices = set()

    class Where(Handler):
        def edit(self, call):
            devices.add((call.layer, str(call.query.device), str(call.mask.start.device)))
            return call

    with trace(model, STATISTICS) as tracer, attached(model, Where()):
        model(**placed)
    assert devices == {(0, "cuda:0", "cuda:0"), (1, "cuda:1", "cuda:1")}
    with trace(twin, STATISTICS) as plain:
        twin(**inputs())
    assert largest_difference(tracer.record, plain.record) < 1e-4  # another device's order of sums
    heads = AblateHeads([(0, 1), (1, 2)])
    with apply(model, heads), trace(model, STATISTICS) as tracer:
        generate(model)
    with apply(twin, heads), trace(twin, STATISTICS) as plain:
        generate(twin)
    assert largest_difference(tracer.record, plain.record) < 1e-4


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path)
    cases = [
        ({"device": "cpu", "device_map": "auto"}, "not both"),
        ({"quantize": "3bit"}, "'4bit', '8bit' or a quantization config"),
        ({"device_map": "everywhere"}, "device_map"),
    ]
    monkeypatch.setattr("headscope.interp.models.options.find_spec", lambda name: None)
    cases.append(({"quantize": "4bit"}, r"pip install 'headscope\[quantized\]'"))
    for options, message in cases:
        with pytest.raises(HeadscopeError, match=message):
            load_model(tmp_path, **options)
    for options in ({"device_map": "auto"}, {"quantize": "8bit"}):
        with pytest.raises(HeadscopeError, match="models that are loaded|headscope"):
            load_model(tiny_model("llama"), **options)
        monkeypatch.undo()
