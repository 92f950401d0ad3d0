"""Edits of a tiny LLaVA with grouped heads, in a padded batch that is read and continued with a cache, against the same
edits of a dense float64 pattern, each chat by itself and the whole text anew at every step.

Tolerance: as for every edit, 1e-5 of the largest logit (float32 sums in another order); a wrong token moves percents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.vision import VisionPrompt
from headscope.interp.sites import attached
from headscope.interventions import (
    AdaptSpanLogits,
    BoostRecent,
    Edit,
    Paint,
    PruneTokens,
    ScaleImageSinks,
    adaptive_factors,
    apply,
    load_intervention,
    paint_tokens,
)
from headscope.interventions.attention.prune import padded_patches

IMAGE = slice(8, 24)
DIMENSIONS, TAU = [3, 7, 12], 1.7
Made = tuple[Edit, Callable[..., Tensor]]  # an edit, and what it makes of a pattern


def of_image(values: Tensor, length: int) -> Tensor:
    """``values`` (token,) at the image's keys of ``length``, 0 elsewhere."""
    return torch.nn.functional.pad(values, (IMAGE.start, length - IMAGE.stop))


def pruned(keep: int) -> Made:
    return PruneTokens(layer=1, keep=keep), prune(keep, 0.0, [])


def debiased(keep: int, sigma: float, padding: Sequence[int], span: Any) -> Made:
    edit = PruneTokens(layer=1, keep=keep, by="debiased", sigma=sigma, padding=span)
    return edit, prune(keep, sigma, list(padding))


def prune(keep: int, sigma: float, padding: list[int]) -> Callable[..., Tensor]:
    """Zhao et al.'s order: the mask, R, the weights, the largest R."""
    hidden: list[Tensor] = [torch.zeros(16, dtype=torch.bool)]

    def hand(layer: int, scores: Tensor, p: Tensor, length: int, x: Tensor) -> Tensor:
        if layer == 0:
            s = p[:, length - 1, IMAGE].mean(0)
            s[padding] = 0.0
            s = s * torch.exp(-sigma * torch.arange(16) / 15)
            hidden[0] = ~torch.isin(torch.arange(16), s.topk(min(keep, 16 - len(padding))).indices)
            return p
        return scores.masked_fill(of_image(hidden[0], p.shape[-1]), -torch.inf).softmax(-1)

    return hand


def at_random(keep: int) -> Made:
    stays = np.random.default_rng([5, 16]).permutation(16) < keep

    def hand(layer: int, scores: Tensor, p: Tensor, length: int, x: Tensor) -> Tensor:
        gone = of_image(torch.from_numpy(~stays), p.shape[-1])
        return p if layer == 0 else scores.masked_fill(gone, -torch.inf).softmax(-1)

    return PruneTokens(layer=1, keep=keep).with_random_choice(5), hand


def without_sinks(factor: float, renormalise: bool, seed: int | None = None) -> Made:
    settings: dict[str, Any] = {"dimensions": DIMENSIONS, "tau": TAU, "layers": (1, 2)}
    edit = ScaleImageSinks(**settings, factor=factor, renormalise=renormalise)

    def hand(layer: int, scores: Tensor, p: Tensor, length: int, x: Tensor) -> Tensor:
        phi = (x[:, DIMENSIONS] / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()).abs().amax(-1)
        sinks = phi[IMAGE] > TAU
        if layer == 0 or not sinks.any():
            return p
        if seed is not None:
            order = [i for i in np.random.default_rng([seed, layer, 16]).permutation(16) if not sinks[i]]
            sinks = torch.isin(torch.arange(16), torch.tensor(order[: int(sinks.sum())]))
        new = torch.where(of_image(sinks, p.shape[-1]), factor * p, p)
        new = new / new.sum(-1, keepdim=True) if renormalise else new
        return torch.where((torch.arange(p.shape[-1]) >= IMAGE.stop)[:, None], new, p)

    return (edit if seed is None else edit.with_random_choice(seed)), hand


