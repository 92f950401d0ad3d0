"""Attribution patching equals its formula by autograd through plain hooks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.probes.patching.activation import patch_heads
from headscope.probes.patching.attribution import attribution_patching
from headscope.probes.patching.edges import edge_attribution
from headscope.probes.patching.pairs import Pairs

HEADS, D = 4, 8
CLOSE = dict(rtol=1e-4, atol=1e-5)  # sums of 72 products of size 1 in float32: 72 x 2**-24


def gradients(plain, pairs: Pairs, i: int, modules, allow_unused=False, **inputs: torch.Tensor) -> list[torch.Tensor]:
    """dL/d(input of each module) by autograd: (token, width); 0 where there is none."""
    seen: list[torch.Tensor] = []
    hooks = [(m.register_forward_pre_hook, lambda m, a: seen.append(a[0])) for m in modules]
    with plain.hooked(*hooks):
        logits = plain.model(**inputs).logits[0, -1]
    told = logits[pairs.answers[i]] - logits[pairs.others[i]]
    found = torch.autograd.grad(told, seen, allow_unused=allow_unused)
    return [torch.zeros_like(x[0]) if g is None else g[0] for x, g in zip(seen, found, strict=True)]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_it_is_the_gradient_times_the_difference(lm: LanguageModel, plain, pairs: Pairs, direction, unchanged) -> None:
    found = attribution_patching(lm, pairs, positions=(1, 5), direction=direction, normalize=False, batch_size=2)
    assert (found.forwards, found.backwards) == (2, 1)
    for i, n in enumerate(pairs.lengths.tolist()):
        base, source = (pairs.corrupt, pairs.clean) if direction == "denoise" else (pairs.clean, pairs.corrupt)
        grads = gradients(plain, pairs, i, plain.out, input_ids=base[i : i + 1, :n])
        for layer, grad in enumerate(grads):
            moved = plain.z(source[i, :n])[layer] - plain.z(base[i, :n])[layer]
            want = (moved * grad.view(n, HEADS, D))[1:5].sum((0, 2))
            np.testing.assert_allclose(found.scores.trials[i, layer], want, **CLOSE)
    assert np.abs(found.scores.trials).max() > 0.1 and unchanged()


def test_mlps_are_scored_by_what_they_add(lm: LanguageModel, plain, pairs: Pairs) -> None:
    found = attribution_patching(lm, pairs, mlps=True, normalize=False).mlps
    assert found is not None and found.shape == (5, 3)
    i, n = 1, int(pairs.lengths[1])
    seen: list[torch.Tensor] = []
    with plain.hooked(*((m.register_forward_hook, lambda m, a, o: seen.append(o)) for m in plain.mlp)):
        logits = plain.model(input_ids=pairs.clean[i : i + 1, :n]).logits[0, -1]
    grads = torch.autograd.grad(logits[pairs.answers[i]] - logits[pairs.others[i]], seen)
    one, two = (plain.outputs(plain.mlp, x[i, :n]) for x in (pairs.clean, pairs.corrupt))
    want = [float(((b - a) * g).sum()) for a, b, g in zip(one, two, grads, strict=True)]
    np.testing.assert_allclose(found[i], want, **CLOSE)


def test_it_comes_with_its_rank_correlation(lm: LanguageModel, pairs: Pairs) -> None:
    found = attribution_patching(lm, pairs, positions=-1, sample=12)
    assert found.correlation is not None and found.correlation["heads"] == 12
    assert found.correlation["spearman"] > 0.5
    truth = patch_heads(lm, pairs, positions=-1, direction="noise")
    np.testing.assert_allclose(found.true.trials, truth.trials, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("component", ["q", "k"])
def test_the_fix_recomputes_the_pattern(pairs: Pairs, tiny_model, make_plain, component: str) -> None:
    """Beside a hook on the projection: z with the head's own patched query or key, times dL/dz."""
    lm = tiny_model("llama", num_key_value_heads=4)
    plain = make_plain(lm)
    found = attribution_patching(lm, pairs, component, (2, 6), fix="qk", normalize=False)
    assert (found.forwards, found.backwards) == (2, 1)
    i, n, layer = 0, int(pairs.lengths[0]), 1
    projection = getattr(plain.blocks[layer].self_attn, f"{component}_proj")
    given, seen = plain.outputs([projection], pairs.corrupt[i, :n])[0], []

    def put(m, args, out):
        out = out.clone()
        out[0, 2:6] = given[2:6]
        return out

    take = plain.out[layer].register_forward_pre_hook
    with plain.hooked((projection.register_forward_hook, put), (take, lambda m, a: seen.append(a[0][0].clone()))):
        plain(pairs.clean[i, :n])
    moved = seen[0].view(n, HEADS, D) - plain.z(pairs.clean[i, :n])[layer]
    grad = gradients(plain, pairs, i, plain.out, input_ids=pairs.clean[i : i + 1, :n])[layer].view(n, HEADS, D)
    np.testing.assert_allclose(found.scores.trials[i, layer], (moved * grad).sum((0, 2)), **CLOSE)


