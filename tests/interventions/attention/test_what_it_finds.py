"""What finds nothing says so, what changes nothing is the model to the bit, and what cannot be exact is refused."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import prompt_boundary, published_spans
from headscope.interp.sites import attached
from headscope.interp.statistics import KeyMass, SinkMass
from headscope.interp.survey.tiny import tiny_model
from headscope.interp.tracing.recording import trace
from headscope.interventions import (
    BoostRecent,
    CalibrateAttention,
    Edit,
    ForcePattern,
    RedistributeSinks,
    ScaleImageSinks,
    ScaleSinks,
    SwapKeys,
    apply,
)
from headscope.interventions.attention.search import calibrated_heads
from headscope.interventions.tasks.base import Task

VISUAL: dict[str, Any] = {"span": (2, 5), "dimensions": (0, 5, 9), "tau": 1.6, "layers": (0, 1), "least": 0.1}


def ids() -> Tensor:
    return torch.randint(2, 64, (1, 9), generator=torch.Generator().manual_seed(3))


def run(lm: LanguageModel, *edits: Edit) -> Tensor:
    with torch.no_grad(), apply(lm, *edits):
        found: Tensor = lm.model(ids()).logits
    return found


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (ScaleSinks(sinks=(20, 30)), "no row that was meant sees the keys"),
        (CalibrateAttention(threshold=0.99), r"largest mean attention of another key was 0\.\d+, threshold=0.99"),
        (SwapKeys(first=(1, 2), second=(20, 21)), "sees both keys"),
        (ForcePattern(onto=(20, 30)), "no row that was meant sees the keys"),
        (BoostRecent(), "comes after an output token"),
        (RedistributeSinks(**{**VISUAL, "span": (2, 9)}), "no row stands behind the span"),
        (RedistributeSinks(**{**VISUAL, "tau": 5.5}), r"no token of the span passes tau \(the largest phi .* was \d"),
        (RedistributeSinks(**{**VISUAL, "least": 1.0}), "no head puts 1 of a row on the span"),
    ],
)
def test_what_finds_nothing_says_so_once(llama: LanguageModel, edit: Edit, why: str) -> None:
    before = run(llama)
    with pytest.warns(UserWarning, match=why) as caught:
        assert torch.allclose(run(llama, edit), before, rtol=0, atol=1e-5 * float(before.abs().max()))
    assert len([one for one in caught if "changed nothing" in str(one.message)]) == 1


@pytest.mark.parametrize(
    "edit",
    [
        ScaleSinks(factor=1.0),
        CalibrateAttention(beta=1.0),
        BoostRecent(beta=0.0, previous="all"),
        RedistributeSinks(**VISUAL, share=0.0),
        RedistributeSinks(**VISUAL, share=1.0, meaning="code"),
        SwapKeys(strength=0.0),
        ForcePattern(strength=0.0),
    ],
)
def test_settings_that_change_nothing_are_the_model_to_the_bit(llama: LanguageModel, edit: Edit) -> None:
    before = run(llama)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(llama, edit), before)


def test_a_threshold_out_of_reach_is_refused(llama: LanguageModel) -> None:
    """phi is at most sqrt(32) = 5.7 here: the paper's tau of 20 could never act."""
    with pytest.raises(HeadscopeError, match="find no sink in a stream of 32 dimensions.*at most 5.66.*found_in"):
        run(llama, RedistributeSinks(**{**VISUAL, "tau": 20.0}))
    with pytest.raises(HeadscopeError, match="no dimension of tiny llama parts sink tokens"):
        RedistributeSinks.found_in(llama, ["w1 w2 w3 w4 " * 30])
    with pytest.raises(HeadscopeError, match="no span is called 'image'"):
        run(llama, RedistributeSinks(**{**VISUAL, "span": "image"}))
    for kind in (RedistributeSinks, ScaleImageSinks):
        with pytest.raises(HeadscopeError, match=rf"layer 30 does not exist.*use {kind.__name__}.found_in\(lm\)"):
            run(llama, kind())


def test_the_authors_lists_and_their_layers() -> None:
    """Their llama-v2-7b and -13b; from the third layer to the last but one."""
    one, two = RedistributeSinks(), RedistributeSinks(dimensions="llava-1.5-13b")
    assert one.dimensions == (1415, 2533) and one.layers == tuple(range(2, 31)) and one.moved == 0.6
    assert two.dimensions == (2100, 4743) and two.layers == tuple(range(2, 39))
    assert RedistributeSinks(meaning="code").moved == pytest.approx(0.4)
    with pytest.raises(HeadscopeError, match="no list of dimensions is called 'gpt2'"):
        RedistributeSinks(dimensions="gpt2")
    with pytest.raises(HeadscopeError, match="tau has 3 numbers for 2 layers"):
        RedistributeSinks(**{**VISUAL, "tau": (1.0, 2.0, 3.0)})


def test_a_span_by_name(llama: LanguageModel) -> None:
    with published_spans({"image": (2, 5), "anchor": (1, 2)}):
        named = run(llama, RedistributeSinks(**{**VISUAL, "span": "image", "rho": 0.2}))
        forced = run(llama, ForcePattern(onto="anchor"))
    assert torch.equal(named, run(llama, RedistributeSinks(**{**VISUAL, "rho": 0.2})))
    assert torch.equal(forced, run(llama, ForcePattern(onto=(1, 2))))


