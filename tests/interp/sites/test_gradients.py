"""Gradients through trace and apply, against the untouched model under eager attention and against plain hooks.

Tolerance: gradients are float32 sums in another order than eager's; two layers, 20 tokens and 32 dimensions give a few
hundred roundings of 1.2e-7, relative to the largest gradient. A gradient that misses a path is off by its own size.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from headscope.interp import keep_attention, trace
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import attached
from headscope.interp.statistics import Entropy, HeadOutput, KeyMass
from headscope.interp.survey.tiny import tiny_model
from headscope.interventions import AblateHeads, apply
from headscope.interventions.base import Intervention
from headscope.kernels.score_edits import key_scale

NEAR = 1e-4
# grouped keys and values; a window; a softcap (and a window); sink logits; another bias of positions
MODELS = ["llama", "mistral", "gemma2", "gpt_oss", "qwen3_next", "gpt_neox"]


def inputs(padding: str = "left") -> dict[str, Tensor]:
    ids = torch.randint(4, 90, (2, 20), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    if padding == "left":
        real[0, :4] = 0
    if padding == "right":
        real[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": real}


def loss(model: Any, given: dict[str, Tensor]) -> Tensor:
    logits = model(**given).logits.log_softmax(-1)
    nll = -logits[:, :-1].gather(2, given["input_ids"][:, 1:, None])[..., 0]
    real = given["attention_mask"][:, 1:] * given["attention_mask"][:, :-1]
    return (nll * real).sum() / real.sum()


def eager(model: Any) -> Any:
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_near(got: Tensor, want: Tensor) -> None:
    assert float(want.abs().max()) > 0
    assert float((got - want).abs().max()) <= NEAR * float(want.abs().max())


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_traced_gradients_are_the_models_own(name, padding):
    model, given = tiny_model(name), inputs(padding)
    twin = eager(model)
    loss(twin, given).backward()
    with trace(model, [Entropy(), KeyMass(), HeadOutput((-1,))], grad=True) as tracer:
        loss(model, given).backward()
    want, got = gradients(twin), gradients(model)
    assert set(want) == set(got)
    for parameter, gradient in want.items():
        if gradient.abs().max() > 0:
            assert float((got[parameter] - gradient).abs().max()) <= NEAR * max(float(gradient.abs().max()), 1e-3)
    assert tracer.record["entropy"].notnull().any()


class Scale(Intervention):
    """z of one head times a parameter: LoFiT's kind of edit."""

    name = "scale"

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def edit_output(self, call, z):
        if call.layer != 1:
            return z
        return torch.cat([z[:, :2], z[:, 2:3] * self.factor, z[:, 3:]], 1)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_gradient_of_an_edits_parameter_is_a_plain_hooks(frozen):
    model, given = tiny_model("llama"), inputs()
    model.requires_grad_(not frozen)
    twin = eager(model)
    width = twin.model.layers[1].self_attn.head_dim
    factor, other = (torch.linspace(0.5, 1.5, width).requires_grad_() for _ in range(2))

    def scaled(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        z = args[0].unflatten(-1, (-1, width))
        return (torch.cat([z[..., :2, :], z[..., 2:3, :] * other, z[..., 3:, :]], -2).flatten(-2),)

    twin.model.layers[1].self_attn.o_proj.register_forward_pre_hook(scaled)
    loss(twin, given).backward()
    with apply(model, Scale(factor), grad=True), trace(model, [Entropy()], grad=True):
        loss(model, given).backward()
    assert_near(factor.grad, other.grad)


class KeyBias(Intervention):
    name = "key bias"

    def __init__(self, bias: Tensor, through: str) -> None:
        self.bias, self.through = bias, through

    def edit(self, call):
        if call.layer != 1:
            return call
        if self.through == "key bias":
            return call.with_key_bias(self.bias[None, None])
        if self.through == "score edit":
            return call.with_score_edit(key_scale(self.bias[None].exp()))
        return call.with_(key=call.key * self.bias.exp()[None, None, :, None])


@pytest.mark.parametrize("through", ["key bias", "score edit", "key"])
def test_the_gradient_of_an_edit_inside_attention(through):
    """Against the same edit by hand in a frozen eager model, whose attention function is replaced."""
    model, given = tiny_model("llama").requires_grad_(False), inputs("none")
    twin = eager(model)
    mine, theirs = (torch.linspace(-0.5, 0.5, 20).requires_grad_() for _ in range(2))
    attention = twin.model.layers[1].self_attn
    from transformers.models.llama import modeling_llama

    def by_hand(module, query, key, value, attention_mask, scaling, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.transpose(-1, -2) * scaling
        if module is attention:
            scores = scores + theirs if through == "key bias" else scores * theirs.exp()
        hidden = torch.full(scores.shape[-2:], float("-inf")).triu(1)
        return ((scores + hidden).softmax(-1) @ value).transpose(1, 2), None

    before = modeling_llama.eager_attention_forward
    modeling_llama.eager_attention_forward = by_hand
    try:
        loss(twin, given).backward()
    finally:
        modeling_llama.eager_attention_forward = before
    with apply(model, KeyBias(mine, through), grad=True):
        loss(model, given).backward()
    assert_near(mine.grad, theirs.grad)


class Saliency(Handler):
    def __init__(self) -> None:
        self.z: dict[int, Tensor] = {}

    def edit_output(self, call, z):
        z.retain_grad()
        self.z[call.layer] = z
        return z


def test_a_handler_reads_the_gradient_of_z():
    model, given, saliency = tiny_model("gemma2"), inputs(), Saliency()
    twin, seen = eager(model), {}
    for layer, block in enumerate(twin.model.layers):

        def keep(module: Any, args: tuple[Tensor, ...], layer: int = layer) -> None:
            args[0].retain_grad()
            seen[layer] = args[0]

        block.self_attn.o_proj.register_forward_pre_hook(keep)
    loss(twin, given).backward()
    with attached(model, saliency, grad=True):
        loss(model, given).backward()
    for layer, z in saliency.z.items():
        assert_near(z.grad.transpose(1, 2).flatten(2), seen[layer].grad)


def test_without_grad_one_line_says_what_to_pass():
    model, given = tiny_model("llama"), inputs()
    edit = AblateHeads([(0, 1)])
    for enter in (
        lambda: trace(model, [Entropy()]),
        lambda: apply(model, edit),
        lambda: keep_attention(model),
        lambda: attached(model, Handler()),
    ):
        with pytest.raises(HeadscopeError, match="gradients are off inside this block: pass grad=True"), enter():
            loss(model, given).backward()
    with pytest.raises(HeadscopeError, match="pass grad=True to every"):
        with apply(model, edit, grad=True), trace(model, [Entropy()]):
            loss(model, given).backward()
    with pytest.raises(HeadscopeError, match="carries no gradient although grad=True"):
        with apply(model, edit, grad=True), torch.no_grad():
            value = loss(model, given)
            value.backward()
    assert torch.is_grad_enabled()


def test_other_errors_of_a_backward_pass_come_through():
    model, given = tiny_model("llama"), inputs()
    with pytest.raises(RuntimeError, match="second time"), apply(model, AblateHeads([(0, 1)]), grad=True):
        value = loss(model, given)
        value.backward()
        value.backward()


def test_where_gradients_cannot_be_right_they_are_refused():
    model = tiny_model("llama")
    with torch.inference_mode(), pytest.raises(HeadscopeError, match="inference_mode"):
        with trace(model, [Entropy()], grad=True):
            raise AssertionError("the block must not run")
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(HeadscopeError, match="gradient checkpointing"):
        with trace(model, [Entropy()], grad=True):
            raise AssertionError("the block must not run")
    model.eval()
    with trace(model, [Entropy()], grad=True):
        loss(model, inputs()).backward()


def test_edits_inside_attention_of_a_bridge_are_refused(kit):
    model = kit.tiny("llama")
    bridge, given = kit.bridge_of(model), kit.prompt("llama")
    with pytest.raises(HeadscopeError, match="carries no gradient through a TransformerBridge"):
        with apply(bridge, AblateHeads([(0, 1)], "uniform"), grad=True):
            kit.run_bridge(bridge, given)
    twin, factor = eager(model), torch.ones(8, requires_grad=True)
    width, other = 8, torch.ones(8, requires_grad=True)

    def scaled(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        z = args[0].unflatten(-1, (-1, width))
        return (torch.cat([z[..., :2, :], z[..., 2:3, :] * other, z[..., 3:, :]], -2).flatten(-2),)

    twin.model.layers[1].self_attn.o_proj.register_forward_pre_hook(scaled)
    kit.real(given, twin(**given).logits).square().sum().backward()
    with apply(bridge, Scale(factor), grad=True):
        kit.real(given, kit.run_bridge(bridge, given)).square().sum().backward()
    assert_near(factor.grad, other.grad)


def test_the_model_inside_an_nnsight_wrapper(kit):
    import nnsight

    model, given = kit.tiny("llama"), kit.prompt("llama")
    wrapper, factor = nnsight.NNsight(model), torch.ones(8, requires_grad=True)
    with apply(model, Scale(factor), grad=True):
        loss(model, given).backward()
    want, factor.grad = factor.grad.clone(), None
    with apply(wrapper, Scale(factor), grad=True):
        loss(wrapper._module, given).backward()
    assert_near(factor.grad, want)


@pytest.mark.parametrize("outer", [True, False])
def test_blocks_that_end_in_the_order_they_began_leave_the_mode_that_was(outer: bool) -> None:
    model = tiny_model("llama")
    with torch.set_grad_enabled(outer):
        first, second = trace(model, [Entropy()]), trace(model, [Entropy()], grad=True)
        first.__enter__()
        assert not torch.is_grad_enabled()
        second.__enter__()
        assert torch.is_grad_enabled()
        first.__exit__(None, None, None)
        assert torch.is_grad_enabled()
        second.__exit__(None, None, None)
        assert torch.is_grad_enabled() == outer
