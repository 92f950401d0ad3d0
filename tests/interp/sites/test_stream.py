"""The residual stream as a place to read and edit, against plain hooks and the model's own hidden states.

Tolerance: reading is exact. An edit of ``resid_mid`` goes through a difference and a sum of numbers of the stream's
size, so it is off by a few roundings of 1.2e-7 of it; the others are the plain hook's own operations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headscope.interp import trace
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import attached
from headscope.interp.sites.inputs import example_inputs
from headscope.interp.sites.layout import stream_layers
from headscope.interp.statistics import Entropy, HeadOutput, Resid
from headscope.interp.survey.tiny import tiny_model
from headscope.interventions import AblateHeads, apply
from headscope.interventions.base import Intervention

IN_TURN = ["llama", "gpt2", "gemma2", "gemma3_text", "olmo2", "mixtral", "deepseek_v3"]
AT_ONCE = ["gpt_neox", "phi", "cohere"]
REFUSED = ["bert", "opt", "falcon_h1"]


class Add(Handler):
    """Adds a vector at one place, layer and position."""

    def __init__(self, place: str, layer: int, position: int, vector: Tensor) -> None:
        self.streams, self.at, self.vector = (place,), (layer, position), vector

    def stream(self, call):
        if call.layer != self.at[0]:
            return call.x
        return torch.where((call.position == self.at[1])[..., None], call.x + self.vector, call.x)


class Seen(Handler):
    def __init__(self, *places: str) -> None:
        self.streams = places
        self.x: dict[tuple[str, int], Tensor] = {}

    def stream(self, call):
        self.x[call.place, call.layer] = call.x.clone()
        return call.x


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(4, 90, (2, 11), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    real[0, :3] = 0
    return {"input_ids": ids, "attention_mask": real}


def logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


def hooks_on(model: Any) -> list[tuple[int, int]]:
    return [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()]


# not gemma2, whose own softmax in float32 makes the float64 mask NaN, nor mixtures, whose kernels take no float64
@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2", *AT_ONCE])
def test_a_float64_model_has_the_writers_of_a_float32_one(name):
    """Its stream is added up in float64, so float64's eps holds, though norms compute in float32 before it."""
    wide = stream_layers(tiny_model(name).double(), "language")
    for layer, plain in zip(wide, stream_layers(tiny_model(name), "language"), strict=True):
        assert layer.writers and set(layer.writers) == set(plain.writers) and layer.in_turn == plain.in_turn


@pytest.mark.parametrize("name", IN_TURN + AT_ONCE)
def test_the_stream_is_what_entered_and_what_was_written(name):
    model, given = tiny_model(name), inputs()
    with torch.no_grad():
        states = model(**given, output_hidden_states=True).hidden_states
    clean = hooks_on(model)
    places = ("resid_pre", "attn_out", "mlp_out", "resid_post") + (("resid_mid",) if name in IN_TURN else ())
    seen = Seen(*places)
    with attached(model, seen):
        edited = logits(model, given)
    assert torch.equal(edited, logits(model, given))
    for layer in range(2):
        x = {place: seen.x[place, layer] for place in places}
        assert torch.equal(x["resid_pre"], states[layer])
        torch.testing.assert_close(x["resid_pre"] + x["attn_out"] + x["mlp_out"], x["resid_post"], atol=1e-6, rtol=1e-6)
        assert float(x["attn_out"].norm()) > 0 and float(x["mlp_out"].norm()) > 0
        if name in IN_TURN:
            assert torch.equal(x["resid_mid"], x["resid_pre"] + x["attn_out"])
    assert torch.equal(seen.x["resid_post", 0], states[1])
    assert hooks_on(model) == clean


