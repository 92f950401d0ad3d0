"""Attribution of edges equals its formula by plain hooks, and true patching of single edges in the linear limit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.probes.patching.edges import edge_attribution
from headscope.probes.patching.pairs import Pairs
from headscope.probes.patching.path import path_effect

LAYERS, HEADS, D = 3, 4, 8
# sums of 4 x 32 products of size 10 in float32, of gradients through three layers: 128 x 10 x 2**-24
CLOSE = dict(rtol=1e-3, atol=1e-4)


class Reader:
    """What one receiver reads, by plain hooks: its share of a projection is computed anew from the stream plus a zero,
    whose gradient is that of the receiver's input."""

    def __init__(self, plain, receiver: str) -> None:
        self.plain, self.name = plain, receiver
        self.stream, self.leaf = torch.zeros(0), torch.zeros(0)

    def hooks(self):
        if self.name == "logits":
            return [(self.plain.blocks[-1].register_forward_hook, self._end)]
        block, rest = self.plain.blocks[int(self.name[1])], self.name[2:]
        neox = hasattr(block, "attention")
        if rest == "MLP":
            self.norm = getattr(block, "pre_feedforward_layernorm", block.post_attention_layernorm)
            module, change = block.mlp, self._mlp
        else:
            head, site = int(rest[1]), rest[3]
            self.norm = block.input_layernorm
            module = block.attention.query_key_value if neox else getattr(block.self_attn, f"{site}_proj")
            first = (3 * head + "qkv".index(site)) * D if neox else (head if site == "q" else head // 2) * D
            self.part, change = slice(first, first + D), self._projected
        return [(self.norm.register_forward_pre_hook, self._keep), (module.register_forward_hook, change)]

    def _keep(self, m, args):
        self.stream = args[0]

    def _again(self, x):
        self.leaf = torch.zeros_like(x, requires_grad=True)
        return x + self.leaf

    def _end(self, m, a, out):
        new = self._again(out[0] if isinstance(out, tuple) else out)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    def _mlp(self, m, a, out):
        return m.forward(self.norm.forward(self._again(self.stream)))

    def _projected(self, m, a, out):
        new = F.linear(self.norm.forward(self._again(self.stream)), m.weight, m.bias)
        out = out.clone()
        out[..., self.part] = new[..., self.part]
        return out

    def gradient(self, pairs: Pairs, i: int, **inputs: torch.Tensor) -> torch.Tensor:
        with self.plain.hooked(*self.hooks()):
            logits = self.plain.model(**inputs).logits[0, -1]
        return torch.autograd.grad(logits[pairs.answers[i]] - logits[pairs.others[i]], self.leaf)[0][0]


def written(plain, pairs: Pairs, i: int, n: int) -> dict[str, torch.Tensor]:
    """What every sender would write instead: (token, d_model)."""
    runs = [x[i, :n] for x in (pairs.clean, pairs.corrupt)]
    z, mlps, entering = zip(*((plain.z(x), plain.outputs(plain.mlp, x), first(plain, x)) for x in runs), strict=True)
    found = {"embedding": entering[1] - entering[0]}
    for layer in range(LAYERS):
        weight, block = plain.out[layer].weight, plain.blocks[layer]
        for head in range(HEADS):
            moved = (z[1][layer] - z[0][layer])[:, head] @ weight[:, head * D : (head + 1) * D].T
            if hasattr(block, "pre_feedforward_layernorm"):
                own = F.linear(z[0][layer].flatten(1), weight)
                moved = torch.func.jvp(block.post_attention_layernorm.forward, (own,), (moved,))[1]
            found[f"L{layer}H{head}"] = moved.detach()
        found[f"L{layer}MLP"] = (mlps[1][layer] - mlps[0][layer]).view(n, -1)
    return found


def first(plain, ids: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    with plain.hooked((plain.blocks[0].register_forward_pre_hook, lambda m, a: seen.append(a[0][0].clone()))):
        plain(ids)
    return seen[0]


def before(sender: str, receiver: str, parallel: bool) -> bool:
    if sender == "embedding" or receiver == "logits":
        return True
    same = receiver.endswith("MLP") and sender[1] == receiver[1] and "H" in sender and not parallel
    return sender[1] < receiver[1] or same


def test_it_is_the_product_of_what_is_written_and_the_gradient_where_it_is_read(
    lm: LanguageModel, plain, pairs: Pairs, unchanged
) -> None:
    found = edge_attribution(lm, pairs, (1, 5), steps=1, normalize=False, batch_size=3)
    assert (found.forwards, found.backwards) == (2, 1)
    assert found.senders[:6] == ("embedding", "L0H0", "L0H1", "L0H2", "L0H3", "L0MLP") and len(found.receivers) == 40
    i, n, parallel = 1, int(pairs.lengths[1]), lm.name == "gpt_neox"
    moved = written(plain, pairs, i, n)
    for receiver in ("L0H1.q", "L1H2.q", "L1H2.k", "L2H1.v", "L1MLP", "logits"):
        slope = Reader(plain, receiver).gradient(pairs, i, input_ids=pairs.clean[i : i + 1, :n])
        shared = [receiver]
        if receiver[-1] in "kv" and not parallel:  # the plain gradient is of the keys that two heads share
            head = int(receiver[3]) // 2 * 2
            shared = [f"{receiver[:3]}{h}{receiver[4:]}" for h in (head, head + 1)]
        for sender, x in moved.items():
            if before(sender, receiver, parallel):
                got = sum(found.effect(sender, each)[i] for each in shared)
                np.testing.assert_allclose(got, float((x * slope)[1:5].sum()), **CLOSE, err_msg=f"{sender} {receiver}")
            else:
                with pytest.raises(HeadscopeError, match="no edge goes"):
                    found.effect(sender, receiver)
    assert np.nanmax(np.abs(found.values)) > 0.1 and unchanged()


def test_integrated_gradients_average_over_what_enters(pairs: Pairs, tiny_model, make_plain) -> None:
    lm = tiny_model("llama")
    plain, i, n = make_plain(lm), 0, int(pairs.lengths[0])
    found = edge_attribution(lm, pairs, steps=3, normalize=False)
    assert (found.forwards, found.backwards) == (4, 3)
    one, two = (first(plain, x[i, :n]) for x in (pairs.clean, pairs.corrupt))
    moved = written(plain, pairs, i, n)
    for receiver in ("L1H2.q", "L2MLP", "logits"):
        reader = Reader(plain, receiver)
        slopes = [reader.gradient(pairs, i, inputs_embeds=(one + j / 3 * (two - one))[None]) for j in range(3)]
        for sender in ("embedding", "L0H1", "L0MLP"):
            want = float((moved[sender] * sum(slopes) / 3).sum())
            np.testing.assert_allclose(found.effect(sender, receiver)[i], want, **CLOSE)


@pytest.mark.parametrize(("kind", "size"), [("llama", 0.04), ("gemma2", 0.04), ("gpt_neox", 0.2)])
def test_it_is_true_patching_where_prompts_hardly_differ(pairs: Pairs, tiny_model, kind: str, size: float) -> None:
    """Tokens 20 to 39 are 0 to 19 moved a little. What is left is of second order: a quarter of the way, a sixteenth of
    it (bounded by an eighth) where the edges themselves are a quarter."""
    one = pairs.clean % 20
    other = one.clone()
    other[:, 2:4] += 20
    pairs = replace(pairs, clean=one, corrupt=other)
    left, seen = [], []
    for step in (size, size / 4):
        lm = tiny_model(kind)
        table = lm.model.get_input_embeddings().weight
        with torch.no_grad():
            draw = torch.Generator().manual_seed(3)
            table[20:] = table[:20] + step * table[:20].std() * torch.randn(20, 32, generator=draw)
        found = edge_attribution(lm, pairs, steps=1, normalize=False, sample=6)
        left.append(float((found.sample["estimate"] - found.sample["true"]).abs().max()))
        seen.append(float(found.sample["true"].abs().max()))
    noise = 1e-5  # of a difference of two logits of size 10 in float32, behind three layers
    assert left[1] < left[0] / 8 + noise  # an error of first order would leave a quarter
    assert seen[0] > 30 * noise and seen[1] / seen[0] < 0.4 and found.correlation["edges"] == 6


def test_its_error_bar_is_path_patching_with_everything_else_held(pairs: Pairs, tiny_model) -> None:
    lm = tiny_model("llama")
    found = edge_attribution(lm, pairs, steps=2, sample=4, direction="denoise", seed=1)
    swapped = replace(pairs, clean=pairs.corrupt, corrupt=pairs.clean)
    for row in found.sample.itertuples():
        true = path_effect(lm, swapped, [row.sender], row.receiver, freeze_mlps=True).mean()
        np.testing.assert_allclose(row.true, true, rtol=1e-4, atol=1e-6)
        assert row.estimate == pytest.approx(found.effect(row.sender, row.receiver).mean())
    top = found.top(5)
    assert list(top["effect"].abs()) == sorted(top["effect"].abs(), reverse=True) and (top["n"] == 5).all()
    assert (top["ci_low"] <= top["effect"]).all() and (top["effect"] <= top["ci_high"]).all()


def test_bad_inputs_are_refused(pairs: Pairs, tiny_model, unchanged_of) -> None:
    lm = tiny_model("llama")
    check = unchanged_of(lm)
    for settings, words in (
        ({"steps": 0}, "steps is a whole number of at least 1"),
        ({"sample": -1}, "sample is .* at least 0"),
        ({"batch_size": 0}, "batch_size is"),
        ({"sample": 2, "steps": 1}, "too few to rank"),
        ({"direction": "both"}, "direction is"),
    ):
        with pytest.raises(HeadscopeError, match=words):
            edge_attribution(lm, pairs, **settings)
    with pytest.raises(HeadscopeError, match="no edge"):
        edge_attribution(lm, pairs, steps=1).effect("L0H9", "logits")
    with pytest.raises(HeadscopeError, match="L2H1 is not before it"):
        edge_attribution(lm, pairs, steps=1).effect("L2H1", "L0H2.q")
    with pytest.raises(HeadscopeError, match="count is"):
        edge_attribution(lm, pairs, steps=1).top(-1)
    assert check()