def test_the_fix_helps_where_attention_saturates(pairs: Pairs, tiny_model) -> None:
    """Queries 30 times as large: a softmax that is flat almost everywhere has no gradient, and the plain estimate of q
    is far from true patching where the recomputed pattern is close."""
    lm = tiny_model("llama", num_key_value_heads=4)
    with torch.no_grad():
        for block in lm.model.model.layers:
            block.self_attn.q_proj.weight *= 30
    true = patch_heads(lm, pairs, "q", direction="noise", normalize=False).trials[:, 2]
    plain, fixed = (
        attribution_patching(lm, pairs, "q", fix=f, normalize=False).scores.trials[:, 2] for f in ("none", "qk")
    )
    assert np.abs(fixed - true).mean() < 0.5 * np.abs(plain - true).mean()


def test_integrated_gradients_average_over_inputs(pairs: Pairs, tiny_model, make_plain) -> None:
    lm = tiny_model("llama")
    plain = make_plain(lm)
    found = attribution_patching(lm, pairs, steps=3, normalize=False)
    assert (found.forwards, found.backwards) == (4, 3)
    i, n = 0, int(pairs.lengths[0])
    embed = lm.model.get_input_embeddings()
    one, two = (embed(x[i : i + 1, :n]).detach() for x in (pairs.clean, pairs.corrupt))
    grads = [gradients(plain, pairs, i, plain.out, inputs_embeds=one + j / 3 * (two - one)) for j in range(3)]
    for layer in range(3):
        moved = plain.z(pairs.corrupt[i, :n])[layer] - plain.z(pairs.clean[i, :n])[layer]
        grad = sum(g[layer] for g in grads).view(n, HEADS, D) / 3
        np.testing.assert_allclose(found.scores.trials[i, layer], (moved * grad).sum((0, 2)), **CLOSE)