def recent() -> Made:
    def hand(layer: int, scores: Tensor, p: Tensor, length: int, x: Tensor) -> Tensor:
        at = torch.arange(p.shape[-1])
        gap = at[:, None] - at
        return torch.where((gap >= 1) & (gap <= 2) & (at >= length), 2.0 * p, p)

    return BoostRecent(beta=1.0, window=2), hand


CASES: dict[str, Callable[[], Made]] = {
    "pruned": lambda: pruned(4),
    "pruned, debiased": lambda: debiased(4, 3.0, [0, 1, 5], [[(8, 10), (13, 14)]]),
    "pruned, mostly padding": lambda: debiased(9, 0.0, range(11), (8, 19)),
    "pruned at random": lambda: at_random(4),
    "sinks removed": lambda: without_sinks(0.0, True),
    "sinks lost": lambda: without_sinks(0.0, False),
    "others grown": lambda: without_sinks(3.0, True, seed=2),
    "recent": recent,
}


def compare(vlm: Any, batch: Any, singles: Any, dense: Any, generated: Any, edit: Edit, hands: list[Any]) -> None:
    with apply(vlm, edit):
        tokens, found = generated(batch)
    for i, (prompt, hand) in enumerate(zip(singles, hands, strict=True)):
        expected = dense(prompt, tokens[i], hand)
        scale = float(expected.abs().max())
        assert float((found[i] - expected).abs().max()) <= 1e-5 * scale
        plain = dense(prompt, tokens[i], lambda layer, scores, p, length, x: p)
        assert float((plain - expected).abs().max()) > 1e-3 * scale
        untouched = edit.with_settings(strength=0.0)
    with apply(vlm, untouched):
        again = generated(batch)[1]
    assert torch.equal(again, generated(batch)[1])


@pytest.mark.parametrize("case", CASES)
def test_as_by_hand(
    vlm: LanguageModel, batch: VisionPrompt, singles: list[VisionPrompt], dense: Any, generated: Any, case: str
) -> None:
    edit, hand = CASES[case]()
    compare(vlm, batch, singles, dense, generated, edit, [hand, hand])


@pytest.mark.parametrize("edit", [Paint(), Paint().with_random_choice(3)], ids=["tower", "random"])
def test_paint(
    vlm: LanguageModel,
    batch: VisionPrompt,
    singles: list[VisionPrompt],
    dense: Any,
    generated: Any,
    tmp_path: Path,
    edit: Paint,
) -> None:
    """Each picture's own tokens, of the attention that the vision tower gives when asked for it; or as many others."""
    order = np.random.default_rng([3, 16]).permutation(16) if edit.tokens == "random" else np.arange(16)
    tower = vlm.model.model.vision_tower
    hands = []
    for prompt in singles:
        tower.set_attn_implementation("eager")
        with torch.no_grad():
            maps = tower(prompt.inputs["pixel_values"], output_attentions=True).attentions
        tower.set_attn_implementation("sdpa")
        top, bottom = paint_tokens(maps[0][0], maps[-2][0])
        amount = torch.zeros(16, dtype=torch.float64)
        amount[order[sorted(top)]], amount[order[sorted(bottom)]] = 0.7, 0.4

        def hand(layer: int, scores: Tensor, p: Tensor, length: int, x: Tensor, amount: Tensor = amount) -> Tensor:
            new = scores + (of_image(amount, p.shape[-1]) * scores.abs()).nan_to_num()
            return torch.where((torch.arange(p.shape[-1]) >= length - 1)[:, None], new.softmax(-1), p)

        hands.append(hand)
    compare(vlm, batch, singles, dense, generated, edit, hands)
    assert load_intervention(edit.save(tmp_path / "paint", vlm), vlm) == edit != Paint(alpha=0.9)
    with apply(vlm, Paint() + BoostRecent(beta=1.0)):
        both = generated(batch)[1]
    with apply(vlm, Paint()), apply(vlm, BoostRecent(beta=1.0)):
        assert torch.equal(generated(batch)[1], both)


