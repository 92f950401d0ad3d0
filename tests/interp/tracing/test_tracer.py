"""What a tracer records: positions without padding, generation, selections of queries, several passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from headscope.interp.errors import HeadscopeError
from headscope.interp.statistics import (
    Distance,
    Entropy,
    HeadOutput,
    KeyMass,
    LogSumExp,
    SinkMass,
    SpanMass,
    TargetMass,
    TopKeys,
    WindowedDistance,
    WindowMass,
)
from headscope.interp.statistics.exactness import CONDITIONS, exceptions, is_exact, table
from headscope.interp.statistics.queries import Every, Generated, Last
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing.recording import trace


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def tokens(batch: int = 2, length: int = 12, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 100, (batch, length), generator=torch.Generator().manual_seed(seed))


def one(model, ids, statistics, **options):
    """The record of one unpadded prompt."""
    with trace(model, statistics, **options) as tracer:
        model(ids, use_cache=False)
    return tracer.record


STATISTICS = [
    LogSumExp(),
    Entropy(),
    SinkMass(3),
    SpanMass({"start": (0, 2), "middle": (3, 6)}),
    Distance(),
    WindowedDistance(4),
    WindowMass(4),
    TopKeys(2),
    TargetMass({"previous": lambda q: q - 1}),
    KeyMass(),
    HeadOutput((0, -1)),
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_no_trace_in_any_statistic(model, side):
    ids = tokens(1, 9)
    pad = torch.zeros(1, 5, dtype=torch.long)
    whole = torch.cat([pad, ids] if side == "left" else [ids, pad], 1)
    mask = torch.ones_like(whole)
    mask[:, : 5 if side == "left" else 0] = 0
    mask[:, 9 if side == "right" else 14 :] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with trace(model, STATISTICS) as tracer:
        model(whole, attention_mask=mask, position_ids=positions, use_cache=False)
    padded, plain = tracer.record, one(model, ids, STATISTICS)
    assert dict(padded.sizes) == dict(plain.sizes)
    assert padded["query_position"].to_numpy().tolist() == [list(range(9))]
    assert padded["token"].to_numpy().tolist() == ids.tolist()
    for name in plain.data_vars:
        if name == "top_keys":
            np.testing.assert_array_equal(padded[name][..., 2:, 0], plain[name][..., 2:, 0])
        else:
            np.testing.assert_allclose(padded[name], plain[name], atol=2e-4, rtol=1e-4, err_msg=name)


def test_examples_of_different_length_are_ragged(model):
    first, second = tokens(1, 6), tokens(1, 10, seed=1)
    with trace(model, [Entropy(), KeyMass()]) as tracer:
        model(first, use_cache=False)
        model(second, use_cache=False)
    record = tracer.record
    assert record["length"].to_numpy().tolist() == [6, 10]
    assert record.sizes["example"] == 2 and record.sizes["query"] == record.sizes["key"] == 10
    assert np.isnan(record["entropy"][0, :, :, 6:]).all() and not np.isnan(record["entropy"][1]).any()
    np.testing.assert_array_equal(record["entropy"][0, :, :, :6], one(model, first, [Entropy()])["entropy"][0])


def test_generation_extends_the_examples(model):
    ids = tokens(2, 7)
    with trace(model, [Entropy(), KeyMass(), TopKeys(1)]) as tracer:
        written = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    record = tracer.record
    assert record.sizes["example"] == 2
    assert record["length"].to_numpy().tolist() == [10, 10]  # the last token is chosen and never read
    assert record["prompt_length"].to_numpy().tolist() == [7, 7]
    assert record["token"].to_numpy().tolist() == written[:, :10].tolist()
    whole = one(model, written[:, :10], [Entropy(), KeyMass(), TopKeys(1)])
    np.testing.assert_allclose(record["entropy"], whole["entropy"], atol=1e-4)
    np.testing.assert_allclose(record["key_mass"], whole["key_mass"], atol=1e-4)


def test_two_generations_are_separate_examples(model):
    with trace(model, [Entropy()]) as tracer:
        for seed in (0, 1):
            model.generate(
                tokens(1, 5, seed=seed), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
            )
    assert tracer.record["length"].to_numpy().tolist() == [7, 7]


def test_beam_search_is_refused_and_the_cache_left_alone(model):
    cache = DynamicCache()
    with trace(model, [Entropy()]):
        with pytest.raises(HeadscopeError, match="beam search"):
            model.generate(
                tokens(1, 5), max_new_tokens=3, num_beams=2, do_sample=False, pad_token_id=0, past_key_values=cache
            )
    assert not set(vars(cache)) & {"reorder_cache", "crop"}


def test_token_ids_are_those_of_the_pass_also_where_their_tensor_is_used_again(model):
    ids, cache, buffer = tokens(length=8), DynamicCache(config=model.config), torch.empty(2, 1, dtype=torch.long)
    with torch.no_grad(), trace(model, SinkMass()) as tracer:
        for at in range(8):
            model(buffer.copy_(ids[:, at : at + 1]), past_key_values=cache, use_cache=True)
    assert tracer.record["token"].to_numpy().tolist() == ids.tolist()


def test_positions_that_come_twice_are_refused(model):
    with trace(model, [Entropy()]):
        cache = DynamicCache()
        model(tokens(1, 6), past_key_values=cache)
        for layer in cache.layers:  # a cache cut behind the tracer's back
            layer.keys, layer.values = layer.keys[:, :, :4], layer.values[:, :, :4]
        with pytest.raises(HeadscopeError, match="recorded"):
            model(tokens(1, 1), past_key_values=cache)


@pytest.mark.parametrize("side", ["left", "right"])
def test_last_takes_the_last_real_queries(model, side):
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, slice(0, 3) if side == "left" else slice(5, 8)] = 0
    with trace(model, [Entropy()]) as tracer:
        model(ids, attention_mask=mask, use_cache=False)
    whole = tracer.record
    with trace(model, [Entropy()], queries=Last(1)) as tracer:
        model(ids, attention_mask=mask, use_cache=False)
    last = tracer.record
    for b, n in enumerate((5, 8)):
        kept = last["query_position"][b].to_numpy()
        assert n - 1 in kept
        at = int(np.flatnonzero(kept == n - 1)[0])
        np.testing.assert_allclose(last["entropy"][b, :, :, at], whole["entropy"][b, :, :, n - 1], rtol=1e-6)


def test_every_counts_from_each_examples_first_token(model):
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    with trace(model, [Entropy()], queries=Every(4)) as tracer:
        model(ids, attention_mask=mask, use_cache=False)
    kept = tracer.record["query_position"].to_numpy()
    assert {0, 4, 8} <= set(kept[0]) and {0, 4, 8} <= set(kept[1])


def test_generated_records_only_what_follows_the_prompt(model):
    ids = tokens(2, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with trace(model, [Entropy(), KeyMass()], queries=Generated()) as tracer:
        model.generate(ids, **options)
    record = tracer.record
    assert record["query_position"].to_numpy().tolist() == [[6, 7, 8]] * 2
    with trace(model, [Entropy()]) as tracer:
        model.generate(ids, **options)
    np.testing.assert_allclose(record["entropy"], tracer.record["entropy"][..., 6:], rtol=1e-5)


def test_generated_skips_every_chunk_of_the_prompt(model):
    ids, cache = tokens(1, 9), DynamicCache()
    with trace(model, [Entropy()], queries=Generated()) as tracer:
        for first, stop in ((0, 4), (4, 8), (8, 9)):
            model(ids[:, first:stop], past_key_values=cache)
    assert tracer.record["query_position"].to_numpy().tolist() == [[8]]


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_key_mass_over_passes_equals_one_pass(model, reduce):
    ids, cache = tokens(2, 10), DynamicCache()
    with trace(model, [KeyMass(reduce)]) as tracer:
        for first, stop in ((0, 6), (6, 9), (9, 10)):
            model(ids[:, first:stop], past_key_values=cache)
    name = KeyMass(reduce).variables[0]
    np.testing.assert_allclose(tracer.record[name], one(model, ids, [KeyMass(reduce)])[name], atol=2e-5)


def test_key_mass_does_not_count_padded_queries(model):
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, 5:] = 0
    with trace(model, [KeyMass()]) as tracer:
        model(ids, attention_mask=mask, use_cache=False)
    mass = tracer.record["key_mass"][0].to_numpy()
    np.testing.assert_allclose(np.nansum(mass, -1), 5.0, atol=1e-5)  # one a query
    assert np.isnan(mass[..., 5:]).all()


def test_spans_for_each_example(model):
    ids = tokens(2, 8)
    spans = [(0, 2), (3, 7)]
    record = one(model, ids, [SpanMass({"needle": spans})])
    for b, span in enumerate(spans):
        alone = one(model, ids[b : b + 1], [SpanMass({"needle": span})])
        np.testing.assert_allclose(record["span_mass"][b], alone["span_mass"][0], atol=1e-5)
    with pytest.raises(HeadscopeError, match="3 examples"):
        one(model, ids, [SpanMass({"needle": [(0, 1)] * 3})])


def test_head_output_is_what_the_projection_reads(model):
    ids, seen = tokens(2, 6), []
    hook = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    record = one(model, ids, [HeadOutput((-1, 2))])
    hook.remove()
    z = seen[-1].view(2, 6, record.sizes["head"], -1)
    np.testing.assert_array_equal(record["z"].sel(layer=1, position=-1), z[:, -1])
    np.testing.assert_array_equal(record["z"].sel(layer=1, position=2), z[:, 2])


@pytest.mark.parametrize("how", [ValueError("mine"), KeyboardInterrupt()])
@pytest.mark.parametrize("passes", [1, 3])
def test_finished_passes_are_kept_when_the_user_raises(model, how, passes):
    ids = torch.arange(5, 15)[None]
    with pytest.raises(type(how)), trace(model, [Entropy()]) as tracer:
        for turn in range(passes):
            model(ids + turn)
        raise how
    assert tracer.record["token"].values[:, 0].tolist() == list(range(5, 5 + passes))


def test_a_finished_generation_is_kept_when_the_user_raises(model):
    with pytest.raises(ValueError), trace(model, [Entropy()]) as tracer:
        text = model.generate(torch.arange(5, 15)[None], max_new_tokens=5, min_new_tokens=5, do_sample=False)
        raise ValueError
    assert tracer.record.sizes["query"] == text.shape[1] - 1


def test_an_interrupted_pass_leaves_nothing(model):
    ids = tokens(2, 6)

    def interrupt(*_):
        raise KeyboardInterrupt

    with trace(model, [Entropy(), KeyMass()]) as tracer:
        model(ids, use_cache=False)
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids, use_cache=False)
        hook.remove()
        model(tokens(1, 4, seed=3), use_cache=False)
    assert tracer.record["length"].to_numpy().tolist() == [6, 6, 4]
    with pytest.raises(RuntimeError, match="stop"):
        with trace(model, [Entropy()]) as tracer:
            model(ids, use_cache=False)
            hook = model.model.layers[1].register_forward_pre_hook(
                lambda *_: (_ for _ in ()).throw(RuntimeError("stop"))
            )
            model(ids, use_cache=False)
    hook.remove()
    assert tracer.record["length"].to_numpy().tolist() == [6, 6]


def test_layers_limit_what_is_recorded(model):
    assert one(model, tokens(), [Entropy()], layers=[1])["layer"].to_numpy().tolist() == [1]


def test_the_base_model_called_directly_is_recorded_too(model):
    ids = tokens()
    with trace(model, [Entropy()]) as tracer:
        model.model(ids, use_cache=False)
        model.model(ids, use_cache=False)
    assert tracer.record.sizes["example"] == 4
    assert tracer.record["token"].to_numpy().tolist() == [*ids.tolist(), *ids.tolist()]


def test_statistics_that_are_not_exact_are_refused(model):
    ids, cache = tokens(1, 8), DynamicCache()
    with trace(model, [HeadOutput((-1,))]):
        model(ids[:, :4], past_key_values=cache)
        with pytest.raises(HeadscopeError, match="HeadOutput is not exact with a prompt in several passes"):
            model(ids[:, 4:], past_key_values=cache)
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    with trace(model, [KeyMass(queries=(0, 2))]):
        with pytest.raises(HeadscopeError, match=r"KeyMass\(queries=...\) is not exact with padding"):
            model(ids, attention_mask=mask, use_cache=False)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with trace(model, [SinkMass()]):
        with pytest.raises(HeadscopeError, match="SinkMass is not exact with several sequences"):
            model(ids, position_ids=packed, use_cache=False)


def test_the_table_says_what_is_enforced():
    assert is_exact(Entropy(), "chunked prefill") and is_exact(KeyMass(), "cache")
    assert not is_exact(HeadOutput(), "chunked prefill") and not is_exact(Distance(), "cross-attention")
    written = table()
    assert all(name in written for name in (*exceptions(), *CONDITIONS))


def test_one_variable_is_written_once(model):
    with pytest.raises(HeadscopeError, match="same variable"):
        with trace(model, [SinkMass(1), SinkMass(2)]):
            raise AssertionError("the block must not be entered")
    with pytest.raises(HeadscopeError, match="at least one statistic"):
        with trace(model, []):
            raise AssertionError("the block must not be entered")


def test_nothing_recorded_is_an_error(model):
    with trace(model, [Entropy()]) as tracer:
        pass
    with pytest.raises(HeadscopeError, match="nothing was recorded"):
        _ = tracer.record


def test_positions_in_the_padding_are_no_positions_of_a_prompt(model):
    ids, real = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    real[0, 5:] = 0  # five tokens, padded to eight
    for position in (5, -6):
        with pytest.raises(HeadscopeError, match="do not all exist"), trace(model, [HeadOutput((position,))]):
            model(ids, attention_mask=real)
    with trace(model, [HeadOutput((4, -5))]) as tracer:
        model(ids, attention_mask=real)
    assert tracer.record["z"].sizes["position"] == 2
