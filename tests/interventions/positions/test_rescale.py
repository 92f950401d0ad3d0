"""RoPE rescaled: the same model configured so, in transformers, on the same weights; the definitions by hand.

Tolerance: 1e-5 of the largest logit (see test_ablate.py); the unedited model is off by more than 1e-2 of it.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts.haystack import load_haystack
from headscope.interp.sites.rotary import Rotation, rotations
from headscope.interventions import ForcePattern, RescaleRoPE, apply

LENGTH = 14
CONFIGURED = [
    ({"linear": 4.0}, {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    ({"base": 300.0}, {"rope_type": "default", "rope_theta": 300.0}),
    ({"ntk": 5.0}, {"rope_type": "default", "rope_theta": 1e4 * 5 ** (8 / 6)}),
    ({"base": 300.0, "linear": 0.5}, {"rope_type": "linear", "factor": 0.5, "rope_theta": 300.0}),
]


def ids_and_mask() -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, 64, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(("given", "parameters"), CONFIGURED)
def test_it_is_the_model_configured_so(model: Any, dense: Any, given: dict[str, Any], parameters: dict) -> None:
    """Whole passes and cached generation, padded on the left."""
    ids, mask = ids_and_mask()
    other = dense.tiny(rope_parameters=parameters)
    other.load_state_dict(model.state_dict())
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    with apply(model, RescaleRoPE(**given)):
        found, said = dense.logits(model, ids, mask), model.generate(ids, attention_mask=mask, **options)
    wanted, right = dense.logits(other, ids, mask), other.generate(ids, attention_mask=mask, **options)
    real = mask.bool()
    assert off(found[real], wanted[real]) <= 1e-5 and off(dense.logits(model, ids, mask)[real], wanted[real]) > 1e-2
    assert torch.equal(said.sequences, right.sequences)
    assert off(torch.stack(said.logits), torch.stack(right.logits)) <= 1e-5


def test_a_model_in_double_precision(model: Any, dense: Any) -> None:
    """transformers makes its cosines in float32 also there, so they are read to half of float32's digits."""
    ids, mask = ids_and_mask()
    other = dense.tiny(rope_parameters=CONFIGURED[0][1])
    other.load_state_dict(model.state_dict())
    model.double()
    with apply(model, RescaleRoPE(linear=4.0)):
        found = dense.logits(model, ids, mask)
    assert off(found[mask.bool()], dense.logits(other.double(), ids, mask)[mask.bool()]) <= 1e-6


def test_a_cache_that_the_model_filled_is_turned_too(model: Any, dense: Any) -> None:
    """Keys read before the block, at the old frequencies; one layer, so that their states are the same."""
    ids, _ = ids_and_mask()
    model.model.layers = model.model.layers[:1]
    other = dense.tiny(rope_parameters=CONFIGURED[0][1])
    other.model.layers = other.model.layers[:1]
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        cache = model(ids[:1, :9], use_cache=True).past_key_values
        with apply(model, RescaleRoPE(linear=4.0)):
            found = model(ids[:1, 9:], past_key_values=cache).logits
        assert off(found, other(ids[:1]).logits[:, 9:]) <= 1e-5


def test_some_heads_and_rows_are_the_model_elsewhere(model: Any, dense: Any) -> None:
    """Edited scores, on tiles: all heads by name equal all heads; the rows before the first edited one do not move."""
    ids, mask = ids_and_mask()
    edit = RescaleRoPE(linear=3.0, truncate=40)
    every = [(layer, head) for layer in range(2) for head in range(4)]
    with apply(model, edit):
        whole = dense.logits(model, ids, mask)
    with apply(model, edit.with_settings(heads=every)):
        assert off(dense.logits(model, ids, mask), whole) <= 1e-5
    with apply(model, edit.with_settings(heads=every, positions=(6, 9))):
        some = dense.logits(model, ids[:1])
    plain = dense.logits(model, ids[:1])
    assert off(some[:, :6], plain[:, :6]) <= 1e-5 and off(some[:, 6], whole[:1, 6]) > 1e-3
    assert off(some[:, 6:], plain[:, 6:]) > 1e-3


def test_no_change_is_the_model_to_the_bit(model: Any, dense: Any) -> None:
    ids, mask = ids_and_mask()
    plain = dense.logits(model, ids, mask)
    for same in (RescaleRoPE(), RescaleRoPE(linear=4.0, strength=0.0)):
        with apply(model, same):
            assert torch.equal(dense.logits(model, ids, mask), plain)
    with apply(model, RescaleRoPE(base=1e4)):
        assert off(dense.logits(model, ids, mask), plain) <= 1e-5