@pytest.mark.parametrize("place", ["resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_adding_a_vector_is_a_plain_hook(name, place):
    """Against the vector added by hand to the module that gives the stream or what is written; the plain hook at the
    stream's middle adds it to what attention writes."""
    model, given = tiny_model(name), inputs()
    layers = model.transformer.h if name == "gpt2" else model.model.layers
    block, width = layers[1], model.config.hidden_size
    vector = torch.linspace(-1, 1, width)
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    attention, mlp = (
        (getattr(block, part) for part in (norms if name == "gemma2" else ("self_attn", "mlp")))
        if (name != "gpt2")
        else (block.attn, block.mlp)
    )
    part = {"attn_out": attention, "resid_mid": attention, "mlp_out": mlp}.get(place, block)
    rows = given["attention_mask"].int().argmax(1) + 4  # each example's fifth real token

    def added(x: Tensor) -> Tensor:
        x = x.clone()
        x[torch.arange(2), rows] += vector
        return x

    def before(module: Any, args: tuple[Any, ...]) -> Any:
        return (added(args[0]), *args[1:])

    def after(module: Any, args: Any, output: Any) -> Any:
        return (added(output[0]), *output[1:]) if isinstance(output, tuple) else added(output)

    hook = part.register_forward_pre_hook(before) if place == "resid_pre" else part.register_forward_hook(after)
    want = logits(model, given)
    hook.remove()
    with attached(model, Add(place, 1, 4, vector)):
        got = logits(model, given)
    real = given["attention_mask"].bool()
    assert float((want - logits(model, given))[real].abs().max()) > 1e-3
    torch.testing.assert_close(got[real], want[real], atol=1e-6 * float(want.abs().max()), rtol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_add_up_is_refused_by_name(name):
    model = tiny_model(name)
    for place in ("attn_out", "mlp_out", "resid_mid"):
        with pytest.raises(HeadscopeError, match=f"{type(model).__name__} has no '{place}' in layer 0"):
            with attached(model, Seen(place)):
                raise AssertionError("the block must not run")
    seen = Seen("resid_pre", "resid_post")
    with attached(model, seen):
        model(**inputs())
    assert torch.equal(seen.x["resid_post", 0], seen.x["resid_pre", 1])


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_layer_that_adds_both_at_once_has_no_middle(name):
    with pytest.raises(HeadscopeError, match="has no 'resid_mid' in layer 0"):
        with attached(tiny_model(name), Seen("resid_mid")):
            raise AssertionError("the block must not run")


def test_names_and_bridges_are_refused(kit):
    with pytest.raises(HeadscopeError, match="no place 'resid' in the residual stream"):
        with attached(tiny_model("llama"), Seen("resid")):
            raise AssertionError("the block must not run")
    with pytest.raises(HeadscopeError, match="no place 'mid'"):
        Resid("mid")
    bridge = kit.bridge_of(kit.tiny("llama"))
    with pytest.raises(HeadscopeError, match="hook points of its own"), attached(bridge, Seen("resid_post")):
        raise AssertionError("the block must not run")


def test_a_record_of_the_stream_beside_statistics():
    model, given = tiny_model("llama"), inputs()
    with trace(model, [Resid("resid_post", (0, -1)), Resid("mlp_out", (0, -1)), HeadOutput((0, -1))]) as tracer:
        model(**given)
        model(**given)
    record, seen = tracer.record, Seen("resid_post", "mlp_out")
    with attached(model, seen):
        model(**given)
    assert record["resid_post"].dims == ("example", "layer", "position", "d_model")
    assert record["position"].values.tolist() == [0, -1] and record.sizes["example"] == 4
    for place in ("resid_post", "mlp_out"):
        for layer in range(2):
            x = seen.x[place, layer].numpy()
            want = np.stack([x[0, [3, -1]], x[1, [0, -1]]])
            np.testing.assert_array_equal(record[place].sel(layer=layer), np.concatenate([want, want]))


def test_a_record_of_the_stream_alone_has_every_layer():
    model = tiny_model("qwen3_next")  # layer 0 does not attend
    ids = inputs()["input_ids"]
    with trace(model, [Resid("resid_pre")]) as tracer:
        model(ids)
    assert tracer.record["layer"].values.tolist() == [0, 1] and list(tracer.record.data_vars) == ["resid_pre"]
    with trace(model, [Resid("resid_post"), Entropy()]) as tracer:
        model(ids)
    assert tracer.record["layer"].values.tolist() == [1]
    with trace(model, [Resid("resid_post")], layers=[0]) as tracer:
        model(ids)
    assert tracer.record["layer"].values.tolist() == [0]


def test_positions_while_generating_count_through_the_cache():
    """Against one pass over the finished text with the vector added by the same handler."""
    model, given = tiny_model("llama"), inputs()
    vector = torch.linspace(-1, 1, model.config.hidden_size)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    edit = Add("resid_post", 0, 12, vector)  # of the second example, which has 11 tokens, a generated one
    with attached(model, edit):
        steps = model.generate(**given, **options, output_logits=True, return_dict_in_generate=True)
        real = torch.cat([given["attention_mask"], torch.ones(2, 5, dtype=torch.long)], 1)
        whole = logits(model, {"input_ids": steps.sequences, "attention_mask": real})
    scores = torch.stack(steps.logits, 1)
    torch.testing.assert_close(whole[:, 10:15], scores, atol=1e-4, rtol=1e-4)
    plain = model.generate(**given, **options, output_logits=True, return_dict_in_generate=True)
    assert float((torch.stack(plain.logits, 1) - scores)[1, 2:].abs().max()) > 1e-3


def test_a_cache_and_a_trace_of_a_prompts_first_pass():
    model, given = tiny_model("llama"), inputs()
    with trace(model, [Resid("resid_post", (-1,))]) as tracer:
        model.generate(**given, max_new_tokens=3, do_sample=False, pad_token_id=0)
    seen = Seen("resid_post")
    with attached(model, seen):
        model(**given)
    np.testing.assert_allclose(tracer.record["resid_post"][:, 1, 0], seen.x["resid_post", 1][:, -1], atol=1e-5)


def test_nothing_stays_after_an_exception():
    model, given = tiny_model("gemma2"), inputs()
    clean, want = hooks_on(model), logits(model, given)

    class Fails(Seen):
        def stream(self, call):
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"), attached(model, Fails("mlp_out")):
        model(**given)
    assert hooks_on(model) == clean and torch.equal(logits(model, given), want)


def test_edits_and_a_trace_in_force_do_not_see_the_pass_that_finds_the_layers():
    model, given = tiny_model("llama"), inputs()
    vector = torch.ones(model.config.hidden_size)
    with apply(model, AblateHeads([(0, 1)])), trace(model, [Entropy()]) as tracer:
        with attached(model, Add("resid_post", 0, 0, vector), layers=[0]), trace(model, [Resid()]) as stream:
            model(**given)
    assert tracer.record.sizes["example"] == stream.record.sizes["example"] == 2


def test_an_intervention_edits_the_stream_and_heads_together():
    """Against the two edits made one after the other, in blocks of their own."""
    model, given = tiny_model("llama"), inputs()
    vector = torch.linspace(-1, 1, model.config.hidden_size)

    class Steer(Intervention):
        name, streams = "steer", ("resid_mid",)

        def stream(self, call):
            return call.x + vector if call.layer == 0 else call.x

        def edit_output(self, call, z):
            return z * 0.5 if call.layer == 1 else z

    class Half(Intervention):
        name = "half"

        def edit_output(self, call, z):
            return z * 0.5 if call.layer == 1 else z

    class Push(Seen):
        def stream(self, call):
            return call.x + vector if call.layer == 0 else call.x

    with apply(model, Half()), attached(model, Push("resid_mid")):
        want = logits(model, given)
    with apply(model, Steer()):
        got = logits(model, given)
    assert torch.equal(got, want) and float((got - logits(model, given)).abs().max()) > 1e-2


def test_gradients_go_through_the_stream():
    model, given = tiny_model("llama"), inputs()
    vector = torch.zeros(model.config.hidden_size, requires_grad=True)
    twin, other = tiny_model("llama"), torch.zeros(model.config.hidden_size, requires_grad=True)
    rows = given["attention_mask"].int().argmax(1) + 2

    def after(module: Any, args: Any, output: Tensor) -> Tensor:
        added = torch.zeros_like(output)
        added[torch.arange(2), rows] = 1.0
        return output + added * other

    twin.model.layers[0].register_forward_hook(after)
    real = given["attention_mask"].bool()
    twin(**given).logits[real].square().sum().backward()
    with attached(model, Add("resid_post", 0, 2, vector), grad=True):
        model(**given).logits[real].square().sum().backward()
    assert float((vector.grad - other.grad).abs().max()) <= 1e-4 * float(other.grad.abs().max())


@pytest.mark.parametrize(
    ("name", "tower"), [("whisper", "encoder"), ("whisper", None), ("t5", "encoder"), ("t5", None)]
)
def test_encoders_and_decoders(name, tower):
    model = tiny_model(name, "encoder-decoder")
    given = example_inputs(model, padding=name == "t5")
    decodes = tower is None
    seen = Seen("resid_pre", "attn_out", *(("cross_attn_out",) if decodes else ()), "mlp_out", "resid_post")
    with attached(model, seen, tower=tower), torch.no_grad():
        out = model(**given, output_hidden_states=True)
    states = out.decoder_hidden_states if decodes else out.encoder_hidden_states
    for layer in range(2):
        x = {place: seen.x[place, layer] for place in seen.streams}
        assert torch.equal(x["resid_pre"], states[layer])
        written = sum(x[place] for place in seen.streams[1:-1])
        torch.testing.assert_close(x["resid_pre"] + written, x["resid_post"], atol=1e-5, rtol=1e-5)
    at: dict[int, Tensor] = {}

    class Where(Seen):
        def stream(self, call):
            at[call.layer] = call.position
            return call.x

    with attached(model, Where("resid_pre"), tower=tower):
        model(**given)
    if name == "t5" and not decodes:
        assert at[0][0].tolist() == [-1] * 3 + list(range(at[0].shape[1] - 3))
    else:
        assert at[0][0].tolist() == list(range(at[0].shape[1]))


def test_a_vision_towers_stream():
    model = tiny_model("llava", "image-text")
    seen = Seen("resid_post", "mlp_out")
    with attached(model, seen, tower="vision"):
        model(**example_inputs(model))
    assert {layer for _, layer in seen.x} == {layer.layer for layer in stream_layers(model, "vision")}


def test_the_stream_inside_an_nnsight_wrapper(kit):
    import nnsight

    model, given = kit.tiny("llama"), kit.prompt("llama")
    wrapper, edit = nnsight.NNsight(model), Add("resid_post", 0, 3, torch.ones(32))
    with attached(model, edit):
        want = logits(model, given)
    with attached(wrapper, edit):
        got = kit.run_nnsight(wrapper, given)
    torch.testing.assert_close(got, want)


def test_a_prompt_in_chunks_and_padding_between_tokens_are_refused():
    """The end of a prompt in chunks is not that of its first pass, and -1 would name another token."""
    model, given = tiny_model("llama"), inputs()
    ids = given["input_ids"]
    with pytest.raises(HeadscopeError, match="a prompt in several passes"), trace(model, [Resid()]):
        cache = model(ids[:, :6], use_cache=True).past_key_values
        model(ids[:, 6:], past_key_values=cache)
    gaps = torch.ones_like(ids)
    gaps[1, 4] = 0
    with pytest.raises(HeadscopeError, match="padding between the tokens"), trace(model, [Resid()]):
        model(ids, attention_mask=gaps)
    padded = torch.ones_like(ids)
    padded[0, :3], padded[1, -2:] = 0, 0
    with trace(model, [Resid()]) as tracer:  # around them it is none
        model(ids, attention_mask=padded)
        model(ids[:, :1])
    assert tracer.record.sizes["example"] == 4
