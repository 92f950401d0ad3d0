"""Masks and caches of every kind: what the site computes equals eager attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import attached, verify
from headscope.interp.sites.huggingface.masks import LazyMask, lazy_mask, with_padding
from headscope.interp.statistics import Entropy, KeyMass
from headscope.interp.survey.compare import compare_model
from headscope.interp.survey.eager import eager_weights
from headscope.interp.tracing.recording import trace
from headscope.kernels.masks import Mask
from headscope.kernels.reference import dense_mask


def llama(**sizes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    options = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    model = LlamaForCausalLM(LlamaConfig(**{**options, **sizes})).eval()
    for parameter in model.parameters():  # queries and keys that make patterns far from uniform
        parameter.data.mul_(8.0 if parameter.dim() == 2 else 1.0)
    return model


def tokens(batch: int = 2, length: int = 16, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


class Recorder(Handler):
    """Keeps the whole pattern of every call."""

    def __init__(self) -> None:
        self.patterns: list[tuple[int, torch.Tensor]] = []
        self.calls: list[AttentionCall] = []

    def edit(self, call: AttentionCall) -> AttentionCall:
        self.calls.append(call)
        self.patterns.append((call.layer, call.pattern()))
        return call


def assert_equals_eager(model, inputs, *, keep: torch.Tensor | None = None, eager=None) -> None:
    """Our patterns of one pass against eager's (on ``eager``'s inputs), on the query rows ``keep`` (batch, query)."""
    recorder = Recorder()
    with attached(model, recorder), torch.no_grad():
        model(**inputs())
    with eager_weights(model) as seen, torch.no_grad():
        model(**(eager or inputs)())
    assert len(recorder.patterns) == len(seen) > 0
    for (_, ours), (_, theirs) in zip(recorder.patterns, seen, strict=True):
        ours, theirs = ours.transpose(1, 2), theirs.transpose(1, 2)
        rows = torch.ones(ours.shape[:2], dtype=torch.bool) if keep is None else keep
        assert float((ours[rows] - theirs[rows]).abs().max()) < 2e-5


def test_lazy_mask_raises_whenever_its_data_is_read():
    made = lazy_mask(batch_size=2, q_length=5, kv_length=5)
    assert isinstance(made, LazyMask)
    assert made.shape == (2, 1, 5, 5)
    for read in (lambda: made & made, lambda: made[:, :, :2], lambda: made.float(), lambda: bool(made.all())):
        with pytest.raises(HeadscopeError, match="reads its attention mask itself"):
            read()


@pytest.mark.parametrize("form", ["bool", "additive", "per head", "biased"])
def test_ready_made_4d_masks(form):
    model, ids = llama(), tokens()
    seen = torch.ones(2, 1, 16, 16).tril().bool()
    seen[1, :, :, 3:6] = False
    seen |= torch.eye(16, dtype=torch.bool)
    mask = torch.zeros(2, 1, 16, 16).masked_fill(~seen, torch.finfo(torch.float32).min)
    if form == "per head":
        mask = mask.expand(2, 4, 16, 16).clone()
        mask[:, 2, :, 0] = torch.finfo(torch.float32).min
        mask[:, 2, 0, 0] = 0
    if form == "biased":
        mask = torch.where(seen, -0.1 * torch.arange(16.0).view(1, 1, 1, -1), mask)

    def inputs(given: torch.Tensor) -> dict:
        return {"input_ids": ids, "attention_mask": given.clone(), "use_cache": False}

    given = seen if form == "bool" else mask  # eager code adds its mask, so it takes no bool one
    assert_equals_eager(model, lambda: inputs(given), eager=lambda: inputs(mask))


def test_packed_sequences():
    model = llama()
    ids = tokens(1, 16)
    positions = torch.cat([torch.arange(6), torch.arange(10)])[None]
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    assert_equals_eager(model, lambda: inputs)
    recorder = Recorder()
    with attached(model, recorder), torch.no_grad():
        model(**inputs)
    assert float(recorder.patterns[0][1][0, :, 6:, :6].abs().max()) == 0.0


def test_padding_between_tokens_is_computed_right_and_not_recorded():
    model, ids = llama(), tokens()
    mask = torch.ones_like(ids)
    mask[0, 4:7] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    assert_equals_eager(model, lambda: inputs, keep=mask.bool())
    with pytest.raises(HeadscopeError, match="padding between the tokens"):
        with trace(model, [Entropy()]):
            model(**inputs)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_prefill_in_chunks_with_a_cache(kind):
    model, ids = llama(), tokens(2, 20)
    assert verify(model).passed

    def run() -> list[torch.Tensor]:
        made = StaticCache(config=model.config, max_cache_len=32) if kind == "static" else DynamicCache()
        logits = []
        for first, stop in ((0, 9), (9, 17), (17, 20)):
            logits.append(model(ids[:, first:stop], past_key_values=made).logits)
        return logits

    with torch.no_grad():
        plain = torch.cat(run(), 1)
    with trace(model, [Entropy(), KeyMass()]) as chunked:
        traced = torch.cat(run(), 1)
    assert float((plain - traced).abs().max()) < 1e-4
    with trace(model, [Entropy(), KeyMass()]) as whole:
        model(ids, use_cache=False)
    assert chunked.record["prompt_length"].to_numpy().tolist() == [20, 20]
    for name in ("entropy", "key_mass"):
        torch.testing.assert_close(
            torch.from_numpy(chunked.record[name].to_numpy()),
            torch.from_numpy(whole.record[name].to_numpy()),
            atol=1e-5,
            rtol=1e-5,
        )


def test_a_sliding_cache_that_forgot_its_first_keys():
    torch.manual_seed(0)
    options = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    model = MistralForCausalLM(MistralConfig(**options, num_attention_heads=4, num_key_value_heads=2, sliding_window=5))
    model = model.eval()
    ids = tokens(2, 18)
    with trace(model, [Entropy(), KeyMass()]) as stepped:
        cache = DynamicCache(config=model.config)
        for first, stop in ((0, 12), *((i, i + 1) for i in range(12, 18))):
            model(ids[:, first:stop], past_key_values=cache)
    with trace(model, [Entropy(), KeyMass()]) as whole:
        model(ids, use_cache=False)
    for name in ("entropy", "key_mass"):
        difference = abs(stepped.record[name] - whole.record[name]).max()
        assert float(difference) < 1e-5


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=st.integers(1, 3),
    kv_heads=st.sampled_from([1, 2, 4]),
    group=st.sampled_from([1, 2, 3]),
    window=st.sampled_from([None, 1, 3, 7, 40]),
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    side=st.sampled_from(["left", "right", "both"]),
    cache=st.sampled_from(["none", "dynamic", "static"]),
)
def test_traced_equals_eager_for_any_configuration(layers, kv_heads, group, window, padding, side, cache):
    torch.manual_seed(0)
    heads = kv_heads * group
    sizes = {"vocab_size": 64, "hidden_size": 8 * heads, "intermediate_size": 16, "num_hidden_layers": layers}
    model = MistralForCausalLM(
        MistralConfig(**sizes, num_attention_heads=heads, num_key_value_heads=kv_heads, sliding_window=window)
    ).eval()
    for parameter in model.parameters():
        parameter.data.mul_(10.0 if parameter.dim() == 2 else 1.0)
    ids, mask = tokens(2, 14), torch.ones(2, 14, dtype=torch.long)
    for row, width in enumerate(padding):
        if width and (side == "left" or (side == "both" and row == 0)):
            mask[row, :width] = 0
        elif width:
            mask[row, -width:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": cache != "none"}
    if cache == "static":
        length = {"max_cache_len": 20}
        assert_equals_eager(
            model,
            lambda: {**inputs, "past_key_values": StaticCache(config=model.config, **length)},
            keep=mask.bool(),
        )
        return
    assert_equals_eager(model, lambda: inputs, keep=mask.bool())
    for site, seen in compare_model(model, inputs, {"model.layers.*.self_attn": list(range(layers))}).items():
        assert seen.wrong is None and seen.refused is None and seen.eager, (site, seen)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 63), min_size=1, max_size=5))
def test_padding_of_any_kind_hides_what_it_marks_and_is_a_range_where_it_can_be(rows):
    """Around tokens, between them, nowhere, everywhere: six positions a row."""
    real = torch.tensor([[bool(row >> place & 1) for place in range(6)] for row in rows])
    mask = with_padding(Mask.causal(), real, len(rows))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    seen = dense_mask(mask, (len(rows), 1, 6, 4), 6, real.device)
    assert torch.equal(seen.expand(len(rows), 1, 6, 6), causal & real[:, None, None])
    runs = all("01" not in f"{row:06b}".strip("0") for row in rows)
    assert (mask.rule is None) == runs and (mask.end is None) == bool(real.all())
    assert mask.end is None or (mask.end.data_ptr() - mask.start.data_ptr()) % 16 == 0