def test_dropout_is_the_mean_size_without_a_layer_each(lm: LanguageModel, plain, pairs: Pairs, unchanged) -> None:
    """Beside passes in which what a layer's attention and MLP add is detached, so that it keeps its value alone."""
    found = attribution_patching(lm, pairs, positions=(1, 5), dropout=True, mlps=True, sample=4)
    assert (found.forwards, found.backwards) == (2, 4)
    i, n = 1, int(pairs.lengths[1])
    ids = pairs.clean[i : i + 1, :n]
    one, two = (plain.z(x[i, :n]) for x in (pairs.clean, pairs.corrupt))
    attention = [  # what attention adds to the stream: behind a norm of it in gemma2
        b.post_attention_layernorm if hasattr(b, "pre_feedforward_layernorm") else out
        for b, out in zip(plain.blocks, plain.out, strict=True)
    ]
    sizes = []
    for layer in range(3):
        hooks = [(m.register_forward_hook, lambda m, a, o: o.detach()) for m in (attention[layer], plain.mlp[layer])]
        with plain.hooked(*hooks):
            grads = gradients(plain, pairs, i, plain.out, input_ids=ids, allow_unused=True)
        products = [(b - a) * g.view(n, HEADS, D) for a, b, g in zip(one, two, grads, strict=True)]
        sizes.append(np.stack([np.abs(x[1:5].sum((0, 2)).numpy()) for x in products]))
    assert not sizes[1][1].any() and sizes[1][0].any()
    base, other = (
        [plain.difference(plain(x[j, :m]), pairs, j) for j, m in enumerate(pairs.lengths.tolist())]
        for x in (pairs.clean, pairs.corrupt)
    )
    whole = abs(np.mean(np.subtract(other, base)))
    np.testing.assert_allclose(found.scores.trials[i], sum(sizes) / 2 / whole, rtol=1e-3, atol=1e-5 / whole)
    assert (found.true.trials[:, found.true.n > 0] >= 0).all() and (found.mlps >= 0).all() and unchanged()


def test_dropout_finds_what_two_ways_cancel(pairs: Pairs, tiny_model) -> None:
    """An MLP of layer 1 that takes away what attention of layer 0 wrote, all else being nearly 0: heads of layer 0
    have no effect to first order; of the three layers left out only layer 1 leaves their direct one: half of it."""
    lm = tiny_model("llama")
    blocks, wrote = lm.model.model.layers, dict[str, torch.Tensor]()
    with torch.no_grad():
        for block in blocks:
            block.mlp.down_proj.weight *= 1e-5
            block.self_attn.o_proj.weight *= 1 if block is blocks[0] else 1e-5
    hooks = [
        blocks[0].self_attn.register_forward_hook(lambda m, a, o: wrote.update(first=o[0])),
        blocks[1].mlp.register_forward_hook(lambda m, a, o: o - wrote["first"]),
    ]
    plain, dropped = (attribution_patching(lm, pairs, dropout=d, normalize=False).scores.trials for d in (False, True))
    direct = edge_attribution(lm, pairs, steps=1, normalize=False)
    for hook in hooks:
        hook.remove()
    want = np.stack([direct.effect(f"L0H{head}", "logits") for head in range(HEADS)], 1)
    # other ways write 1e-5 of what they did, from a stream that norms enlarge less than 100 times
    near = 1e-3 * np.abs(want).max()
    np.testing.assert_allclose(plain[:, 0], 0, atol=near)
    np.testing.assert_allclose(dropped[:, 0], np.abs(want) / 2, atol=near)
    assert np.abs(want).max() > 0.1


def test_equal_prompts_have_none(lm: LanguageModel, pairs: Pairs) -> None:
    """Up to the rounding of passes with and without gradients: 72 products of q of size 10, 72 x 10 x 2**-23."""
    same = replace(pairs, corrupt=pairs.clean)
    for component in ("z", "q", "v"):
        assert np.abs(attribution_patching(lm, same, component, normalize=False).scores.trials).max() < 1e-4


def test_bad_inputs_are_refused(pairs: Pairs, tiny_model, unchanged_of) -> None:
    lm = tiny_model("llama")
    check = unchanged_of(lm)
    for settings, words in (
        ({"fix": "qk"}, "'qk' fixes q and k"),
        ({"steps": 0}, "steps is .* at least 1"),
        ({"sample": -1}, "sample is .* at least 0"),
        ({"steps": 2, "dropout": True}, "choose one of the two"),
        ({"sample": 2}, "too few to rank"),
        ({"metric": lambda logits, pairs: 1 / 0}, "division"),
    ):
        with pytest.raises((HeadscopeError, ZeroDivisionError), match=words):
            attribution_patching(lm, pairs, **settings)
        assert check()
