"""A * dL/dA without maps against autograd through eager attention; memory at 8,192 tokens."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.statistics.spans import OPEN, published_spans
from headscope.kernels.streaming import backward
from headscope.probes.gradients.information_flow import information_flow
from headscope.probes.gradients.integrated import integrated_attention
from headscope.probes.gradients.saliency import attention_saliency, saliency_scores

TEXT = " ".join(f"w{i}" for i in (1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 1, 4))
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", GROUPED),
    ("mistral", GROUPED | {"sliding_window": 5}),
    ("gemma2", GROUPED | WINDOW | {"attn_logit_softcapping": 5.0}),
    ("gemma3_text", GROUPED | WINDOW),
    ("gpt2", {}),
]


def weights(lm: LanguageModel, inputs: dict[str, torch.Tensor], target: int) -> torch.Tensor:
    """A * dL/dA (layer, head, query, key) of the eager model, by autograd (in float32: transformers' eager softmax is,
    and what it masks in float64 is then infinite)."""
    model = copy.deepcopy(lm.model)
    model.set_attn_implementation("eager")
    output = model(**inputs, output_attentions=True, use_cache=False)
    for p in output.attentions:
        p.retain_grad()
    last = int(inputs["attention_mask"][0].nonzero()[-1])
    (-output.logits[0, last].log_softmax(-1)[target]).backward()
    return torch.stack([(p * p.grad)[0].detach() for p in output.attentions])


@pytest.mark.parametrize("padding", [0, 3, -3])
@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_every_sum_is_autograds_through_eager_attention(
    tiny: Any, kind: str, changes: dict[str, Any], padding: int
) -> None:
    lm = tiny(kind, **changes)
    ids = lm.encode(TEXT)["input_ids"]
    mask = torch.ones_like(ids)
    pads = (padding, 0) if padding > 0 else (0, -padding)
    inputs = {n: torch.nn.functional.pad(x, pads) for n, x in (("input_ids", ids), ("attention_mask", mask))}
    if kind == "gpt2":  # positions are given: transformers does not shift them for left padding by itself
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    real = inputs["attention_mask"][0].bool()
    w = weights(lm, inputs, 7)[:, :, real][..., real].numpy()
    found = attention_saliency(lm, inputs, 7, spans={"some": (1, 4), "rest": (4, OPEN)})
    # two float32 passes: weights and slopes with relative errors of some 1e-5, sums of 12
    near = {"rtol": 1e-3, "atol": 1e-4 * np.abs(w).max()}
    np.testing.assert_allclose(found.keys, np.abs(w).sum(2), **near)
    np.testing.assert_allclose(found.signed_keys, w.sum(2), **near)
    np.testing.assert_allclose(found.row, np.abs(w[:, :, -1]), **near)
    np.testing.assert_allclose(found.spans[..., 0], np.abs(w[..., 1:4]).sum((2, 3)), **near)
    np.testing.assert_allclose(found.signed_spans[..., 1], w[..., 4:].sum((2, 3)), **near)
    mean = np.abs(w[:, :, -1]).mean(1)
    np.testing.assert_allclose(found.normalised(), mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-3)
    flow = information_flow(lm, inputs, 7, source=(0, 5), into=(5, 10))
    np.testing.assert_allclose(flow.by_key, np.abs(w.sum(1))[:, 5:10, :5].sum(1), **near)


def test_scores_of_a_span_and_what_is_refused(tiny: Any) -> None:
    lm = tiny("llama", **GROUPED)
    found = saliency_scores(lm, [TEXT, "w1 w2 w3"], [7, None], (1, 3), progress=False)
    for trial, (text, target) in enumerate([(TEXT, 7), ("w1 w2 w3", None)]):
        row = attention_saliency(lm, text, target).row[..., 1:3].mean(-1)
        np.testing.assert_allclose(found.trials[trial], row, rtol=1e-5)
    assert found.details[0]["target"] == 7 and found.details[1]["loss"] > 0
    assert len(attention_saliency(lm, TEXT, 7, spans={"a": (0, 2)}, layers=[1]).to_frame()) == 4
    with pytest.raises(HeadscopeError, match="one example at a time"):
        attention_saliency(lm, lm.encode([TEXT, TEXT]), 7)
    with published_spans({"image": (0, 4), "instruction": (4, 9)}):
        assert information_flow(lm, TEXT, 7).grid(2, 2).shape == (2, 2, 2)
        with pytest.raises(HeadscopeError, match="no grid"):
            information_flow(lm, TEXT, 7).grid(3, 2)
    with pytest.raises(HeadscopeError, match="must hold tokens"):
        information_flow(lm, TEXT, 7, source=(50, 60), into=(0, 2))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
    assert all(p.requires_grad and p.grad is None for p in lm.model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_integrated_attention_sums_to_what_the_layers_attention_changes(tiny: Any, kind: str) -> None:
    """Completeness: a layer's heads sum to F(A) - F(0), A = 0 made by a plain hook that zeroes what W_O is given."""
    lm = tiny(kind, **GROUPED)
    found = integrated_attention(lm, [TEXT], [7], steps=200, progress=False)
    inputs = lm.encode(TEXT)
    with torch.no_grad():
        whole = float(lm.model(**inputs).logits[0, -1].softmax(-1)[7])
    for layer, block in enumerate(lm.model.model.layers):
        hook = block.self_attn.o_proj.register_forward_pre_hook(lambda m, a: (torch.zeros_like(a[0]),))
        with torch.no_grad():
            without = float(lm.model(**inputs).logits[0, -1].softmax(-1)[7])
        hook.remove()
        # the midpoint rule leaves an error of some F'' / (24 steps^2), which a norm after attention makes large near 0
        assert found.trials[0, layer].sum() == pytest.approx(whole - without, abs=2e-3)
    one = integrated_attention(lm, [TEXT], [7], steps=2, layers=[1], progress=False)
    assert np.isnan(one.trials[0, 0]).all() and not np.isnan(one.trials[0, 1]).any()


