"""Maps of blocks against the dense patterns of every example alone, however a text comes to the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from headscope.interp import trace
from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.records.record import append_record, concatenate, load_record, save_record
from headscope.interp.sites import attached
from headscope.interp.statistics import BlockMap, Entropy, TopBlocks
from headscope.interp.statistics.queries import Last
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.sweeps import sweep
from headscope.interp.tracing.generation import response_steps
from headscope.kernels.blocks import dense
from headscope.kernels.masks import Mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = (23, 9, 16)
SIZE = 4
NEAR = 256 * torch.finfo(torch.float32).eps  # sums of at most 16 weights, each with the roundings of its score


class Patterns(Handler):
    """The patterns (head, query, key) of one example, layer by layer."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        self.found.append(call.pattern()[0].cpu())
        return z


def prompts(lengths=LENGTHS) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    return [torch.randint(4, 100, (n,), generator=gen).to(DEVICE) for n in lengths]


def padded(examples: list[Tensor], side: str) -> dict[str, Tensor]:
    width = max(len(x) for x in examples)
    ids, real = (torch.zeros(len(examples), width, dtype=torch.long, device=DEVICE) for _ in range(2))
    for b, x in enumerate(examples):
        at = slice(width - len(x), width) if side == "left" else slice(0, len(x))
        ids[b, at], real[b, at] = x, 1
    return {"input_ids": ids, "attention_mask": real}


def patterns(model, ids: Tensor) -> list[Tensor]:
    handler = Patterns()
    with attached(model, handler), torch.no_grad():
        model(ids[None], use_cache=False)
    return handler.found


def pooled(p: Tensor, pool: str) -> np.ndarray:
    return dense(p[None].double(), Mask.causal(), SIZE, pool)[0].numpy()


def check(model, record, examples: list[Tensor], pool: str = "mean", layers=None) -> None:
    for b, ids in enumerate(examples):
        for layer, p in enumerate(patterns(model, ids)):
            found, want = record["block_map"].sel(layer=layer).values[b], pooled(p, pool)
            n = want.shape[-1]
            assert found.dtype == np.float32
            assert np.abs(found[:, :n, :n] - want).max() < NEAR
            assert np.isnan(found[:, n:]).all() and np.isnan(found[..., n:]).all()


@pytest.fixture
def model():
    return tiny_model("llama").to(DEVICE)


