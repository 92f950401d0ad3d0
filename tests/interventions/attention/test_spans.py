"""Edits of a span's scores: what has a known answer, what finds nothing, presets, selections and bad settings."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headscope.interp import trace
from headscope.interp.attention.call import AttentionCall, Mask
from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import prompt_boundary, published_spans
from headscope.interp.statistics import Entropy, SpanMass
from headscope.interventions import (
    AblateHeads,
    DecayBeyondWindow,
    EmphasizeSpan,
    HeadTemperature,
    Intervention,
    KnockOut,
    RaiseSpanLogits,
    ScaleSinks,
    ScaleSpanLogits,
    SpotLight,
    SwapKeys,
    adaptive_factors,
    apply,
    paint,
    paint_tokens,
    pasta,
)

IDS = torch.randint(2, 64, (1, 10), generator=torch.Generator().manual_seed(1))
NEAR = 64 * torch.finfo(torch.float32).eps  # a softmax over 10 scores of size 10 or so, in float32


def call(scores: Tensor, offset: int = 0, window: int | None = None) -> AttentionCall:
    """One head whose scores are ``scores`` (query, key): q is their rows and k the unit vectors."""
    keys = scores.shape[1]
    mask = Mask.causal(offset, window=window)
    k = torch.eye(keys)[None, None]
    return AttentionCall(scores[None, None].float(), k, k, mask, 1.0, layer=0, module="m")


def weights(edit: Intervention, scores: Tensor, **options: Any) -> Tensor:
    """The edited pattern (query, key), which are also the outputs: values are the unit vectors."""
    edited = edit.edit(call(scores, **options))
    pattern = edited.pattern()[0, 0]
    assert torch.allclose(edited.output()[0, 0], pattern, atol=NEAR)
    return pattern


def test_known_answers() -> None:
    """Four keys of equal scores, then of ln 1, ln 2, ln 3 and ln 4."""
    even, graded = torch.zeros(1, 4), torch.arange(1.0, 5)[None].log()
    for edit, scores, expected in [
        (KnockOut(span=(1, 3)), even, [0.5, 0, 0, 0.5]),
        (KnockOut(span=(0, 1), strength=0.5), even, [1 / 7, 2 / 7, 2 / 7, 2 / 7]),
        (EmphasizeSpan(span=(0, 2), inside=3.0), even, [3 / 8, 3 / 8, 1 / 8, 1 / 8]),
        (EmphasizeSpan(span=[[(0, 2), (1, 2)]], inside=9.0, strength=0.5), even, [3 / 8, 3 / 8, 1 / 8, 1 / 8]),
        (EmphasizeSpan(span=(0, 1), outside=0.5), even, [2 / 5, 1 / 5, 1 / 5, 1 / 5]),
        # psi = 0.25, so B = ln 2 and the span ends at 0.5 / (1 + 0.5 - 0.25)
        (SpotLight(span=(0, 1), target=0.5), even, [0.4, 0.2, 0.2, 0.2]),
        (SpotLight(span=(0, 1), target=0.5, over="layer"), even, [0.4, 0.2, 0.2, 0.2]),
        (SpotLight(span=(0, 2), target=0.5), even, [0.25] * 4),
        (ScaleSpanLogits(span=(1, 2), factor=3.0, at="all"), graded, [1 / 16, 8 / 16, 3 / 16, 4 / 16]),
        (RaiseSpanLogits(span=(0, 2), amount=1.0), graded, [1 / 12, 4 / 12, 3 / 12, 4 / 12]),
        (RaiseSpanLogits(span=(0, 4), amount=1.0), -graded, [0.25] * 4),
        (HeadTemperature(temperature=0.5), graded, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
        # distances 3 2 1 0: the second factor is of the band alone
        (DecayBeyondWindow(window=1, factor=0.0, bands=[(2, 2, 2.0)]), graded, [1 / 12, 4 / 12, 3 / 12, 4 / 12]),
        (DecayBeyondWindow(window=2, factor=0.0), -graded, [12 / 25, 6 / 25, 4 / 25, 3 / 25]),
        (DecayBeyondWindow(window=1, factor=2.0, positive_only=False), -graded, [12 / 22, 3 / 22, 4 / 22, 3 / 22]),
    ]:
        with prompt_boundary(4):
            found = weights(edit, scores, offset=3)[0]
        assert torch.allclose(found, torch.tensor(expected), atol=NEAR), repr(edit)


def test_a_row_without_a_key_writes_nothing() -> None:
    found = weights(KnockOut(span=(0, 2)), torch.zeros(4, 4))
    assert found.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0.5, 0.5]]
    found = weights(KnockOut(span=(0, 2), positions=(0, 3)), torch.zeros(4, 4))
    assert found.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0.25] * 4]


def test_no_edit_brings_back_what_was_cut_before_it() -> None:
    first = KnockOut(span=(0, 2)).edit(call(torch.arange(16.0).reshape(4, 4)))
    later = [EmphasizeSpan(span=(0, 4), inside=5.0), RaiseSpanLogits(span=(0, 4)), HeadTemperature(temperature=2.0)]
    for edit in later:
        pattern = edit.edit(first).pattern()[0, 0]
        assert not pattern[:, :2].any() and torch.isfinite(pattern).all()


def test_spotlight_over_a_layer_counts_all_rows_at_once() -> None:
    """Rows of 1 to 4 keys: the first key's masses 1, 1/2, 1/3 and 1/4 have the mean 25/48."""
    psi = 25 / 48
    found = weights(SpotLight(span=(0, 1), target=0.8, over="layer"), torch.zeros(4, 4))
    bias = 0.8 / psi
    assert torch.allclose(found[:, 0], torch.tensor([bias / (bias + n) for n in range(4)]), atol=NEAR)
    found = weights(SpotLight(span=(0, 1), target=0.5, over="layer"), torch.zeros(4, 4))
    assert found[3].tolist() == [0.25] * 4, "25/48 is more than 0.5, though the last row has 1/4"


