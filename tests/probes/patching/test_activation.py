"""Activation patching equals plain hooks on the model's own modules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.probes.patching.activation import _over_all, patch_heads, patch_places
from headscope.probes.patching.pairs import Pairs

LAYERS, HEADS, D = 3, 4, 8
CLOSE = dict(rtol=1e-5, atol=2e-5)  # logits of size 5 in float32, a few hundred operations: 5 x 2**-24 x 50


def by_hooks(plain, pairs: Pairs, layer: int, head: int, rows: slice, direction: str) -> np.ndarray:
    """The metric's difference of each pair where one head's input of the output projection is taken from the other."""
    found = []
    for i, n in enumerate(pairs.lengths.tolist()):
        base, source = (pairs.corrupt, pairs.clean) if direction == "denoise" else (pairs.clean, pairs.corrupt)
        given = plain.z(source[i, :n])[layer]

        def put(m, args, given=given):
            x = args[0].clone()
            x.view(1, -1, HEADS, D)[0, rows, head] = given[rows, head]
            return (x, *args[1:])

        with plain.hooked((plain.out[layer].register_forward_pre_hook, put)):
            patched = plain.difference(plain(base[i, :n]), pairs, i)
        found.append(patched - plain.difference(plain(base[i, :n]), pairs, i))
    return np.array(found)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_head_is_the_same_by_plain_hooks(lm: LanguageModel, plain, pairs: Pairs, direction: str, unchanged) -> None:
    found = patch_heads(lm, pairs, direction=direction, normalize=False, batch_size=2, together=5)
    last = patch_heads(lm, pairs, positions=-1, direction=direction, normalize=False, batch_size=3)
    for layer, head in ((0, 1), (1, 3), (2, 0)):
        want = by_hooks(plain, pairs, layer, head, slice(None), direction)
        np.testing.assert_allclose(found.trials[:, layer, head], want, **CLOSE)
        want = by_hooks(plain, pairs, layer, head, slice(-1, None), direction)
        np.testing.assert_allclose(last.trials[:, layer, head], want, **CLOSE)
    assert np.abs(found.trials[:, :2]).max() > 0.1, "nothing moved"
    assert unchanged()


def test_shares_are_of_the_mean_difference(lm: LanguageModel, plain, pairs: Pairs) -> None:
    ends = [[plain.difference(plain(x[i, :n]), pairs, i) for i, n in enumerate(pairs.lengths)]
            for x in (pairs.clean, pairs.corrupt)]  # fmt: skip
    whole = np.mean(ends[0]) - np.mean(ends[1])
    shares, logits = (patch_heads(lm, pairs, normalize=n).trials for n in (True, False))
    np.testing.assert_allclose(shares * whole, logits, rtol=1e-4, atol=1e-5)


def test_a_query_is_the_same_by_a_hook_on_its_projection(lm: LanguageModel, plain, pairs: Pairs) -> None:
    if plain.q[0] is None:
        pytest.skip("one projection gives q, k and v")
    found = patch_heads(lm, pairs, "q", (2, 5), normalize=False)
    for i, n in enumerate(pairs.lengths.tolist()):
        given = plain.outputs(plain.q, pairs.clean[i, :n])[1]

        def put(m, args, out, given=given):
            out = out.clone()
            out.view(1, -1, HEADS, D)[0, 2:5, 2] = given.view(-1, HEADS, D)[2:5, 2]
            return out

        base = plain.difference(plain(pairs.corrupt[i, :n]), pairs, i)
        with plain.hooked((plain.q[1].register_forward_hook, put)):
            want = plain.difference(plain(pairs.corrupt[i, :n]), pairs, i) - base
        np.testing.assert_allclose(found.trials[i, 1, 2], want, **CLOSE)


def test_keys_that_heads_share_are_changed_for_one_head(pairs: Pairs, tiny_model) -> None:
    """Beside the same model with keys and values written out for every head, patched by a hook on its projection."""
    lm, twin = tiny_model("llama"), tiny_model("llama", num_key_value_heads=4)
    weights = lm.model.state_dict()
    for name, x in weights.items():
        if "k_proj" in name or "v_proj" in name:
            weights[name] = x.view(2, D, -1).repeat_interleave(2, 0).flatten(0, 1)
    twin.model.load_state_dict(weights)
    for component in ("k", "v"):
        one, two = (patch_heads(m, pairs, component, (1, 4), normalize=False).trials for m in (lm, twin))
        np.testing.assert_allclose(one, two, **CLOSE)
        i, n, projection = 0, int(pairs.lengths[0]), getattr(twin.model.model.layers[1].self_attn, f"{component}_proj")
        seen: list[torch.Tensor] = []
        hook = projection.register_forward_hook(lambda m, a, o, seen=seen: seen.append(o.clone()))
        twin.model(input_ids=pairs.clean[:1, :n])
        hook.remove()

        def put(m, args, out, seen=seen):
            out = out.clone()
            out.view(1, -1, HEADS, D)[0, 1:4, 3] = seen[0].view(-1, HEADS, D)[1:4, 3]
            return out

        said = [twin.model(input_ids=pairs.corrupt[:1, :n]).logits[0, -1]]
        hook = projection.register_forward_hook(put)
        said.append(twin.model(input_ids=pairs.corrupt[:1, :n]).logits[0, -1])
        hook.remove()
        before, after = (float(x[pairs.answers[i]] - x[pairs.others[i]]) for x in said)
        np.testing.assert_allclose(one[i, 1, 3], after - before, **CLOSE)


def test_layers_are_the_same_by_plain_hooks(lm: LanguageModel, plain, pairs: Pairs, unchanged) -> None:
    spans = {"edited": (2, 4), "end": -1}
    for place, modules in (("mlp_out", plain.mlp), ("resid_post", plain.blocks)):
        found = patch_places(lm, pairs, place, spans, normalize=False, together=3)
        for layer in range(LAYERS):
            for name, rows in (("edited", slice(2, 4)), ("end", slice(-1, None))):
                want = []
                for i, n in enumerate(pairs.lengths.tolist()):
                    given = plain.outputs([modules[layer]], pairs.clean[i, :n])[0]

                    def put(m, args, out, given=given, rows=rows):
                        held = out[0] if isinstance(out, tuple) else out
                        held = held.clone()
                        held[0, rows] = given.view(held.shape[1:])[rows]
                        return (held, *out[1:]) if isinstance(out, tuple) else held

                    base = plain.difference(plain(pairs.corrupt[i, :n]), pairs, i)
                    with plain.hooked((modules[layer].register_forward_hook, put)):
                        want.append(plain.difference(plain(pairs.corrupt[i, :n]), pairs, i) - base)
                row = found[(found.layer == layer) & (found.span == name)].iloc[0]
                np.testing.assert_allclose(row.effect, np.mean(want), **CLOSE)
    assert unchanged()


def test_the_whole_stream_restores_everything(lm: LanguageModel, pairs: Pairs) -> None:
    found = patch_places(lm, pairs, "resid_pre", {"all": None})
    np.testing.assert_allclose(found.effect, 1, atol=1e-4)
    assert found.attrs["unit"] == "share of the difference restored"


def test_a_mean_and_noise_are_put_in(lm: LanguageModel, plain, pairs: Pairs) -> None:
    pairs = replace(pairs, groups=torch.tensor([0, 1, 0, 1, 1]))
    found = patch_heads(lm, pairs, source="mean", direction="noise", normalize=False, batch_size=2)
    z = [plain.z(pairs.corrupt[i, :n])[1] for i, n in enumerate(pairs.lengths)]
    mean = (z[0] + z[2]) / 2  # of the first group, both of 9 tokens

    def put(m, args):
        x = args[0].clone()
        x.view(1, -1, HEADS, D)[0, :, 2] = mean[:, 2]
        return (x, *args[1:])

    base = plain.difference(plain(pairs.clean[0]), pairs, 0)
    with plain.hooked((plain.out[1].register_forward_pre_hook, put)):
        want = plain.difference(plain(pairs.clean[0]), pairs, 0) - base
    np.testing.assert_allclose(found.trials[0, 1, 2], want, **CLOSE)


def test_noise_is_one_draw_a_pair_in_any_batch(lm: LanguageModel, plain, pairs: Pairs) -> None:
    settings = dict(source="random", normalize=False, progress=False)
    one, two = (patch_heads(lm, pairs, batch_size=size, **settings).trials for size in (5, 2))
    np.testing.assert_allclose(one, two, **CLOSE)
    assert np.abs(one).max() > 0.05
    one, two = (patch_places(lm, pairs, "mlp_out", {"end": -1}, batch_size=n, **settings)["effect"] for n in (5, 2))
    np.testing.assert_allclose(one, two, **CLOSE)
    z = [plain.z(pairs.corrupt[i, :n])[1][:, 2] for i, n in enumerate(pairs.lengths)]
    sigma = _over_all(lm, pairs, ("z",), "denoise", "random", 2)["z", 1][2]
    assert float(sigma) == pytest.approx(float(torch.cat(z).std(correction=0)), rel=1e-4)


def test_equal_prompts_have_no_effect(lm: LanguageModel, pairs: Pairs) -> None:
    same = replace(pairs, corrupt=pairs.clean)
    assert np.abs(patch_heads(lm, same, normalize=False).trials).max() < 1e-5
    with pytest.raises(HeadscopeError, match="no difference to restore"):
        patch_heads(lm, same)
    half = replace(pairs, corrupt=torch.cat([pairs.clean[:1], pairs.corrupt[1:]]))
    assert np.abs(patch_heads(lm, half).trials[0]).max() < 1e-4


def test_nothing_stays_after_an_exception(lm: LanguageModel, pairs: Pairs, unchanged) -> None:
    calls = []

    def metric(logits, pairs):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("of the caller")
        return logits[:, 0]

    with pytest.raises(RuntimeError, match="of the caller"):
        patch_heads(lm, pairs, metric=metric)
    assert unchanged()


def test_bad_inputs_are_refused(pairs: Pairs, tiny_model) -> None:
    lm = tiny_model("llama")
    for call, words in (
        (lambda: patch_heads(lm, pairs, "w"), "name one of q, k, v, z"),
        (lambda: patch_heads(lm, pairs, heads="L9H0"), "L9H0 does not exist"),
        (lambda: patch_heads(lm, pairs, heads=[(0, -1)]), "L0H-1 does not exist"),
        (lambda: patch_heads(lm, pairs, heads=[]), "no heads were given"),
        (lambda: patch_heads(lm, pairs, source="zero"), "source is"),
        (lambda: patch_heads(lm, pairs, positions=8), "not in every prompt"),
        (lambda: patch_heads(lm, pairs, positions="subject"), "no span is called"),
        (lambda: patch_heads(lm, pairs, direction="up"), "direction is"),
        (lambda: patch_places(lm, pairs), "differ in length"),
        (lambda: patch_places(lm, pairs, spans={}), "no spans were given"),
        (lambda: patch_heads(lm, pairs, together=-1), "together is"),
    ):
        with pytest.raises(HeadscopeError, match=words):
            call()