class Largest(TorchDispatchMode):
    """The most numbers that any tensor held that was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                held = x.untyped_storage().nbytes() // max(1, x.element_size())
                self.numbers = max(self.numbers, held)
        return out


def test_a_softcap_makes_no_map_either(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,024 tokens, of which a map of four heads would hold 4.2 million numbers, in pieces of a sixteenth of that."""
    monkeypatch.setattr(backward, "HELD", 1 << 18)
    lm = tiny("gemma2", **GROUPED, sliding_window=64, attn_logit_softcapping=5.0, max_position_embeddings=1024)
    ids = torch.randint(0, 24, (1, 1024), generator=torch.Generator().manual_seed(0))
    attention_saliency(lm, {"input_ids": ids[:, :32]}, 7)
    with Largest() as seen:
        found = attention_saliency(lm, {"input_ids": ids}, 7)
    assert np.isfinite(found.keys).all() and found.keys.max() > 0
    assert seen.numbers <= 1 << 19  # tiles of the saliency itself hold 400,000


@pytest.mark.slow
def test_at_8192_tokens_no_tensor_is_a_map(tiny: Any) -> None:
    length = 8192
    lm = tiny("llama", num_key_value_heads=2, head_dim=8, max_position_embeddings=length)
    ids = torch.randint(0, 24, (1, length), generator=torch.Generator().manual_seed(0))
    attention_saliency(lm, {"input_ids": ids[:, :32]}, 7)  # what verification makes of its own is not counted
    with Largest() as seen:
        found = attention_saliency(lm, {"input_ids": ids}, 7, spans={"first": (0, 4096)})
    assert np.isfinite(found.keys).all() and found.spans.min() > 0  # in layer 0 every row has a gradient
    assert seen.numbers <= length * 64  # 8,192 x 8,192 would be 128 times as many