def test_what_cannot_be_exact_is_refused(llama: LanguageModel) -> None:
    text = ids()
    with torch.no_grad():
        cache = llama.model(text[:, :5], use_cache=True).past_key_values
    edit = CalibrateAttention(threshold=0.1)
    with apply(llama, edit), torch.no_grad():
        with pytest.raises(HeadscopeError, match="does not continue the prompt that this edit saw last"):
            llama.model(text[:, 5:], past_key_values=cache)
    with apply(llama, edit), torch.no_grad(), prompt_boundary(9):
        held = llama.model(text[:, :5], use_cache=True).past_key_values
        with pytest.raises(HeadscopeError, match="these come in several passes"):
            llama.model(text[:, 5:], past_key_values=held)
    with pytest.warns(UserWarning, match="changed nothing"), apply(llama, BoostRecent()), torch.no_grad():
        held = llama.model(text[:, :8], use_cache=True).past_key_values
        with pytest.raises(HeadscopeError, match="has to know where the prompt ends"):
            llama.model(text[:, 8:], past_key_values=held)
    with pytest.raises(HeadscopeError, match="first must be one token an example"):
        run(llama, SwapKeys(first=(0, 2)))


def test_two_prompts_by_turns_are_not_mixed_up(llama: LanguageModel) -> None:
    """Another cache's prompt was read in between."""
    text = ids()
    with apply(llama, CalibrateAttention(threshold=0.1)), torch.no_grad():
        first = llama.model(text[:, :8], use_cache=True).past_key_values
        llama.model(text[:, 1:9], use_cache=True)
        with pytest.raises(HeadscopeError, match="another cache"):
            llama.model(text[:, 8:], past_key_values=first)


def test_the_last_row_of_a_prompt_may_be_read_apart(llama: LanguageModel) -> None:
    """As the needle task reads it; with the context's sets one pass gives the same."""
    text = ids()
    for edit in (CalibrateAttention(threshold=0.1, sets="context"), ScaleSinks(detect=0.2)):
        with apply(llama, edit), torch.no_grad(), prompt_boundary(9):
            whole = llama.model(text).logits[:, -1]
            held = llama.model(text[:, :8], use_cache=True).past_key_values
            apart = llama.model(text[:, 8:], past_key_values=held).logits[:, -1]
        assert float((whole - apart).abs().max()) <= 1e-5 * float(whole.abs().max())


def test_statistics_are_of_the_edited_pattern(llama: LanguageModel) -> None:
    with apply(llama, ScaleSinks()), trace(llama, [SinkMass(1), KeyMass()]) as tracer:
        llama.model(ids())
    assert abs(tracer.record["sink_mass"].isel(query=slice(1, None))).max() == 0
    with apply(llama, BoostRecent(beta=1.0, previous="all")), trace(llama, [KeyMass()]) as tracer:
        llama.model(ids())
    assert float(tracer.record["key_mass"].sum("key").min()) > 9 + 1  # rows sum to more than 1


def test_a_sink_logit_keeps_its_share() -> None:
    """gpt-oss: what the keys hold together stays what it was, whichever of them is removed, swapped or forced."""
    model = tiny_model("gpt_oss")
    text = torch.arange(5, 15)[None]
    sums: list[list[Tensor]] = []

    class Sum(ScaleSinks):
        def edit(self, call: AttentionCall) -> AttentionCall:
            if call.layer == 0:
                sums.append([call.pattern().sum(-1)])
            return call

    for edit in (ScaleSinks(), SwapKeys(), ForcePattern(onto=(0, 3), strength=0.4), ForcePattern(onto=(0, 3))):
        sums.clear()
        for edits in ([], [edit]):
            with apply(model, *edits), attached(model, Sum()), torch.no_grad():
                model(text)
        assert len(sums) == 2 and float((sums[0][0] - sums[1][0]).abs().max()) < 1e-5
        assert float(sums[0][0].min()) < 0.9


@dataclass(frozen=True)
class Likes(Task):
    """Whether a head is left alone: an accuracy that calibrating layer 1's head 2 raises and head 0 lowers."""

    name: ClassVar[str] = "likes"
    metric: ClassVar[str] = "share"
    higher_is_better: ClassVar[bool | None] = True
    count: int = 6

    def trials(self, lm: LanguageModel) -> list[dict[str, Any]]:
        return [{"number": i} for i in range(self.count)]

    def tokens(self, lm: LanguageModel, trial: dict[str, Any]) -> tuple[int, int]:
        return 9, 0

    def run(self, lm: LanguageModel, trial: dict[str, Any]) -> dict[str, Any]:
        with trace(lm, [KeyMass()]) as tracer, prompt_boundary(9):
            lm.model(torch.arange(9)[None] + 2 + trial["number"])
        mass = tracer.record["key_mass"].isel(example=0, layer=1, key=0).to_numpy()
        return {"score": float(mass[2] - mass[0])}


def test_heads_are_chosen_by_accuracy(llama: LanguageModel) -> None:
    """Calibration gives mass to the first sink: where that is key 0 of head 2 the score rises, of head 0 it falls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of the heads have no later sink
        found = calibrated_heads(llama, [Likes()], [(1, 0), (1, 1), (1, 2)], beta=0.0, threshold=0.05, progress=False)
    assert list(found.heads) == [(1, 2)] and found.tried[1, 2] > found.plain > found.tried[1, 0]
    assert found.tried[1, 1] == pytest.approx(found.plain, rel=1e-5)
    assert found.held_out > found.plain_held_out and found.heads.weights[0] == found.tried[1, 2] - found.plain
    with pytest.raises(HeadscopeError, match="two or more trials"):
        calibrated_heads(llama, [Likes(1)])
