"""Generation under a tracer: boundary, steps, sampling, chunks and caches, memory; and what is refused by name."""

from __future__ import annotations

import gc
import types

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import DynamicCache, GenerationConfig

from headscope.interp.errors import HeadscopeError
from headscope.interp.records.record import load_record, open_record, save_record
from headscope.interp.statistics import Entropy, KeyMass, SinkMass, TopKeys
from headscope.interp.statistics.queries import Generated, Last
from headscope.interp.survey.eager import eager_weights
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing.generation import response_steps
from headscope.interp.tracing.recording import trace

FREE = {"eos_token_id": None, "pad_token_id": 0}
NEAR = 64 * torch.finfo(torch.float32).eps  # times the number of keys: see test_architectures


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def tokens(batch: int = 2, length: int = 9, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 100, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}])
@pytest.mark.parametrize("chunk", [None, 4, 3])
def test_the_boundary_is_the_prompts_end_however_it_is_read(model, chunk, options):
    """A chunk of 4 leaves one token for the last pass, which looks like a decoding step."""
    ids = tokens()
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    with trace(model, [Entropy()]) as tracer:
        written = model.generate(
            ids, attention_mask=padded, max_new_tokens=4, do_sample=False, prefill_chunk_size=chunk, **FREE, **options
        )
    record = tracer.record
    assert record["prompt_length"].to_numpy().tolist() == [6, 9]
    assert record["length"].to_numpy().tolist() == [9, 12]
    assert record["token"][1].to_numpy().tolist() == written[1, :12].tolist()
    with trace(model, [Entropy()], queries=Generated()) as tracer:
        model.generate(
            ids, attention_mask=padded, max_new_tokens=4, do_sample=False, prefill_chunk_size=chunk, **FREE, **options
        )
    assert tracer.record["query_position"].to_numpy().tolist() == [[6, 7, 8], [9, 10, 11]]


