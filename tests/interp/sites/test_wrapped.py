"""What a model may be wrapped in, shared with, copied into or run under, and what is refused by name."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, LlamaForCausalLM

from headscope.interp import load_model
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import LanguageModel
from headscope.interp.sites import verify
from headscope.interp.sites.huggingface.route import attached
from headscope.interp.statistics import Entropy, KeyMass, SinkMass
from headscope.interp.survey.tiny import tiny_config, tiny_model
from headscope.interp.tracing.maps import patterns
from headscope.interp.tracing.recording import trace
from headscope.interventions import AblateHeads, apply

IDS = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(1))


class Idle(Handler):
    def concerns(self, module: str, layer: int) -> bool:
        return False


def entropy_of(model: Any, ids: Tensor) -> Tensor:
    """From the eager weights of a copy."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        p = torch.stack(twin(input_ids=ids, output_attentions=True, use_cache=False).attentions, 1).double()
    return -(p * p.clamp(min=1e-300).log()).sum(-1)


def assert_entropy(record: Any, wanted: Tensor) -> None:
    assert (torch.tensor(record["entropy"].to_numpy()) - wanted).abs().max() < 1e-5


class Holds(nn.Module):
    """A user's model around a language model."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.body = nn.ModuleList(models)
        self.head = nn.Linear(2, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.body[0](ids).logits


@pytest.mark.parametrize("wrap", [Holds, nn.DataParallel, lambda model: Holds(nn.DataParallel(model))])
def test_modules_around_a_model(wrap: Any) -> None:
    model = tiny_model("llama")
    wrapped = wrap(model)
    with trace(wrapped, [Entropy()]) as tracer:
        wrapped(IDS)
    assert_entropy(tracer.record, entropy_of(model, IDS))
    with torch.no_grad():
        plain = model(IDS).logits
    with apply(wrapped, AblateHeads([(0, 0)])):
        assert not torch.equal(model(IDS).logits, plain)
    assert torch.equal(model(IDS).logits, plain)


def test_what_cannot_be_unwrapped_is_refused() -> None:
    for module, why in ((nn.Linear(2, 2), "not a Hugging Face model"), (Holds(), "not a Hugging Face model")):
        with pytest.raises(HeadscopeError, match=why):
            with trace(module, [Entropy()]):
                pass
    with pytest.raises(HeadscopeError, match=r"Holds holds several models \(LlamaForCausalLM and GPT2LMHeadModel\)"):
        with trace(Holds(tiny_model("llama"), tiny_model("gpt2")), [Entropy()]):
            pass


def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_model("llama")
        wrapped = nn.parallel.DistributedDataParallel(model)
        with trace(wrapped, [Entropy()]) as tracer:
            wrapped(IDS)
        assert_entropy(tracer.record, entropy_of(model, IDS))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("call", [lambda model: trace(model, [Entropy()], verify=False), verify])
def test_a_split_that_transformers_did_not_make_is_refused_by_name(call: Any) -> None:
    model = tiny_model("llama")
    model._tp_size = 2  # as after from_pretrained(..., tp_plan="auto"), but without the processes' mesh
    with pytest.raises(HeadscopeError, match=r"tensor parallelism \(tp_plan\).*device_map='auto'"):
        with call(model):
            pass


def test_models_that_share_one_configuration_object() -> None:
    config = tiny_config("llama")
    one, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    with torch.no_grad():
        first, second = one(IDS).logits, other(IDS).logits
    with trace(one, [Entropy()]) as traced:
        assert torch.equal(other(IDS).logits, second)
        with trace(other, [Entropy()]) as inner:
            other(IDS)
        one(IDS)
    for tracer, model in ((traced, one), (inner, other)):
        assert_entropy(tracer.record, entropy_of(model, IDS))
    with apply(one, AblateHeads([(0, 0)])):
        assert torch.equal(other(IDS).logits, second)
    outer, later = trace(one, [Entropy()]), trace(other, [Entropy()])
    outer.__enter__()
    later.__enter__()
    outer.__exit__(None, None, None)
    other(IDS)
    later.__exit__(None, None, None)
    assert config._attn_implementation == "sdpa"
    assert torch.equal(one(IDS).logits, first) and torch.equal(other(IDS).logits, second)


def test_copies_and_files_made_inside_a_block_are_of_the_model(tmp_path: Path) -> None:
    model, stream = tiny_model("llama"), io.BytesIO()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        plain, text = model(IDS).logits, model.generate(IDS, **options)
    with trace(model, [Entropy()]) as tracer:
        torch.save(model, stream)
        model.save_pretrained(tmp_path)
        copied = copy.deepcopy(model)
        assert torch.equal(copied(IDS).logits, plain)
        assert torch.equal(copied.generate(IDS, num_beams=1, **options), text)
    with pytest.raises(HeadscopeError, match="nothing was recorded|no forward pass"):
        _ = tracer.record
    stream.seek(0)
    assert b"headscope" not in stream.getvalue()
    for made in (copied, torch.load(stream, weights_only=False), LlamaForCausalLM.from_pretrained(tmp_path)):
        assert made.config._attn_implementation == "sdpa"
        with torch.no_grad():
            assert torch.equal(made(IDS).logits, plain)
            assert torch.equal(made.generate(IDS, **options), text)
        with trace(made, [Entropy()]) as tracer:
            made(IDS)
        assert_entropy(tracer.record, entropy_of(model, IDS))


def test_the_language_model_within_a_larger_one_may_be_called_by_itself_and_twice() -> None:
    model = tiny_model("llava", "image-text")
    ids = IDS % 60 + 5
    with trace(model, [Entropy()]) as tracer:
        model.model.language_model(input_ids=ids)
        model.model.language_model(input_ids=ids[:1, :5])
    assert tracer.record["length"].to_numpy().tolist() == [9, 9, 5]
    assert_entropy(tracer.record.isel(example=slice(0, 2)), entropy_of(model.model.language_model, ids))


def test_what_gradient_checkpointing_computes_again_is_edited_and_not_recorded() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with apply(model, AblateHeads([(0, 0)])), trace(model, [Entropy()]) as tracer, torch.enable_grad():
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        assert tracer.record.sizes["example"] == 2
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert float(gradients[0].abs().max()) > 0
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=1e-5)


def test_autocast_around_the_first_block() -> None:
    model = tiny_model("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with trace(model, [Entropy()]) as tracer:
            model(IDS)
        with attached(model, Idle()), torch.no_grad():
            inside = model(IDS).logits
        with torch.no_grad():
            plain = model(IDS).logits
    assert torch.equal(inside, plain)
    found = torch.tensor(tracer.record["entropy"].to_numpy())
    # queries and keys are rounded to 8 bits: scores of up to 4 by 2^-7 of them, entropies by log(9) times that
    assert (found - entropy_of(model, IDS)).abs().max() < 4 * 2**-7 * 2.2


def test_a_hook_that_edits_the_mask_is_named() -> None:
    model = tiny_model("llama")

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"]
        return args, {**kwargs, "attention_mask": None if mask is None else mask & True}

    model.model.layers[0].self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(HeadscopeError, match="or a hook on it, reads its attention mask itself.*remove the hook"):
        with trace(model, [Entropy()]):
            pass


def test_prompts_on_copies_of_one_prefix_are_examples_of_their_own() -> None:
    """As prefix tuning runs every prompt, and transformers' guide to caching a prefix."""
    model, prefix = tiny_model("llama"), IDS[:1, :4]
    questions = [IDS[:1, 4:], IDS[1:, 4:7]]
    with torch.no_grad():
        cache = model(prefix, use_cache=True).past_key_values
    with trace(model, [Entropy(), SinkMass(), KeyMass()]) as tracer:
        for question in questions:
            model(question, past_key_values=copy.deepcopy(cache))
    for example, question in enumerate(questions):
        wanted = entropy_of(model, torch.cat([prefix, question], 1))[0, :, :, 4:]
        found = tracer.record.isel(example=example)["entropy"].to_numpy()[:, :, : question.shape[1]]
        assert (torch.tensor(found) - wanted).abs().max() < 1e-5


def test_maps_of_a_hybrid_name_the_layers_without_attention(kit: Any) -> None:
    class Words:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [str(i) for i in ids]

    lm = LanguageModel.wrap(kit.tiny("qwen3_next"))
    lm.tokenizer = Words()
    lm.encode = lambda prompts: {"input_ids": IDS[:1], "attention_mask": torch.ones_like(IDS[:1])}
    with pytest.raises(HeadscopeError, match="layer 0 of 'language' makes no softmax attention call"):
        patterns(lm, "text", layer=0)
    found = patterns(lm, "text")[0]
    assert np.isnan(found[0]).all() and np.array_equal(found[1], patterns(lm, "text", layer=1)[0])
    assert found.shape == (2, 4, 9, 9) and not np.isnan(found[1]).any()


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForSequenceClassification])
def test_an_encoder_is_loaded_as_what_it_was_saved_as(kind: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    saved = kind(BertConfig(**sizes, vocab_size=100)).eval()
    saved.save_pretrained(tmp_path)
    lm = load_model(tmp_path)
    assert type(lm.model) is kind
    with trace(lm, [Entropy()]) as tracer:
        lm.model(input_ids=IDS)
    assert_entropy(tracer.record, entropy_of(saved, IDS))
