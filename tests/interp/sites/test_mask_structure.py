"""Padding and packed sequences inside 4-D masks: found, or what counts from the first token is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.huggingface.mask_structure import structure_of
from headscope.interp.statistics import Distance, Entropy, KeyMass, SinkMass, TopKeys
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing.recording import trace

STATISTICS = [SinkMass(), KeyMass(), Entropy(), TopKeys(1)]


def ids(*shape: int) -> Tensor:
    return torch.randint(5, 90, shape, generator=torch.Generator().manual_seed(0))


def alone(model: Any, prompt: Tensor, statistics: list[Any]) -> Any:
    with trace(model, statistics) as tracer:
        model(input_ids=prompt)
    return tracer.record.isel(example=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", ["hidden", "diagonal"])
def test_left_padding_is_found_and_positions_count_from_the_first_token(implementation: str, rows: str) -> None:
    model, prompts, pad = tiny_model("llama"), ids(2, 12), torch.tensor([5, 0])
    model.set_attn_implementation(implementation)
    real = torch.arange(12) >= pad[:, None]
    seen = torch.ones(12, 12).tril().bool() & real[:, None]
    seen = seen | torch.eye(12).bool() if rows == "diagonal" else seen
    mask = torch.zeros(2, 12, 12).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    positions = (torch.arange(12) - pad[:, None]).clamp(min=0)
    with trace(model, STATISTICS) as tracer:
        model(input_ids=prompts, attention_mask=mask, position_ids=positions)
    record = tracer.record
    assert record["length"].to_numpy().tolist() == [7, 12]
    for example, start in enumerate(pad.tolist()):
        wanted, found = alone(model, prompts[example : example + 1, start:], STATISTICS), record.isel(example=example)
        for name in ("sink_mass", "key_mass", "entropy", "top_mass"):
            got = found[name].to_numpy()[:, :, : 12 - start]
            assert np.abs(got - wanted[name].to_numpy()).max() < 1e-5
        assert (found["top_keys"].to_numpy()[:, :, : 12 - start] == wanted["top_keys"].to_numpy()).all()


def test_packed_sequences_are_found_and_sinks_refused() -> None:
    model, first, second = tiny_model("llama"), ids(1, 9), ids(1, 16)[:, 9:]
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    segment = torch.tensor([0] * 9 + [1] * 7)
    mask = (torch.ones(16, 16).tril().bool() & (segment[:, None] == segment))[None, None]
    inputs = {"input_ids": torch.cat([first, second], 1), "position_ids": positions, "attention_mask": mask}
    with trace(model, [Entropy(), Distance()]) as tracer:
        model(**inputs)
    wanted = alone(model, second, [Entropy(), Distance()])
    for name in ("entropy", "distance"):
        found = tracer.record[name].isel(example=0, query=slice(9, None)).to_numpy()
        assert np.abs(found - wanted[name].to_numpy()).max() < 1e-5
    with pytest.raises(HeadscopeError, match="SinkMass is not exact with several sequences in one example"):
        with trace(model, [SinkMass()]):
            model(**inputs)


def test_padding_between_tokens_is_refused() -> None:
    model = tiny_model("llama")
    mask = torch.ones(1, 1, 12, 12).tril().bool()
    mask[..., 4:6] = False
    with pytest.raises(HeadscopeError, match="padding between the tokens"):
        with trace(model, [SinkMass()]):
            model(input_ids=ids(1, 12), attention_mask=mask)


def test_a_continued_pass_whose_mask_hides_the_first_keys_is_refused() -> None:
    model, prompt = tiny_model("llama"), ids(1, 12)
    with torch.no_grad():
        cache = model(input_ids=prompt).past_key_values
    mask = torch.ones(1, 1, 1, 13).bool()
    mask[..., :3] = False
    with pytest.raises(HeadscopeError, match="SinkMass is not exact"):
        with trace(model, [SinkMass()]):
            model(input_ids=prompt[:, :1], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_eager_code_adds_whatever_mask_it_gets(dtype: torch.dtype) -> None:
    model, prompts = tiny_model("llama"), ids(2, 12)
    model.set_attn_implementation("eager")
    mask = torch.ones(2, 1, 12, 12).tril().to(dtype)
    with torch.no_grad():
        plain = model(input_ids=prompts, attention_mask=mask).logits
    with trace(model, [Entropy()]):
        traced = model(input_ids=prompts, attention_mask=mask).logits
    torch.testing.assert_close(traced, plain, atol=1e-4, rtol=0)


def test_whole_numbers_for_sdpa_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(HeadscopeError, match=r"neither boolean nor additive: give mask.bool\(\)"):
        with trace(model, [Entropy()]):
            model(input_ids=ids(1, 6), attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.long).tril())


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 5), min_size=1, max_size=4),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
    window=st.sampled_from([2, 3, 99]),
    causal=st.booleans(),
    fill=st.booleans(),
)
def test_structure_is_that_which_made_the_mask(
    lengths: list[int], left: int, right: int, window: int, causal: bool, fill: bool
) -> None:
    segment = torch.tensor([-1] * left + [i for i, n in enumerate(lengths) for _ in range(n)] + [-2] * right)
    size = segment.numel()
    back = torch.arange(size)[:, None] - torch.arange(size)
    seen = (segment[:, None] == segment) & (segment >= 0) & (back.abs() < window) & ((back >= 0) | (not causal))
    found = structure_of((seen | torch.eye(size, dtype=torch.bool) if fill else seen)[None])
    assert torch.equal(found.real[0], segment >= 0) and not found.gaps
    kept = segment[segment >= 0]
    if len(lengths) == 1:
        assert found.segments is None
    else:
        assert found.segments is not None
        labels = found.segments[0][segment >= 0]
        assert torch.equal(labels[:, None] == labels, kept[:, None] == kept)


def test_sequences_that_alternate_are_told_apart() -> None:
    segment = torch.tensor([0, 1, 0, 1, 0, 1])
    found = structure_of((torch.ones(6, 6).tril().bool() & (segment[:, None] == segment))[None])
    assert found.segments is not None and found.segments[0].tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_keys_of_a_left_padded_encoder_count_from_its_first_token(implementation: str) -> None:
    model, text, start = tiny_model("t5", "encoder-decoder"), ids(1, 10), 4
    model.set_attn_implementation(implementation)
    decoder = ids(1, 5)
    statistics = [SinkMass(), KeyMass(), TopKeys(1), Entropy()]
    real = torch.ones(2, 10, dtype=torch.long)
    real[0, :start] = 0
    both = torch.cat([text, text])
    with torch.no_grad():  # T5's positions are relative, so that the padding moves nothing
        plain = model(input_ids=both, attention_mask=real, decoder_input_ids=decoder.repeat(2, 1)).logits
    with trace(model, statistics, tower="cross") as tracer:
        traced = model(input_ids=both, attention_mask=real, decoder_input_ids=decoder.repeat(2, 1)).logits
    torch.testing.assert_close(traced, plain, atol=1e-4, rtol=0)
    with trace(model, statistics, tower="cross") as short:
        model(input_ids=text[:, start:], decoder_input_ids=decoder)
    wanted = short.record.isel(example=0)
    found = tracer.record.isel(example=0)
    for name in ("sink_mass", "entropy", "top_mass", "top_keys"):
        assert np.abs(found[name].to_numpy() - wanted[name].to_numpy()).max() < 1e-5, name
    keys = found["key_mass"].to_numpy()
    assert np.abs(keys[..., : 10 - start] - wanted["key_mass"].to_numpy()).max() < 1e-5
