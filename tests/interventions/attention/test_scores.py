"""Edits of scores against the same change made by hand, in dense float64 attention that knows nothing of them.

By hand: a model whose own attention is replaced by the definition, registered with transformers like any attention
implementation, with scores that a test changes. It never uses a cache.

Tolerance: as in ../test_ablate.py, 1e-5 of the largest logit (float32 through 2 layers). Each change moves the logits
by more than 1e-3 of it, asserted here, so that an edit of other heads, rows or keys would be seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Gemma2Config, Gemma2ForCausalLM
from transformers.masking_utils import eager_mask

from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import prompt_boundary
from headscope.interventions import (
    DecayBeyondWindow,
    EmphasizeSpan,
    HeadTemperature,
    Intervention,
    KnockOut,
    RaiseSpanLogits,
    ScaleSpanLogits,
    SpotLight,
    apply,
)

HEADS = [(0, 1), (1, 0), (1, 3)]
STEPS, PADDING = 4, 4
# (scores (batch, head, query, key) with -inf where hidden, layer) -> scores
Change = Callable[[Tensor, int], Tensor]
_CHANGE: list[Change] = []


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float = 1.0, **more: Any
) -> Any:
    group = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(group, 1).double() for x in (key, value))
    s = query.double() @ k.transpose(2, 3) * scaling
    if more.get("softcap"):
        s = more["softcap"] * torch.tanh(s / more["softcap"])
    hidden = mask[..., : k.shape[2]] < -1e9
    s = _CHANGE[0](s.masked_fill(hidden, -torch.inf), module.layer_idx).masked_fill(hidden, -torch.inf)
    p = torch.nan_to_num(s.softmax(-1), nan=0.0)  # a row without a key writes nothing
    return (p @ v).transpose(1, 2).to(query.dtype).contiguous(), None


AttentionInterface.register("by_hand", _attend)
AttentionMaskInterface.register("by_hand", eager_mask)


@contextmanager
def changed(model: Any, change: Change) -> Iterator[None]:
    model.set_attn_implementation("by_hand")
    _CHANGE[:] = [change]
    try:
        yield
    finally:
        _CHANGE.clear()
        model.set_attn_implementation("sdpa" if "Gemma2" not in type(model).__name__ else "eager")


def read(model: Any, ids: Tensor, mask: Tensor, change: Change) -> Tensor:
    """The logits of one pass."""
    with changed(model, change), torch.no_grad():
        found: Tensor = model(**inputs(ids, mask), use_cache=False).logits
    return found


def written(model: Any, ids: Tensor, mask: Tensor, change_at: Callable[[int], Change], steps: int) -> Tensor:
    """The logits that choose each of ``steps`` greedy tokens; ``change_at`` is told how long the text is by now."""
    found = []
    for _ in range(steps):
        found.append(read(model, ids, mask, change_at(ids.shape[1]))[:, -1])
        ids = torch.cat([ids, found[-1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return torch.stack(found, 1)


def inputs(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": position}


def prompts(length: int = 11, padding: int = 4) -> tuple[Tensor, Tensor]:
    """Two prompts, the second padded to the left."""
    ids = torch.randint(2, 64, (2, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    return ids, mask


def gemma() -> Any:
    """A Gemma 2 of two layers, the first with a sliding window of 4 tokens, both with a softcap that bends scores."""
    torch.manual_seed(2)
    sizes = dict(hidden_size=32, intermediate_size=48, head_dim=8, query_pre_attn_scalar=8, max_position_embeddings=128)
    groups = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=4)
    common = dict(vocab_size=64, bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.5)
    config = Gemma2Config(**sizes, **groups, **common, attn_logit_softcapping=3.0, final_logit_softcapping=None)
    return Gemma2ForCausalLM(config).eval()


def mine(layer: int, heads: list[tuple[int, int]] | None = HEADS) -> Tensor:
    """The edited heads of a layer: bool (head, 1, 1)."""
    chosen = [head for at, head in heads if at == layer] if heads is not None else range(4)
    return torch.tensor([head in chosen for head in range(4)])[:, None, None]


def places(s: Tensor, padding: int = PADDING) -> tuple[Tensor, Tensor]:
    """Positions of rows (batch, 1, query, 1) and keys (batch, 1, 1, key), from each example's first token."""
    at = torch.arange(s.shape[-1])[None] - torch.tensor([[0], [padding]])
    return at[:, None, :, None], at[:, None, None, :]


def spanned(s: Tensor, first: int, stop: int) -> Tensor:
    _, key = places(s)
    return (key >= first) & (key < stop)


def knock_out(s: Tensor, layer: int) -> Tensor:
    row, _ = places(s)
    return torch.where(mine(layer) & spanned(s, 0, 3) & (row >= 1) & (row < 6), -math.inf, s)


def emphasize(s: Tensor, layer: int, prompt: int = 11) -> Tensor:
    row, key = places(s)
    inside = spanned(s, 1, 4)
    columns = torch.arange(s.shape[-1])  # padding counts in the batch's prompt
    outside = ~inside & (columns < prompt) & (key >= 0)
    return torch.where(mine(layer), s + inside * math.log(3) + outside * math.log(0.05), s)