def test_steps_hold_what_chose_each_token(model):
    """Step t against the eager weights of the row that chose token t, in one pass over the finished text."""
    ids = tokens()
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    with trace(model, [SinkMass(1), TopKeys(1), KeyMass()]) as tracer:
        written = model.generate(ids, attention_mask=padded, max_new_tokens=5, do_sample=False, **FREE)
    steps = response_steps(tracer.record)
    assert dict(steps.sizes) == {"example": 2, "layer": 2, "head": 4, "step": 5, "rank": 1}
    assert "key_mass" not in steps and steps["top_keys"].dtype == np.int64
    assert steps["query_position"].to_numpy().tolist() == [[5, 6, 7, 8, 9], [8, 9, 10, 11, 12]]
    assert steps["token"][0, 1:].to_numpy().tolist() == written[0, 9:13].tolist()
    mask = torch.cat([padded, torch.ones(2, 4, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with eager_weights(model) as seen, torch.no_grad():
        model(written[:, :13], attention_mask=mask, position_ids=positions, use_cache=False)
    for layer, (_, p) in enumerate(seen):
        for b, first in enumerate((3, 0)):
            np.testing.assert_allclose(
                steps["sink_mass"].sel(example=b, layer=layer), p[b, :, 8:13, first], atol=NEAR * 13
            )


def test_axes_of_steps_do_not_depend_on_how_a_record_was_read(model, tmp_path):
    """Of 100 reads of one folder up to 23 gave (example, step, layer, head): a Dataset's axes are in no order."""
    with trace(model, [Entropy(), TopKeys(2)]) as tracer:
        model.generate(tokens(2, 5), max_new_tokens=4, do_sample=False, **FREE)
    made = response_steps(tracer.record)
    assert made["entropy"].dims == ("example", "layer", "head", "step")
    assert made["top_keys"].dims == ("example", "layer", "head", "step", "rank")
    assert made["query_position"].dims == ("example", "step")
    path = save_record(tracer.record, tmp_path / "r")
    for _ in range(50):
        for read in (load_record, open_record):
            steps = response_steps(read(path))
            for name in ("entropy", "top_keys", "query_position"):
                assert steps[name].dims == made[name].dims
                np.testing.assert_array_equal(steps[name], made[name])


def test_axes_of_steps_follow_each_variables_own_in_any_record(model):
    """The same of a Dataset whose first variable begins with the queries."""
    with trace(model, [Entropy()]) as tracer:
        model.generate(tokens(2, 5), max_new_tokens=4, do_sample=False, **FREE)
    record = tracer.record
    turned = xr.Dataset({"first": ("query", np.arange(record.sizes["query"]))}).merge(record)
    assert list(turned.dims)[0] == "query"
    assert response_steps(turned)["entropy"].dims == ("example", "layer", "head", "step")
    np.testing.assert_array_equal(response_steps(turned)["entropy"], response_steps(record)["entropy"])


def test_steps_of_a_record_of_the_response_only(model):
    options = {"max_new_tokens": 4, "do_sample": False, **FREE}
    with trace(model, [Entropy()], queries=Generated()) as tracer:
        model.generate(tokens(1, 6), **options)
        model.generate(tokens(1, 9, seed=1), **{**options, "max_new_tokens": 3})
    steps = response_steps(tracer.record)
    assert steps["query_position"].to_numpy().tolist() == [[-1, 6, 7, 8], [-1, 9, 10, -1]]
    assert np.isnan(steps["entropy"][:, ..., 0]).all() and np.isnan(steps["entropy"][1, ..., 3]).all()
    assert steps["token"][1].to_numpy().tolist()[0] == -1
    with trace(model, [KeyMass()]) as tracer:
        model(tokens())
    with pytest.raises(HeadscopeError, match="no query rows"):
        response_steps(tracer.record)


def test_sampled_sequences_are_examples_of_their_prompt(model):
    ids = tokens(2, 5)
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 4, **FREE}
    torch.manual_seed(3)
    plain = model.generate(ids, **options)
    with trace(model, [Entropy()]) as tracer:
        torch.manual_seed(3)
        written = model.generate(ids, **options)
    assert torch.equal(plain, written)
    record = tracer.record
    assert record["token"].to_numpy().tolist() == written[:, :8].tolist()
    assert record["token"][:, :5].to_numpy().tolist() == ids.repeat_interleave(3, 0).tolist()
    with trace(model, [Entropy()]) as tracer:
        model(written[:, :8], use_cache=False)
    np.testing.assert_allclose(record["entropy"], tracer.record["entropy"], atol=NEAR * 8 * np.log(8))


def test_a_second_turn_on_the_same_cache_continues_the_example(model):
    ids = tokens(1, 6)
    with trace(model, [Entropy()]) as tracer:
        first = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, **FREE)
        longer = torch.cat([first.sequences, tokens(1, 4, seed=5)], 1)
        model.generate(longer, past_key_values=first.past_key_values, max_new_tokens=2, do_sample=False, **FREE)
    record = tracer.record
    assert record.sizes["example"] == 1
    assert record["prompt_length"].to_numpy().tolist() == [13] and record["length"].to_numpy().tolist() == [14]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num_beams": 2}, r"beam search \(num_beams=2\) is not recorded.*finished text"),
        ({"generation_config": GenerationConfig(num_beams=3)}, "beam search"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"assistant_model": "itself"}, r"assisted generation \(assistant_model=LlamaForCausalLM\)"),
        ({"prompt_lookup_num_tokens": 3}, "prompt lookup"),
        ({"guidance_scale": 1.5}, "classifier-free guidance"),
        ({"use_cache": False}, "without a cache.*leave it on"),
    ],
)
def test_generation_that_is_no_sequence_of_passes_is_refused_before_it_starts(model, options, why):
    options = {name: model if value == "itself" else value for name, value in options.items()}
    passes = []
    with trace(model, [Entropy()]):  # the first time, this runs the model to verify it
        hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
        with pytest.raises(HeadscopeError, match=why):
            model.generate(tokens(), max_new_tokens=3, **FREE, **options)
    hook.remove()
    assert not passes
    assert "generate" not in vars(model)


def test_the_models_own_generation_config_counts(model):
    model.generation_config.num_beams = 2
    try:
        with trace(model, [Entropy()]):
            with pytest.raises(HeadscopeError, match="beam search"):
                model.generate(tokens(), max_new_tokens=3, **FREE)
            model.generate(tokens(), max_new_tokens=3, num_beams=1, **FREE)
    finally:
        model.generation_config.num_beams = None


