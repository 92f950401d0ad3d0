"""Importance of heads by ablation and by gradient, against the untouched model in float64 with plain hooks.

Tolerance: float32 through two layers, logits up to about 10: 1e-5 of them, 1e-4 for losses and gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from headscope.interp import heads
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.causal.ablation_importance import AblationImportance
from headscope.interp.heads.causal.gradient_importance import GradientImportance, normalised
from headscope.interp.models import LanguageModel
from headscope.interp.sites import handlers_on

Change = Callable[[int, torch.Tensor], torch.Tensor]
PAIRS = [("w3 w7 w5", "w9"), ("w4 w8 w2 w6 w1", "w11 w12"), ("w5 w5", "w2")]
QUIET = {"progress": False}


def loss_by_hooks(lm: LanguageModel, x: list[int], y: list[int], change: Change) -> torch.Tensor:
    """The loss of y after x with every output projection's input (token, head, d) changed: float64, eager."""
    model = copy.deepcopy(lm.model).double()
    model.set_attn_implementation("eager")
    for i, layer in enumerate(model.model.layers):

        def hook(module, args, i=i):
            z = change(i, args[0].view(-1, 4, 8))
            return (z.reshape(args[0].shape),)

        layer.self_attn.o_proj.register_forward_pre_hook(hook)
    log_p = model(torch.tensor([[*x, *y]])).logits.log_softmax(-1)[0]
    return -torch.stack([log_p[len(x) - 1 + i, token] for i, token in enumerate(y)]).mean()


def read(lm: LanguageModel, given: dict) -> list[tuple[list[int], list[int]]]:
    """Prompts and targets as tokens, by hand: a text's target is all of it but the BOS."""
    if "texts" in given:
        whole = [lm.tokenizer(text)["input_ids"][: given["length"]] for text in given["texts"]]
        return [(ids[:1], ids[1:]) for ids in whole]
    return [tuple([int(w[1:]) for w in part.split()] for part in pair) for pair in given["pairs"]]


def products(lm: LanguageModel, x: list[int], y: list[int]) -> torch.Tensor:
    """z . dL/dz by autograd: (layer, head, token)."""
    held = {}

    def keep(layer: int, z: torch.Tensor) -> torch.Tensor:
        held[layer] = z.requires_grad_(True)
        return z

    loss = loss_by_hooks(lm, x, y, keep)
    grads = torch.autograd.grad(loss, [held[0], held[1]])
    return torch.stack([(held[i] * grad).sum(-1).T.detach() for i, grad in enumerate(grads)])


@pytest.fixture(params=["texts", "pairs"])
def given(request: pytest.FixtureRequest, texts: list[str]) -> dict:
    return {"texts": texts[:3], "length": 15} if request.param == "texts" else {"pairs": PAIRS}