def spotlight(s: Tensor, layer: int) -> Tensor:
    keys = spanned(s, 1, 4)
    psi = (torch.nan_to_num(s.softmax(-1)) * keys).sum(-1, keepdim=True)
    bias = torch.where((psi > 0) & (psi < 0.7), torch.log(0.7 / psi.clamp(min=1e-300)), 0.0)
    return torch.where(mine(layer) & keys, s + bias, s)


def scale(s: Tensor, layer: int) -> Tensor:
    return torch.where(spanned(s, 1, 5) & (layer == 1), s * 2.5, s)


def last_scaled(s: Tensor, layer: int, prompt: int = 11) -> Tensor:
    rows = torch.arange(s.shape[2])[:, None] == prompt - 1
    return torch.where(spanned(s, 1, 5) & rows, s * 2.5, s)


def raised(s: Tensor, layer: int) -> Tensor:
    return torch.where(mine(layer) & spanned(s, 1, 5), s + 0.8 * s.abs(), s)


def cooled(s: Tensor, layer: int) -> Tensor:
    temperature = {(0, 1): 0.25, (1, 0): 4.0, (1, 3): 2.0}
    each = torch.tensor([temperature.get((layer, head), 1.0) for head in range(4)])
    return s / each[:, None, None]


def decayed(s: Tensor, layer: int) -> Tensor:
    row, key = places(s)
    apart = (row - key).abs()
    factor = torch.where(apart > 2, 0.3, 1.0)
    factor = torch.where((apart >= 5) & (apart <= 6), 0.05, factor)
    return torch.where(mine(layer) & (s >= 0), s * factor, s)


CASES: list[Any] = [
    pytest.param(KnockOut(HEADS, span=(0, 3), positions=(1, 6)), knock_out, id="knock out"),
    pytest.param(EmphasizeSpan(HEADS, span=(1, 4), inside=3.0, outside=0.05), emphasize, id="emphasize"),
    pytest.param(SpotLight(HEADS, span=(1, 4), target=0.7), spotlight, id="spotlight"),
    pytest.param(ScaleSpanLogits(span=(1, 5), factor=2.5, at="all", layers=(1,)), scale, id="scale"),
    pytest.param(ScaleSpanLogits(span=(1, 5), factor=2.5), last_scaled, id="scale the last row"),
    pytest.param(RaiseSpanLogits(HEADS, span=(1, 5), amount=0.8), raised, id="raise"),
    pytest.param(HeadTemperature(HEADS, temperature=(0.25, 4.0, 2.0)), cooled, id="temperature"),
    pytest.param(DecayBeyondWindow(HEADS, window=2, factor=0.3, bands=[(5, 6, 0.05)]), decayed, id="decay"),
]


@pytest.fixture(params=["llama", "gemma2"])
def model(request: pytest.FixtureRequest, llama: LanguageModel) -> Any:
    """Grouped key/value heads; and a sliding window and softcaps beside."""
    return llama.model if request.param == "llama" else gemma()


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize(("edit", "change"), CASES)
def test_one_pass_and_a_prompt_in_chunks(model: Any, edit: Intervention, change: Change) -> None:
    ids, mask = prompts()
    expected, plain = read(model, ids, mask, change), read(model, ids, mask, lambda s, layer: s)
    real = mask.bool()
    assert float((expected - plain)[real].abs().max()) > 1e-3 * float(plain.abs().max())
    with apply(model, edit), prompt_boundary(11, padded=True), torch.no_grad():
        whole = model(**inputs(ids, mask)).logits
        parts, cache = [], None
        for first, stop in ((0, 5), (5, 6), (6, 11)):
            given = inputs(ids[:, first:stop], mask[:, :stop])
            output = model(**given, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    assert close(whole[real], expected[real])
    assert close(torch.cat(parts, 1)[real], expected[real])


@pytest.mark.parametrize(("edit", "change"), CASES)
def test_cached_generation(model: Any, edit: Intervention, change: Change) -> None:
    ids, mask = prompts()
    expected = written(model, ids, mask, lambda length: change, STEPS)
    fixed = dict(max_new_tokens=STEPS, do_sample=False, pad_token_id=0)
    with apply(model, edit), torch.no_grad():
        output = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **fixed)
    assert close(torch.stack(output.logits, 1), expected)


def warmer(s: Tensor, layer: int) -> Tensor:
    return s / 3


ORDERED: list[tuple[Intervention, Change]] = [
    (HeadTemperature(temperature=3.0), warmer),
    (EmphasizeSpan(HEADS, span=(1, 4), inside=3.0, outside=0.05), emphasize),
    (RaiseSpanLogits(HEADS, span=(1, 5), amount=0.8), raised),
    (DecayBeyondWindow(HEADS, window=2, factor=0.3, bands=[(5, 6, 0.05)]), decayed),
]


@pytest.mark.parametrize("second", range(4))
@pytest.mark.parametrize("first", range(4))
def test_composed_the_first_acts_first(llama: LanguageModel, first: int, second: int) -> None:
    """Also where the first could be a change of the queries or of the keys' weights, and the second could not."""
    (one, of_one), (two, of_two) = ORDERED[first], ORDERED[second]
    ids, mask = prompts()
    real = mask.bool()
    expected = read(llama.model, ids, mask, lambda s, layer: of_two(of_one(s, layer), layer))
    with apply(llama, one + two), prompt_boundary(11, padded=True), torch.no_grad():
        found = llama.model(**inputs(ids, mask)).logits
    assert close(found[real], expected[real])