def test_adaptvis_chooses_each_prompts_factor(
    vlm: LanguageModel, batch: VisionPrompt, singles: list[VisionPrompt], dense: Any, generated: Any
) -> None:
    """A threshold between the two chats' confidences: one is smoothed and the other sharpened, as V5 has it."""
    first = [generated(one)[1][0, 0] for one in singles]
    sure = [round(float(one.double().softmax(-1).max()), 2) for one in first]
    threshold = max(sure)  # strictly below it is unsure
    factors = [0.2 if one < threshold else 4.0 for one in sure]
    assert sorted(factors) == [0.2, 4.0]
    assert adaptive_factors(torch.stack(first), threshold=threshold, unsure=0.2, sure=4.0) == factors

    def hand(factor: float) -> Any:
        def of(layer: int, scores: Tensor, p: Tensor, length: int, x: Tensor) -> Tensor:
            new = scores.clone()
            new[:, length - 1, IMAGE] *= factor
            return new.softmax(-1)

        return of

    edit = AdaptSpanLogits(threshold=threshold, unsure=0.2, sure=4.0)
    compare(vlm, batch, singles, dense, generated, edit, [hand(factor) for factor in factors])


def test_hidden_tokens_are_as_if_they_were_dropped(
    vlm: LanguageModel, singles: list[VisionPrompt], generated: Any
) -> None:
    """FastV's other form: from the layer on the tokens are not there, and the rest keep their positions."""
    prompt, seen = singles[0], list[Tensor]()
    width = prompt.inputs["input_ids"].shape[1]
    hook = vlm.model.model.language_model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    edit = PruneTokens(layer=1, keep=3)
    with apply(vlm, edit):
        logits = generated(prompt, 1)[1][0, 0]
    hook.remove()
    held = edit.in_force(vlm, None)
    with prompt.published(), attached(vlm, held), torch.no_grad():
        vlm.model(**prompt.inputs)
        (layer,) = held.found._layers.values()
    kept = (~layer.keys[0, 0]).nonzero()[:, 0]
    assert len(kept) == width - 13
    language = vlm.model.model.language_model
    x, at = seen[-1][:, kept], kept[None]
    with torch.no_grad():
        for block in language.layers[1:]:
            x = block(x, position_embeddings=language.rotary_emb(x, at), position_ids=at, attention_mask=None)
        expected = vlm.model.lm_head(language.norm(x))[0, -1]
    assert float((logits - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_what_is_refused(vlm: LanguageModel, batch: VisionPrompt, generated: Any) -> None:
    for bad in ({"keep": 0}, {"layer": 0}, {"keep": 2.5}, {"by": "luck"}, {"sigma": 1.0}):
        with pytest.raises(HeadscopeError):
            PruneTokens(**bad)
    with pytest.raises(HeadscopeError, match="the last one is 2"), apply(vlm, PruneTokens(layer=3)):
        raise AssertionError("entered")
    with pytest.raises(HeadscopeError, match="no span is called 'image'"), apply(vlm, PruneTokens()), torch.no_grad():
        vlm.model(**batch.inputs)
    with pytest.warns(UserWarning, match="holds no more than stay"), apply(vlm, PruneTokens(keep=16, layer=1)):
        generated(batch)
    with pytest.warns(UserWarning, match="passes tau"):
        edit = ScaleImageSinks(dimensions=DIMENSIONS, tau=5.0, layers=(1,))
        with apply(vlm, edit):
            generated(batch)


def test_padded_patches_by_hand() -> None:
    """640 x 480 in a grid of 24: 18 rows of 24 are kept (the authors' 432); narrow images; a strict threshold."""
    gone = padded_patches(640, 480, (24, 24))
    assert gone == [*range(72), *range(504, 576)]
    assert padded_patches(480, 480, (4, 4)) == []
    assert padded_patches(40, 80, (4, 4)) == [0, 3, 4, 7, 8, 11, 12, 15]
    assert padded_patches(60, 80, (4, 4)) == [] and len(padded_patches(60, 80, (4, 4), 0.01)) == 8