def with_start(lm: LanguageModel, given: dict, pair: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
    """The tokenizer's BOS before a prompt of a pair; a text has it already."""
    return pair if "texts" in given else ([lm.tokenizer.bos_token_id, *pair[0]], pair[1])


@pytest.mark.parametrize("over", ["text", "token"])
def test_gradients_are_those_of_autograd(grouped: LanguageModel, given: dict, over: str) -> None:
    scores = heads.gradient_importance(grouped, over=over, **given, **QUIET)
    assert len(scores.trials) == 3
    for trial, pair in zip(scores.trials, read(grouped, given), strict=True):
        parts = products(grouped, *with_start(grouped, given, pair))
        wanted = parts.sum(-1).abs() if over == "text" else parts.abs().mean(-1)
        np.testing.assert_allclose(trial, wanted, rtol=0, atol=1e-4)
        assert wanted.max() > 50 * 1e-4


def test_ablation_is_a_hook_that_zeroes(grouped: LanguageModel, given: dict) -> None:
    scores = heads.ablation_importance(grouped, together=3, **given, **QUIET)
    for trial, one, pair in zip(scores.trials, scores.details, read(grouped, given), strict=True):
        tokens = with_start(grouped, given, pair)
        whole = loss_by_hooks(grouped, *tokens, lambda layer, z: z).item()
        assert one["loss"] == pytest.approx(whole, abs=1e-4)
        for layer, head in np.ndindex(2, 4):

            def zero(i: int, z: torch.Tensor, at: tuple[int, int] = (layer, head)) -> torch.Tensor:
                keep = torch.ones(4, dtype=z.dtype)
                keep[at[1]] = float(i != at[0])
                return z * keep[:, None]

            assert trial[layer, head] == pytest.approx(loss_by_hooks(grouped, *tokens, zero).item() - whole, abs=2e-4)
        assert np.abs(trial).max() > 50 * 2e-4


def test_heads_that_write_nothing_have_no_importance(grouped: LanguageModel, texts: list[str]) -> None:
    """And the gradient is the slope of the loss in a factor on z. A central difference of step 0.01: the model's norms
    are in float32 in any dtype, which costs 1e-7 / 0.01, the third derivative (of size 10) 10 * 0.01^2 / 6 = 2e-4."""
    with torch.no_grad():
        grouped.model.model.layers[1].self_attn.o_proj.weight[:, 16:24] = 0  # head 2
    options = {"texts": texts[:2], "length": 12}
    for name in ("ablation_importance", "gradient_importance"):
        mean = np.abs(heads.method(name)(grouped, **options, **QUIET).mean)
        assert mean[1, 2] <= 1e-6 and (np.delete(mean.ravel(), 6) > 1e-5).all(), name
    trial = heads.gradient_importance(grouped, **options, **QUIET).trials[0]
    x, y = read(grouped, options)[0]
    step = 1e-2

    def scaled(factor: float) -> float:
        return loss_by_hooks(grouped, x, y, lambda i, z: z * (factor if i == 0 else 1)).item()

    slope = (scaled(1 + step) - scaled(1 - step)) / (2 * step)  # of all heads of layer 0 at once
    signed = products(grouped, x, y).sum(-1)
    assert signed[0].sum().item() == pytest.approx(slope, abs=1e-3)
    np.testing.assert_allclose(trial, signed.abs(), rtol=0, atol=1e-4)


def test_normalised_layers_have_a_norm_of_one(grouped: LanguageModel, texts: list[str]) -> None:
    scores = heads.gradient_importance(grouped, texts=texts[:3], length=12, **QUIET)
    found = normalised(scores)
    np.testing.assert_allclose((found.mean**2).sum(1), 1, rtol=1e-12)
    for mine, other in zip(found.mean, scores.mean, strict=True):
        np.testing.assert_array_equal(np.argsort(mine), np.argsort(other))


def test_nothing_stays_and_bad_settings_are_one_line(grouped: LanguageModel) -> None:
    heads.gradient_importance(grouped, pairs=PAIRS, **QUIET)
    assert all(p.requires_grad and p.grad is None for p in grouped.model.parameters())
    assert not handlers_on(grouped)
    with pytest.raises(HeadscopeError, match="not both"):
        AblationImportance(texts="a", pairs=PAIRS)
    with pytest.raises(HeadscopeError, match="at least 1 head"):
        AblationImportance(together=0)
    with pytest.raises(HeadscopeError, match="'text' or 'token'"):
        GradientImportance(over="word")
    with pytest.raises(HeadscopeError, match="samples=0"):
        GradientImportance(samples=0)


@pytest.mark.slow
def test_smollm2_the_gradient_orders_heads_as_ablation_does(smollm2) -> None:
    """One short text: rank correlation far above what permuted heads give (standard error 1 / sqrt(269))."""
    options = {"samples": 1, "length": 10}
    ablation = heads.ablation_importance(smollm2, together=30, **options, **QUIET)
    gradient = heads.gradient_importance(smollm2, **options, **QUIET)
    rho = spearmanr(np.abs(ablation.mean).ravel(), gradient.mean.ravel()).statistic
    assert rho > 5 / np.sqrt(269)
