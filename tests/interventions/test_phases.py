"""Phases go by the prompt's boundary: against plain hooks that zero heads on rows chosen by their position.

The reference never uses a cache: it reads the whole text again at every step, and zeroes the heads' outputs on the rows
that a phase means. Tolerance: as in test_ablate.py, 1e-5 of the largest logit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from headscope.interp import trace
from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import decode, prefill, prompt_boundary
from headscope.interp.statistics import Entropy
from headscope.interp.survey.tiny import tiny_model
from headscope.interventions import AblateHeads, apply

HEADS = [(0, 1), (1, 0), (1, 3)]
D_HEAD, STEPS = 8, 6
PHASES = ["always", "prefill", "decode", "answer"]


def meant(during: str, at: Tensor, boundary: Tensor) -> Tensor:
    """Which positions ``at`` a phase means, of a prompt of ``boundary`` tokens."""
    if during == "prefill":
        return at < boundary
    if during == "decode":
        return at >= boundary
    return at >= boundary - 1 if during == "answer" else at >= 0


@contextmanager
def zeroed(model: Any, rows: Tensor) -> Iterator[None]:
    """Plain hooks: the heads' outputs are zero where ``rows`` (batch, query)."""
    hooks = []
    for layer, block in enumerate(model.transformer.h if hasattr(model, "transformer") else model.model.layers):
        heads = [head for at, head in HEADS if at == layer]

        def hook(module: Any, args: tuple[Tensor, ...], heads: list[int] = heads) -> tuple[Tensor, ...]:
            z = args[0].clone().unflatten(-1, (-1, D_HEAD))  # (batch, query, head, d_head)
            for head in heads:
                z[:, :, head] = torch.where(rows[..., None], 0.0, z[:, :, head])
            return (z.flatten(-2), *args[1:])

        place = block.attn.c_proj if hasattr(block, "attn") else block.self_attn.o_proj
        hooks.append(place.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def by_hand(model: Any, ids: Tensor, mask: Tensor, during: str) -> tuple[Tensor, Tensor]:
    """Greedy tokens and their logits, without a cache; ``mask`` is 0 in left padding."""
    length, found = ids.shape[1], []
    for _ in range(STEPS):
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        rows = meant(during, torch.arange(ids.shape[1])[None], torch.tensor(length)).expand(ids.shape)
        with zeroed(model, rows), torch.no_grad():
            output = model(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False)
        found.append(output.logits[:, -1])
        ids = torch.cat([ids, found[-1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids, torch.stack(found, 1)


def prompts(padded: bool) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, 64, (2, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
    return ids, mask


def generated(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    fixed = dict(max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        output = model.generate(ids, attention_mask=mask, pad_token_id=0, **fixed, **options)
    return output.sequences, torch.stack(output.logits, 1)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert found[0].tolist() == expected[0].tolist()
    assert float((found[1] - expected[1]).abs().max()) <= 1e-5 * float(expected[1].abs().max())


@pytest.mark.parametrize("during", PHASES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static"},
    ],
    ids=["cached", "no cache", "chunks", "static"],
)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_generation_however_it_reads(llama: LanguageModel, during: Any, options: Any, padded: bool) -> None:
    ids, mask = prompts(padded)
    with apply(llama, AblateHeads(HEADS, during=during)):
        found = generated(llama.model, ids, mask, **options)
    assert_same(found, by_hand(llama.model, ids, mask, during))


def test_the_four_phases_differ(llama: LanguageModel) -> None:
    ids, mask = prompts(False)
    logits = [by_hand(llama.model, ids, mask, during)[1] for during in PHASES]
    for i, first in enumerate(logits):
        for second in logits[i + 1 :]:
            assert float((first - second).abs().max()) > 1e-2
    untouched = llama.model(input_ids=ids).logits[:, -1].detach()
    firsts = {during: float((x[:, 0] - untouched).abs().max()) for during, x in zip(PHASES, logits, strict=True)}
    assert firsts["decode"] < 1e-5 < 1e-2 < firsts["answer"], "which of them chooses the answer's first token"


def test_config_without_a_cache(llama: LanguageModel) -> None:
    ids, mask = prompts(False)
    llama.model.generation_config.use_cache = False
    with apply(llama, AblateHeads(HEADS, during="decode")):
        found = generated(llama.model, ids, mask)
    assert_same(found, by_hand(llama.model, ids, mask, "decode"))


@pytest.mark.parametrize("during", PHASES)
def test_reading_then_answering_by_hand_is_wu_et_als_protocol(llama: LanguageModel, during: Any) -> None:
    """``prefill(prompt[:-1])`` and ``decode`` from the last prompt token, as the tasks and retrieval heads do."""
    ids, mask = prompts(False)
    expected = by_hand(llama.model, ids[:1], mask[:1], during)[0][0, ids.shape[1] :].tolist()
    row = ids[0].tolist()
    with apply(llama, AblateHeads(HEADS, during=during)):
        found = decode(llama, prefill(llama, row[:-1]), row[-1], STEPS)
    assert found == expected[: len(found)] and found


@pytest.mark.parametrize("during", PHASES)
def test_forward_passes_with_a_boundary_of_each_example(lm: LanguageModel, during: Any) -> None:
    ids, mask = prompts(True)
    boundary = [7, 3]  # from each example's first token; the second begins at column 4
    columns = torch.tensor([[7], [7]])
    rows = meant(during, torch.arange(11)[None], columns)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=position)
    with zeroed(lm.model, rows.expand(2, 11)), torch.no_grad():
        expected = lm.model(**inputs).logits
    with apply(lm, AblateHeads(HEADS, during=during)), prompt_boundary(boundary):
        found = lm.model(**inputs).logits
    real = mask.bool()
    assert float((found - expected)[real].abs().max()) <= 1e-5 * float(expected.abs().max())
    with pytest.raises(HeadscopeError, match="3 prompts are given, but the batch has 2"):
        with apply(lm, AblateHeads(HEADS, during="decode")), prompt_boundary([1, 2, 3]):
            lm.model(**inputs)


def test_without_a_boundary_the_tracers_rule(llama: LanguageModel) -> None:
    ids = prompts(False)[0]
    with apply(llama, AblateHeads(HEADS, during="prefill")):
        whole = llama.model(ids).logits
        cache = llama.model(ids[:, :5], use_cache=True).past_key_values
        chunk = llama.model(ids[:, 5:], past_key_values=cache).logits
    assert float((whole[:, 5:] - chunk).abs().max()) <= 1e-5 * float(whole.abs().max())
    edit = AblateHeads(HEADS, during="answer")
    with apply(llama, edit), pytest.raises(HeadscopeError, match="where the prompt ends: call generate"):
        llama.model(ids)


def test_positions_are_rows_by_span_or_name(lm: LanguageModel) -> None:
    from headscope.interp.statistics.spans import published_spans

    ids, mask = prompts(True)
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=position)
    at = torch.arange(11)[None] - torch.tensor([[0], [4]])
    rows = (at >= 2) & (at < torch.tensor([[5], [3]]))
    with zeroed(lm.model, rows), torch.no_grad():
        expected = lm.model(**inputs).logits
    spans = [(2, 5), (2, 3)]
    with apply(lm, AblateHeads(HEADS, positions=spans)):
        found = lm.model(**inputs).logits
    with apply(lm, AblateHeads(HEADS, positions="question")), published_spans({"question": spans}):
        by_name = lm.model(**inputs).logits
    assert torch.equal(found, by_name)
    assert float((found - expected)[mask.bool()].abs().max()) <= 1e-5 * float(expected.abs().max())
    with (
        apply(lm, AblateHeads(HEADS, positions="questoin")),
        published_spans({"question": spans, "needle": (0, 2)}),
        pytest.raises(HeadscopeError, match="no span is called 'questoin': this prompt has question, needle"),
    ):
        lm.model(**inputs)


def test_generate_is_as_it_was_whoever_leaves_first(llama: LanguageModel) -> None:
    edit, ids = AblateHeads(HEADS, during="decode"), prompts(False)[0]
    for first_out in (0, 1):
        blocks = [apply(llama, edit), trace(llama, [Entropy()])]
        for block in blocks:
            block.__enter__()
        llama.model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        for block in (blocks[first_out], blocks[1 - first_out]):
            block.__exit__(None, None, None)
        assert "generate" not in vars(llama.model)
    with apply(llama, edit):
        llama.model.generate(ids, max_new_tokens=2, num_beams=2, pad_token_id=0)  # an edit records nothing
    with (
        apply(llama, edit),
        trace(llama, [Entropy()]),
        pytest.raises(HeadscopeError, match="beam search"),
    ):
        llama.model.generate(ids, max_new_tokens=2, num_beams=2, pad_token_id=0)
    assert "generate" not in vars(llama.model)


def test_towers_that_write_nothing_have_no_phases() -> None:
    model = tiny_model("llava", "image-text")
    with pytest.raises(HeadscopeError, match="vision tower reads its input at once"):
        with apply(model, AblateHeads([(0, 0)], during="decode"), tower="vision"):
            raise AssertionError("entered")
    with pytest.raises(HeadscopeError, match="at least 1; got 0"), prompt_boundary(0):
        raise AssertionError("entered")