@pytest.mark.parametrize("pool", ["mean", "sum", "max"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_map_of_every_example_of_a_padded_batch(model, side, pool):
    with trace(model, [Entropy(), BlockMap(SIZE, pool)], queries=Last(2)) as tracer:  # rows alone are selected
        model(**padded(prompts(), side))
    assert tracer.record["block_map"].dims == ("example", "layer", "head", "query_block", "key_block")
    assert tracer.record["block_map"].attrs == {"block": SIZE, "pool": pool}
    check(model, tracer.record, prompts(), pool)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("step", [1, 5, 8])
def test_passes_over_a_text_add_up(name, step):
    """Chunks that do not end with a block, single tokens, and windows whose cache has dropped the first keys."""
    model, (ids,) = tiny_model(name).to(DEVICE), prompts((41,))
    cache = DynamicCache(config=model.config)
    with trace(model, [BlockMap(SIZE)]) as tracer:
        for at in range(0, len(ids), step):
            model(ids[None, at : at + step], past_key_values=cache)
    check(model, tracer.record, [ids])


def test_a_map_as_wide_as_the_text_in_a_cache_with_room(model):
    (ids,) = prompts((22,))
    cache = StaticCache(config=model.config, max_cache_len=300)
    with trace(model, [BlockMap(SIZE), TopBlocks(SIZE, 3)]) as tracer:
        model(ids[None], past_key_values=cache)
    assert tracer.record["block_map"].shape[-2:] == (6, 6)
    check(model, tracer.record, [ids])


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_what_was_read_before_the_trace_is_missing(model, pool):
    """Ten tokens in the cache: half of the third block is recorded, and its mean is of those two queries."""
    (ids,) = prompts((22,))
    cache = DynamicCache(config=model.config)
    model(ids[None, :10], past_key_values=cache)
    with trace(model, [BlockMap(SIZE, pool)]) as tracer:
        model(ids[None, 10:], past_key_values=cache)
    found = tracer.record["block_map"].values[0]
    assert np.isnan(found[:, :, :2]).all()
    for layer, p in enumerate(patterns(model, ids)):
        p[:, :10] = 0
        want = pooled(p, pool)
        if pool == "mean":
            want[:, 2] *= 2
        assert np.abs(found[layer][:, 2:] - want[:, 2:]).max() < NEAR
    cache = DynamicCache(config=model.config)
    model(ids[None, :12], past_key_values=cache)
    with trace(model, [TopBlocks(SIZE, 2)]) as tracer:
        model(ids[None, 12:], past_key_values=cache)
    assert np.isnan(tracer.record["residual_mass"].values[..., :3]).all()
    assert (tracer.record["top_blocks"].values[..., :3, :] == -1).all()
    assert (tracer.record["top_blocks"].values[..., 3:, 0] >= 0).all()


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_generation_has_a_map(name):
    """Of padded prompts, whose first blocks differ where a window's cache has dropped the first keys."""
    model = tiny_model(name).to(DEVICE)
    with trace(model, [BlockMap(SIZE, "max")]) as tracer:
        ids = model.generate(**padded(prompts(), "left"), max_new_tokens=20, do_sample=False, eos_token_id=None)
    width = max(LENGTHS)
    check(model, tracer.record, [row[width - n : -1] for row, n in zip(ids, LENGTHS, strict=True)], "max")


def test_an_edited_pattern_has_an_edited_map(model):
    class Hide(Handler):
        def edit(self, call: AttentionCall) -> AttentionCall:
            bias = torch.zeros(1, 1, call.key.shape[2], device=DEVICE)
            bias[..., 2] = -torch.inf
            return call.with_key_bias(bias)

    (ids,) = prompts((23,))
    seen = Patterns()
    with trace(model, [BlockMap(1)]) as tracer, attached(model, Hide()), attached(model, seen):
        model(ids[None])
    found = tracer.record["block_map"].values[0]
    assert np.abs(found[..., 3:, 2]).max() == 0.0
    assert np.abs(found - torch.stack(seen.found[-len(found) :]).numpy()).max() < NEAR


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("k", [2, 9])
def test_the_heaviest_blocks_and_exactly_what_they_leave(model, side, k):
    with trace(model, [TopBlocks(SIZE, k), BlockMap(SIZE)]) as tracer:
        model(**padded(prompts(), side))
    record = tracer.record
    assert record["top_blocks"].dtype == np.int64 and record["top_blocks"].sizes["block_rank"] == k
    blocks, index = record["block_map"].values, record["top_blocks"].values
    mass, rest = record["top_block_mass"].values, record["residual_mass"].values
    for b, n in enumerate(LENGTHS):
        down = -(-n // SIZE)
        assert (index[b, :, :, down:] == -1).all() and np.isnan(mass[b, :, :, down:]).all()
        assert np.isnan(rest[b, :, :, down:]).all()
        own = np.nan_to_num(blocks[b, :, :, :down])
        want = -np.sort(-own, axis=-1)[..., :k]
        heaviest = mass[b, :, :, :down]
        assert np.abs(heaviest[..., : want.shape[-1]] - want).max() < NEAR
        assert np.abs(heaviest.sum(-1) + rest[b, :, :, :down] - 1).max() < NEAR
        held = np.take_along_axis(own, np.maximum(index[b, :, :, :down], 0), -1) * (index[b, :, :, :down] >= 0)
        assert np.abs(held - heaviest).max() < NEAR


def test_the_heaviest_blocks_of_chunks_of_whole_blocks(model):
    (ids,) = prompts((41,))
    with trace(model, [TopBlocks(SIZE, 3)]) as tracer:
        model(ids[None], use_cache=False)
    whole = tracer.record
    cache = DynamicCache(config=model.config)
    with trace(model, [TopBlocks(SIZE, 3)]) as tracer:
        for at in range(0, len(ids), 8):
            model(ids[None, at : at + 8], past_key_values=cache)
    for name in ("top_block_mass", "residual_mass"):
        assert np.abs(tracer.record[name].values - whole[name].values).max() < NEAR
    assert (tracer.record["top_blocks"].values == whole["top_blocks"].values).all()
    with pytest.raises(HeadscopeError, match="begins at token 6"), trace(model, [TopBlocks(SIZE)]):
        cache = DynamicCache(config=model.config)
        for at in (0, 6):
            model(ids[None, at : at + 6], past_key_values=cache)


def test_records_of_texts_of_other_lengths_are_joined_and_kept(model, tmp_path):
    records = []
    for ids in prompts():
        with trace(model, [BlockMap(SIZE), TopBlocks(SIZE, 3)]) as tracer:
            model(ids[None])
        records.append(tracer.record)
    whole = concatenate(records)
    check(model, whole, prompts())
    assert load_record(save_record(whole, tmp_path / "record")).identical(whole)
    given, lm = [x.tolist() for x in prompts()], LanguageModel.wrap(model)
    swept = sweep(lm, given, [BlockMap(SIZE), TopBlocks(SIZE, 3)], out=tmp_path / "swept", progress=False).load()
    assert np.allclose(swept["block_map"].values, whole["block_map"].values, atol=NEAR, equal_nan=True)


def test_records_that_differ_in_their_blocks_are_not_joined(model, tmp_path):
    found = []
    for statistic in (BlockMap(4), BlockMap(8), BlockMap(4, "sum"), TopBlocks(4, 3), TopBlocks(4, 5)):
        with trace(model, [statistic]) as tracer:
            model(prompts()[0][None])
        found.append(tracer.record)
    save_record(found[0], tmp_path / "map")
    save_record(found[3], tmp_path / "top")
    for path, kept, other in (("map", 0, 1), ("map", 0, 2), ("top", 3, 4)):
        with pytest.raises(HeadscopeError, match="cannot be joined"):
            concatenate([found[kept], found[other]])
        with pytest.raises(HeadscopeError, match="differs in its"):
            append_record(found[other], tmp_path / path)
        append_record(found[kept], tmp_path / path)
        assert load_record(tmp_path / path).sizes["example"] >= 2


def test_steps_of_a_generation_leave_the_blocks_out(model):
    with trace(model, [Entropy(), BlockMap(SIZE), TopBlocks(SIZE, 3)], layers=[0]) as tracer:
        model(prompts()[0][None])
    assert set(response_steps(tracer.record).sizes) == {"example", "layer", "head", "step"}


def test_what_is_refused(model):
    with pytest.raises(HeadscopeError, match="size=0.*from 1 on"):
        BlockMap(0)
    with pytest.raises(HeadscopeError, match="k=0.*from 1 on"):
        TopBlocks(4, 0)
    with pytest.raises(HeadscopeError, match="pools by"):
        BlockMap(4, "median")  # type: ignore[arg-type]
    with pytest.raises(HeadscopeError, match="dimension block"), trace(model, [BlockMap(4), TopBlocks(8)]):
        pass
    ids = torch.randint(4, 100, (1, 9), device=DEVICE)
    other = tiny_model("t5", "encoder-decoder").to(DEVICE)
    with pytest.raises(HeadscopeError, match="BlockMap is not exact"), trace(other, [BlockMap(4)], tower="cross"):
        other(input_ids=ids, decoder_input_ids=ids)