NEUTRAL = [
    EmphasizeSpan(span=(0, 3)),
    ScaleSpanLogits(span=(0, 3)),
    RaiseSpanLogits(span=(0, 3), amount=0.0),
    HeadTemperature(temperature=1.0),
    HeadTemperature([(0, 1), (1, 2)], temperature=(1.0, 1)),
    DecayBeyondWindow(window=1, factor=1.0, bands=[(2, 3, 1.0)]),
]


@pytest.mark.parametrize("edit", NEUTRAL, ids=lambda edit: type(edit).__name__)
def test_settings_that_change_nothing_are_the_model_to_the_bit(llama: LanguageModel, edit: Intervention) -> None:
    with torch.no_grad():
        before = llama.model(IDS).logits
        with apply(llama, edit):
            assert torch.equal(llama.model(IDS).logits, before)


NOTHING = [
    (KnockOut(span=(10, 12)), "no row that was meant sees a key of its span"),
    (KnockOut(span=(5, 8), positions=(0, 5)), "no row that was meant sees a key of its span"),
    (EmphasizeSpan(span=[[]], inside=2.0), "no row that was meant sees a key of its span"),
    (SpotLight(span=(20, 30)), "no row that was meant sees a key of its span"),
    (RaiseSpanLogits(span=(3, 5), positions=(2, 3)), "no row that was meant sees a key of its span"),
    (DecayBeyondWindow(window=9), "beyond the window or in a band"),
    (HeadTemperature(temperature=2.0, positions=(50, 60)), "no row of its passes was meant"),
    (KnockOut(span=(0, 2), during="decode"), "no row of its passes was meant"),
    (AblateHeads([(0, 1)], positions=(50, 60)), "no row of its passes was meant"),
    (AblateHeads([(0, 1)], during="decode"), "no row of its passes was meant"),
    (ScaleSinks(sinks=10), "sees the keys that are meant"),
    (SwapKeys(first=(1, 2), second=(1, 2)), "or they are one"),
]


