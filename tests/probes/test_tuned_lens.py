"""A tuned lens begins as the logit lens, learns a planted change of basis, and is saved as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts import load_haystack
from headscope.probes.lenses.logit_lens import logit_lens
from headscope.probes.lenses.tuned_lens import TunedLens, fit_tuned_lens


def texts(count: int) -> list[str]:
    drawn = np.random.default_rng(0).integers(0, 22, (count, 30))
    return [" ".join(f"w{i}" for i in row) for row in drawn]


def test_it_learns_what_a_linear_last_layer_does(tiny: Any, tmp_path: Path) -> None:
    """The last layer adds a constant and nothing else: an affine lens can say it all."""
    lm = tiny("gpt2")
    block = lm.model.transformer.h[1]
    with torch.no_grad():
        block.attn.c_proj.weight.zero_()
        block.attn.c_proj.bias.zero_()
        block.mlp.c_proj.weight.zero_()
        block.mlp.c_proj.bias.normal_(0.0, 3.0)
    found = fit_tuned_lens(lm, texts(8), depths=[1], steps=300, rate=3e-2, progress=False)
    assert found.kl_before[0] > 0.1 and found.kl_after[0] < 0.05 * found.kl_before[0]
    loaded = TunedLens.load(found.save(tmp_path / "lens.safetensors"))
    np.testing.assert_array_equal(loaded.weight, found.weight)
    one = loaded.read(lm, texts(9)[-1], "w3")
    plain = logit_lens(lm, texts(9)[-1], "w3")
    assert one.kl[1].mean() < 0.2 * plain.kl[1].mean()
    np.testing.assert_array_equal(one.kl[0], plain.kl[0])  # no translator there
    assert not one.kl[2].any()


def test_without_a_step_it_is_the_logit_lens_and_bad_input_is_refused(tiny: Any, tmp_path: Path) -> None:
    lm = tiny("llama")
    found = fit_tuned_lens(lm, texts(2), steps=1, rate=0.0, progress=False)
    np.testing.assert_array_equal(found.kl_before, found.kl_after)
    np.testing.assert_allclose(found.read(lm, "w1 w2 w3").kl, logit_lens(lm, "w1 w2 w3").kl, atol=1e-6)
    assert all(p.requires_grad and p.grad is None for p in lm.model.parameters())
    with pytest.raises(HeadscopeError, match="another model"):
        found.read(tiny("llama", hidden_size=64), "w1 w2")
    with pytest.raises(HeadscopeError, match="depths are 0 to 1"):
        fit_tuned_lens(lm, texts(2), depths=[2])
    with pytest.raises(HeadscopeError, match="too few"):
        fit_tuned_lens(lm, ["w1"])
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(HeadscopeError, match="cannot be read"):
        TunedLens.load(tmp_path / "other")


@pytest.mark.slow
def test_on_smollm2_it_is_nearer_to_the_model_than_the_logit_lens(smollm2: LanguageModel) -> None:
    prose = load_haystack()[:2000]
    found = fit_tuned_lens(smollm2, [prose], depths=[15], steps=20, batch=32, progress=False)
    assert found.kl_after[0] < 0.8 * found.kl_before[0]
