"""What a handler is shown: one tower, the layers that were named, and an error where a named layer never attends."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from headscope.interp import trace
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import attached, handlers_on, is_attached
from headscope.interp.sites.inputs import example_inputs
from headscope.interp.sites.sizes import tower_size
from headscope.interp.statistics import Entropy
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing.reference_run import keep_attention
from headscope.interventions import AblateHeads, apply

IDS = torch.randint(5, 90, (1, 12), generator=torch.Generator().manual_seed(0))
UNEVEN = {"vocab_size": 97, "d_model": 32, "decoder_start_token_id": 0, "pad_token_id": 1}


class Seen(Handler):
    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def edit(self, call):
        self.calls.append((call.module, call.layer))
        return call


def bart(encoder: int, decoder: int, heads: int = 4) -> tf.BartForConditionalGeneration:
    sizes = {"encoder_layers": encoder, "decoder_layers": decoder, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    counts = {"encoder_attention_heads": 4, "decoder_attention_heads": heads}
    config = tf.BartConfig(**UNEVEN, **sizes, **counts, max_position_embeddings=64)
    torch.manual_seed(0)
    model = tf.BartForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def own_forward(model: tf.LlamaForCausalLM, layer: int) -> None:
    """Replace a layer's forward by one that makes no attention call."""
    attention = model.model.layers[layer].self_attn
    attention.forward = lambda hidden_states, **_: (attention.o_proj(attention.q_proj(hidden_states)), None)


def test_a_handler_sees_one_tower_or_all():
    model = tiny_model("llava", "image-text")
    inputs = example_inputs(model)
    for tower, parts in ((None, {"language"}), ("vision", {"vision"}), ("all", {"language", "vision"})):
        seen = Seen()
        with attached(model, seen, tower=tower):
            model(**inputs)
        assert {part for part in ("language", "vision") for module, _ in seen.calls if part in module} == parts
    assert not is_attached(model)


def test_a_handler_sees_the_layers_that_were_named():
    model, seen = tiny_model("llama"), Seen()
    with attached(model, seen, layers=[1]):
        model(IDS)
        assert handlers_on(model) == [(seen, "language")]
    assert {layer for _, layer in seen.calls} == {1}


@pytest.mark.parametrize("layers", [[0, 50], [-1], [99]])
def test_layers_that_do_not_exist_are_refused_at_entry(layers):
    model = tiny_model("llama")
    for enter in (lambda: trace(model, [Entropy()], layers=layers), lambda: keep_attention(model, layers=layers)):
        with pytest.raises(HeadscopeError, match=rf"layer {layers[-1]} does not exist in 'language', .*layers 0-1"):
            with enter():
                raise AssertionError("the block must not run")


@pytest.mark.parametrize("name", ["qwen3_next", "jamba", "recurrent_gemma"])
def test_layers_without_softmax_attention_are_refused_at_entry(name):
    model = tiny_model(name)
    with trace(model, [Entropy()]) as tracer:
        model(IDS)
    attends = tracer.record["layer"].values.tolist()
    assert list(tower_size(model).heads) == attends == [1] and tower_size(model).depth == 2
    blocks = (lambda: apply(model, AblateHeads([(0, 1)])), lambda: trace(model, [Entropy()], layers=[0]))
    for enter in blocks:
        with pytest.raises(HeadscopeError, match="layer 0 .* makes no softmax attention call; these layers do: 1"):
            with enter():
                raise AssertionError("the block must not run")


def test_a_decoder_of_another_depth_than_its_encoder():
    """Heads are the decoder's; against the same heads zeroed by a hook on its output projection."""
    model = bart(encoder=2, decoder=4)
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :6]}

    def zero(module, args):
        return (torch.cat([torch.zeros_like(args[0][..., :8]), args[0][..., 8:]], -1),)

    hook = model.model.decoder.layers[3].self_attn.out_proj.register_forward_pre_hook(zero)
    with torch.no_grad():
        want = model(**inputs).logits
    hook.remove()
    with apply(model, AblateHeads([(3, 0)])):
        got = model(**inputs).logits
    # float32 through six layers: a few hundred roundings of 1.2e-7 of logits of order 1
    with torch.no_grad():
        assert (got - want).abs().max() < 1e-5 < (got - model(**inputs).logits).abs().max()
    with pytest.raises(HeadscopeError, match="L3H0 does not exist: .*layers 0-1"):
        with apply(bart(encoder=4, decoder=2), AblateHeads([(3, 0)])):
            raise AssertionError("the block must not run")


def test_a_decoder_of_other_heads_than_its_encoder():
    model = bart(encoder=2, decoder=2, heads=2)
    assert tower_size(model).heads == {0: 2, 1: 2} and tower_size(model, "encoder").heads == {0: 4, 1: 4}
    with pytest.raises(HeadscopeError, match="L0H3 does not exist: .*heads 0-1"), apply(model, AblateHeads([(0, 3)])):
        raise AssertionError("the block must not run")


def test_heads_of_a_layer_that_never_attended_are_named_when_the_block_ends():
    model = tiny_model("llama")
    own_forward(model, 1)
    with pytest.raises(HeadscopeError, match=r"L1H0, L1H2 of 'language' attended in none of the 1 finished"):
        with apply(model, AblateHeads([(0, 1), (1, 0), (1, 2)])):
            model(IDS)
    with pytest.raises(HeadscopeError, match="layer 1 of 'language' attended in none of the 2 finished"):
        with trace(model, [Entropy()], layers=[0, 1]) as tracer:
            model(IDS)
            model(IDS)
    assert tracer.record["layer"].values.tolist() == [0]
    assert not is_attached(model)


def test_the_users_own_exception_comes_through_and_nothing_run_is_no_error():
    model = tiny_model("llama")
    own_forward(model, 1)
    with pytest.raises(ValueError, match="mine"), apply(model, AblateHeads([(1, 0)])):
        model(IDS)
        raise ValueError("mine")
    with apply(model, AblateHeads([(1, 0)])):
        pass


def test_an_encoder_that_generate_runs_outside_a_pass_has_attended():
    model = bart(encoder=2, decoder=2)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 1}
    plain = model.generate(IDS, **options, output_scores=True, return_dict_in_generate=True).scores[0]
    with apply(model, AblateHeads([(1, 0)]), tower="encoder"):
        edited = model.generate(IDS, **options, output_scores=True, return_dict_in_generate=True).scores[0]
    assert not torch.equal(edited.nan_to_num(), plain.nan_to_num())


def test_what_is_no_model_is_refused_in_one_line():
    for thing in (torch.nn.Linear(2, 2), torch.nn.DataParallel(torch.nn.Linear(2, 2))):
        with pytest.raises(HeadscopeError, match=f"{type(thing).__name__} is not a Hugging Face model"):
            with attached(thing, Handler()):
                raise AssertionError("the block must not run")