@pytest.mark.parametrize(("edit", "said"), NOTHING, ids=lambda x: type(x).__name__ if not isinstance(x, str) else "")
def test_what_finds_nothing_says_so(llama: LanguageModel, edit: Intervention, said: str) -> None:
    with torch.no_grad():
        before = llama.model(IDS).logits
        with pytest.warns(UserWarning, match=said), apply(llama, edit):
            found = llama.model(IDS).logits
    assert float((found - before).abs().max()) <= 1e-5 * float(before.abs().max())
    longer = torch.cat([IDS, IDS, IDS, IDS, IDS, IDS], 1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        given = {"during": "always", "positions": None, **({"span": (1, 3)} if "span=[" in repr(edit) else {})}
        with apply(llama, edit.with_settings(**given, **({"second": (3, 4)} if isinstance(edit, SwapKeys) else {}))):
            llama.model(longer)


def test_what_acts_in_one_pass_of_a_block_says_nothing(llama: LanguageModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with apply(llama, AblateHeads([(0, 1)], during="decode"), KnockOut(span=(0, 2), positions=(3, 5))):
            llama.generate("w1 w2 w3 w4 w5", max_new_tokens=3)


def test_a_window_hides_a_span() -> None:
    edit = KnockOut(span=(0, 2))
    edit.edit(call(torch.zeros(2, 8), offset=6, window=3))
    with pytest.warns(UserWarning, match="no row that was meant"):
        edit.finish()


def test_where_the_prompt_ends_has_to_be_known(llama: LanguageModel) -> None:
    with pytest.raises(HeadscopeError, match="prompt ends"), apply(llama, ScaleSpanLogits(span=(0, 3), factor=2.0)):
        llama.model(IDS)
    cache = llama.model(IDS, use_cache=True).past_key_values
    with pytest.raises(HeadscopeError, match="outside.*prompt ends: call generate"), apply(llama, pasta((0, 3))):
        llama.model(IDS, past_key_values=cache)
    with pytest.raises(HeadscopeError, match="'question': this prompt publishes none"), apply(llama, pasta("question")):
        llama.model(IDS)


def test_pasta_keeps_generated_keys(llama: LanguageModel) -> None:
    """Row t of the edited pattern against A w / sum A w with w = 1 on the span and on generated keys, else alpha."""
    heads = [(0, 0), (0, 2)]
    with torch.no_grad(), prompt_boundary(6):
        plain, edited = (masses(llama, edit) for edit in ((), (pasta([[(1, 3), (2, 4)]], heads, alpha=0.1),)))
    span, generated = slice(1, 4), slice(6, 10)
    w = np.full(10, 0.1)
    w[span] = w[generated] = 1.0
    expected = plain * w
    expected /= expected.sum(-1, keepdims=True)
    assert np.abs(edited[[0, 2]] - expected[[0, 2]]).max() < NEAR
    assert np.abs(edited[[1, 3]] - plain[[1, 3]]).max() < NEAR
    assert pasta((1, 3), alpha=5.0, form="include") == EmphasizeSpan(span=(1, 3), inside=5.0)


def masses(lm: LanguageModel, edits: tuple[Intervention, ...]) -> np.ndarray:
    """The pattern of the first layer, (head, query, key), of IDS."""
    with apply(lm, *edits), trace(lm, [SpanMass({str(at): (at, at + 1) for at in range(10)})]) as tracer:
        lm.model(IDS)
    found = tracer.record["span_mass"].isel(example=0, layer=0).transpose("head", "query", "span")
    return found.to_numpy().astype("float64")


def test_a_named_span_is_the_span(llama: LanguageModel) -> None:
    with torch.no_grad():
        with apply(llama, KnockOut(span=(2, 5), layers=(1,))):
            expected = llama.model(IDS).logits
        with apply(llama, KnockOut(span="needle", layers=(1,))), published_spans({"needle": (2, 5)}):
            assert torch.equal(llama.model(IDS).logits, expected)
    with (
        pytest.raises(HeadscopeError, match="layer 2 does not exist"),
        apply(llama, KnockOut(span=(0, 1), layers=(2,))),
    ):
        raise AssertionError("entered")


def test_temperature_moves_entropy(llama: LanguageModel) -> None:
    found = []
    for temperature in (0.25, 1.0, 4.0, 1e6):
        with apply(llama, HeadTemperature(temperature=temperature)), trace(llama, [Entropy()]) as tracer:
            llama.model(IDS)
        found.append(tracer.record["entropy"].isel(layer=0, query=-1).to_numpy())
    assert all((lower < higher).all() for lower, higher in zip(found, found[1:], strict=False))
    np.testing.assert_allclose(found[-1], math.log(10), rtol=1e-5)


def test_paint_tokens_are_the_specifications() -> None:
    """576 patches; the formulas of the authors' code, written out with numpy."""
    draw = np.random.default_rng(0)
    first, late = (draw.dirichlet(np.full(577, 0.3), size=(4, 577)) for _ in range(2))
    late[:, 0, 100:140] += 0.05  # 40 summary tokens
    top, bottom = paint_tokens(first, late)
    seen, summary = first[:, 0, 1:].sum(0), late[:, 0, 1:].sum(0)
    low, high = np.percentile(summary, [25, 75])
    ratio = np.mean(summary > high + 1.5 * (high - low))
    t_sum = set(np.argsort(-summary)[: int(576 * ratio)].tolist())
    t_loc = set(np.argsort(-seen)[: int(576 * 0.25)].tolist())
    assert len(t_loc) == 144 and 40 <= len(t_sum) and t_loc & t_sum
    assert bottom == sorted(t_sum) and top == sorted(t_loc - t_sum)
    received = paint_tokens(first[:, 1:, 1:], late[:, 1:, 1:], class_token=False)
    assert received[0][:1] and max(received[0]) < 576
    with pytest.raises(HeadscopeError, match="are \\(head, token, token\\)"):
        paint_tokens(first[0], late[0])


def test_paint_is_two_raised_spans(llama: LanguageModel) -> None:
    edit = paint([2, 3, 6], [4], depth=32)
    assert edit.parts[0] == RaiseSpanLogits(
        span=[[(2, 4), (6, 7)]], amount=0.7, layers=tuple(range(2, 32)), during="answer"
    )
    assert edit.parts[1] == RaiseSpanLogits(span=[[(4, 5)]], amount=0.4, layers=tuple(range(2, 32)), during="answer")
    assert paint([2], [], depth=2).parts[0].layers == (0, 1)
    with apply(llama, paint([2, 3], [4], depth=2)):
        llama.model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    for tokens, message in [(([], []), "nothing to raise"), (([1, 2], [2]), "either of the top or of the bottom")]:
        with pytest.raises(HeadscopeError, match=message):
            paint(*tokens, depth=2)


def test_adaptive_factors_are_adaptviss_rule() -> None:
    """Probabilities 0.4 (not below the threshold), 0.394 (rounds to 0.39) and 0.3951 (rounds to 0.4)."""
    logits = torch.tensor([[p, *[(1 - p) / 9] * 9] for p in (0.4, 0.394, 0.3951, 0.9)], dtype=torch.float64).log()
    assert adaptive_factors(logits) == [1.5, 0.5, 1.5, 1.5]
    assert adaptive_factors(logits[1], threshold=0.3, sure=2.0) == [2.0]
    raw = torch.tensor([[11.9, 3.0], [12.0, 3.0]])
    assert adaptive_factors(raw, threshold=12.0, unsure=0.8, confidence="logit") == [0.8, 1.5]
    for bad, given, message in [(raw[None], {}, "logits of the first token"), (raw, {"confidence": "p"}, "must be")]:
        with pytest.raises(HeadscopeError, match=message):
            adaptive_factors(bad, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EmphasizeSpan(span=(0, 1), inside=0), "inside must be a finite number above 0"),
        (lambda: EmphasizeSpan(span=(0, 1), outside=math.nan), "outside must be a number"),
        (lambda: KnockOut(span=3), "is no span"),
        (lambda: SpotLight(span=(0, 1), target=1.0), "target must be above 0 and below 1"),
        (lambda: SpotLight(span=(0, 1), over="head"), "over must be"),  # type: ignore[arg-type]
        (lambda: ScaleSpanLogits(span=(0, 1), factor=math.inf), "factor must be a finite number"),
        (lambda: ScaleSpanLogits(span=(0, 1), at="first"), "at must be"),  # type: ignore[arg-type]
        (lambda: RaiseSpanLogits(span=(0, 1), amount="much"), "amount must be"),  # type: ignore[arg-type]
        (lambda: HeadTemperature(temperature=0.0), "temperature must be a finite number above 0"),
        (lambda: HeadTemperature([(0, 1)], temperature=(1.0, 2.0)), r"\(1.0, 2.0\) for 1 heads; give one, or one a"),
        (lambda: HeadTemperature(temperature=(2.0,)), "no named heads"),
        (lambda: DecayBeyondWindow(window=-1), "window must be tokens"),
        (lambda: DecayBeyondWindow(bands=[(3, 2, 0.5)]), "a band is"),
        (lambda: pasta((0, 1), form="generation"), "form must be"),  # type: ignore[arg-type]
    ],
)
def test_bad_settings_are_one_clear_line(make: Any, message: str) -> None:
    with pytest.raises(HeadscopeError, match=message) as refused:
        make()
    assert "\n" not in str(refused.value)
