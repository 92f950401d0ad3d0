"""Causal tracing equals the same written with plain hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.probes.patching.causal_trace import causal_trace

TEXT = "w1 w2 w3 w4 w5 w6"


@pytest.mark.parametrize("place", ["resid_post", "mlp_out"])
def test_it_is_the_same_by_plain_hooks(tiny_model, make_plain, word_tokenizer, place: str) -> None:
    lm = tiny_model("llama")
    lm.tokenizer = word_tokenizer
    plain = make_plain(lm)
    found = causal_trace(lm, TEXT, (1, 3), place=place, samples=4, window=2 if place == "mlp_out" else None, seed=3)
    ids = lm.encode(TEXT)["input_ids"][0]
    entering = lm.model.get_input_embeddings()(ids).detach()
    drawn = torch.randn(4, 2, 32, generator=torch.Generator().manual_seed(3))
    noise = 3 * entering[1:3].std() * drawn
    answer = int(plain(ids).argmax())
    modules = plain.blocks if place == "resid_post" else plain.mlp
    clean = [x.view(6, 32) for x in plain.outputs(modules, ids)]

    def probability(layers: list[int], at: int) -> float:
        def noised(m, args, out, s):
            out = out.clone()
            out[0, 1:3] += noise[s]
            return out

        def restore(m, args, out, layer):
            held = (out[0] if isinstance(out, tuple) else out).clone()
            held[0, at] = clean[layer][at]
            return (held, *out[1:]) if isinstance(out, tuple) else held

        said = []
        for s in range(4):
            hooks = [(lm.model.get_input_embeddings().register_forward_hook, lambda m, a, o, s=s: noised(m, a, o, s))]
            hooks += [(modules[n].register_forward_hook, lambda m, a, o, n=n: restore(m, a, o, n)) for n in layers]
            with plain.hooked(*hooks):
                said.append(float(plain(ids).softmax(-1)[answer]))
        return float(np.mean(said))

    low = probability([], 0)
    np.testing.assert_allclose(found.attrs["noised"], low, atol=1e-5)
    np.testing.assert_allclose(found.attrs["clean"], float(plain(ids).softmax(-1)[answer]), atol=1e-5)
    for layer, at in ((0, 1), (1, 2), (2, 5)):
        window = [layer] if place == "resid_post" else [n for n in (layer - 1, layer) if 0 <= n < 3]
        row = found[(found.layer == layer) & (found.position == at)].iloc[0]
        np.testing.assert_allclose(row.effect, probability(window, at) - low, atol=1e-5)
    assert list(found.in_subject[:6]) == [False, True, True, False, False, False]


def test_the_last_state_is_the_answer(tiny_model, word_tokenizer) -> None:
    lm = tiny_model("gpt_neox")
    lm.tokenizer = word_tokenizer
    found = causal_trace(lm, TEXT, (0, 2), samples=3)
    whole = found.attrs["clean"] - found.attrs["noised"]
    last = found[(found.layer == 2) & (found.position == 5)].iloc[0]
    np.testing.assert_allclose(last.effect, whole, atol=1e-5)
    with pytest.raises(HeadscopeError, match="no subject"):
        causal_trace(lm, TEXT, (4, 9))