def test_the_frequencies_by_hand() -> None:
    theta = torch.tensor([1.0, 0.1, 0.01, 0.001])
    rotation = Rotation(theta, base=1e4)
    cut = RescaleRoPE(truncate=100).frequencies(rotation)  # 2 pi / 100 = 0.0628, an eighth of it is 0.00785
    assert torch.allclose(cut, torch.tensor([1.0, 0.1, 2 * math.pi / 1600, 0.0]))
    assert torch.allclose(RescaleRoPE(linear=4.0).frequencies(rotation), theta / 4)
    assert torch.allclose(RescaleRoPE(linear=4.0, strength=0.5).frequencies(rotation), (theta + theta / 4) / 2)
    ntk = RescaleRoPE(ntk=8.0).frequencies(rotation)
    assert torch.allclose(ntk[[0, -1]], theta[[0, -1]] / torch.tensor([1.0, 8.0]))
    with pytest.raises(HeadscopeError, match="does not say its RoPE base"):
        RescaleRoPE(base=5e5).frequencies(Rotation(theta))
    for bad in ({"linear": 0.0}, {"ntk": -1.0}, {"base": "big"}, {"truncate": 1.5}):
        with pytest.raises(HeadscopeError, match="RescaleRoPE"):
            RescaleRoPE(**bad)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("llama", (False, 0, 8)), ("gpt_neox", (False, 0, 2)), ("phi", (False, 0, 4)), ("glm", (True, 0, 4))],
)
def test_a_layer_shows_how_it_turns(kind: str, layout: tuple[bool, int, int]) -> None:
    """Whole and partial rotary, halves and neighbours, in models of transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(2)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    more = dict(num_key_value_heads=2, head_dim=8, initializer_range=0.3, pad_token_id=None, partial_rotary_factor=0.5)
    config = AutoConfig.for_model(kind, **sizes, **(more if kind != "gpt_neox" else {"initializer_range": 0.3}))
    model = AutoModelForCausalLM.from_config(config).eval()
    for rotation in rotations(model, None).values():
        assert (rotation.interleaved, rotation.first) == layout[:2]
        assert 2 * rotation.frequencies.shape[0] == layout[2]
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        plain = model(ids).logits
        with apply(model, RescaleRoPE(linear=2.0)):
            found = model(ids).logits
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                module.inv_freq /= 2
        assert off(found, model(ids).logits) <= 1e-5 < off(plain, found)


def test_a_model_that_turns_otherwise_is_refused(model: Any) -> None:
    """Its rotary module does not turn by its frequencies: nothing is taken from their name."""
    turned = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: turned(x, position_ids**2)
    with pytest.raises(HeadscopeError, match="does not turn its queries"), apply(model, RescaleRoPE(linear=2.0)):
        raise AssertionError("entered")


def test_edits_of_scores_come_after_it(model: Any, dense: Any) -> None:
    """A forced pattern stays forced, before it and after it."""
    ids, _ = ids_and_mask()
    force = ForcePattern(onto=(0, 1))
    with apply(model, force):
        wanted = dense.logits(model, ids[:1])
    for both in (force + RescaleRoPE(linear=3.0), RescaleRoPE(linear=3.0) + force):
        with apply(model, both):
            assert off(dense.logits(model, ids[:1]), wanted) <= 1e-5


@pytest.mark.slow
def test_smollm2_is_the_model_configured_so(smollm2: Any) -> None:
    """All layers, 200 tokens of prose: positions squeezed to a half, against transformers' own frequencies."""
    ids = torch.tensor([smollm2.tokenizer(load_haystack(None), verbose=False)["input_ids"][:200]])
    module = smollm2.model.model.rotary_emb
    with torch.no_grad(), apply(smollm2, RescaleRoPE(linear=2.0)):
        found = smollm2.model(ids).logits
    own = module.inv_freq
    try:
        module.inv_freq = own / 2
        with torch.no_grad():
            wanted = smollm2.model(ids).logits
    finally:
        module.inv_freq = own
    assert off(found, wanted) <= 1e-5 * 30 < off(smollm2.model(ids).logits.detach(), wanted)  # 1e-5 a layer