def test_generate_is_put_back_also_after_an_exception_and_in_nested_traces(model):
    with pytest.raises(RuntimeError, match="stop"):
        with trace(model, [Entropy()]) as outer:
            with trace(model, [SinkMass()]) as inner:
                model.generate(tokens(), max_new_tokens=3, do_sample=False, prefill_chunk_size=4, **FREE)
            assert inner.record["prompt_length"].to_numpy().tolist() == [9, 9]
            assert outer.record["prompt_length"].to_numpy().tolist() == [9, 9]
            raise RuntimeError("stop")
    assert "generate" not in vars(model)
    own = types.MethodType(lambda self, *_, **__: "mine", model)
    model.generate = own
    with trace(model, [Entropy()]):
        assert model.generate(tokens()) == "mine"
    assert vars(model).pop("generate") is own


def test_two_caches_in_turn_are_refused(model):
    """Two prompts of one length, decoded in turn: every position fits, and the examples would be mixed."""
    with trace(model, [Entropy()]):
        caches = [DynamicCache(), DynamicCache()]
        for cache, seed in zip(caches, (0, 1), strict=True):
            model(tokens(1, 6, seed=seed), past_key_values=cache)
        with pytest.raises(HeadscopeError, match="another cache"):
            model(tokens(1, 1), past_key_values=caches[0])
    with trace(model, [Entropy()]):
        model(tokens(1, 4), past_key_values=DynamicCache())
        with pytest.raises(HeadscopeError, match="does not follow"):
            model(tokens(1, 1), past_key_values=caches[1])


def held_by_tracing(model, prompt: int, new: int, statistics, queries) -> int:
    """Bytes of the tensors alive after a generation, less those alive before it: what the tracer keeps."""

    def alive() -> dict[int, int]:
        gc.collect()
        found = (x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor)
        return {one.data_ptr(): one.nbytes() for one in found}

    ids = tokens(1, prompt)
    before = alive()
    with trace(model, statistics, queries=queries) as tracer:
        model.generate(ids, max_new_tokens=new, do_sample=False, **FREE)
        after = alive()
    assert tracer.record["length"].to_numpy().tolist() == [prompt + new - 1]
    return sum(size for place, size in after.items() if place not in before)


def test_memory_grows_with_new_tokens_only(model):
    """Per new token, two row statistics of 2 layers x 4 heads in float32 are kept, and its id; of the prompt, ids only.

    A storage may be rounded up, so the bound is twice that; one row of the pattern would be 4 bytes x 8 x the length.
    """
    statistics = [Entropy(), SinkMass(2)]
    held = [held_by_tracing(model, 60, new, statistics, Generated()) for new in (10, 20, 40)]
    steps = [(held[1] - held[0]) / 10, (held[2] - held[1]) / 20]
    assert steps[0] == steps[1] <= 2 * (2 * 2 * 4 * 4 + 8)
    longer = held_by_tracing(model, 120, 20, statistics, Generated())
    assert longer - held[1] <= 60 * (8 + 4)  # ids, and SinkMass's column of the last pass
    rows = [held_by_tracing(model, 60, new, [Entropy()], Last(1)) for new in (10, 20, 40)]
    assert (rows[1] - rows[0]) / 10 == (rows[2] - rows[1]) / 20


def test_key_mass_holds_one_number_a_token(model):
    held = [held_by_tracing(model, 60, new, [KeyMass()], Generated()) for new in (10, 20, 40)]
    assert held[2] - held[1] <= 2 * 20 * (2 * 4 * 4 + 8)


def test_caches_of_finished_prompts_are_not_kept(model):
    """Many prompts in one trace: the cache of each is free once its generation is over."""

    def alive() -> set[int]:
        gc.collect()
        return {id(x) for x in gc.get_objects() if isinstance(x, DynamicCache)}

    before = alive()
    with trace(model, [Entropy()], queries=Last(1)):
        for seed in range(3):
            model.generate(tokens(1, 8, seed=seed), max_new_tokens=2, do_sample=False, **FREE)
        assert not alive() - before
