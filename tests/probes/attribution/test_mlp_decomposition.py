"""Planted weights come back; what is not linear in the heads is said to be unexplained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.probes.attribution.mlp_decomposition import mlp_decomposition
from headscope.probes.paths.writers import find_paths


def prompts(count: int) -> list[str]:
    drawn = np.random.default_rng(0).integers(0, 22, (count, 6))
    return [" ".join(f"w{i}" for i in row) for row in drawn]


def test_planted_weights_and_functions_come_back(tiny: Any) -> None:
    """A hook makes the MLP's output -0.8 of head 0, +0.5 of head 2, 0.1 of the stream, and a task's vector."""
    lm: LanguageModel = tiny("llama", num_key_value_heads=2, head_dim=8)
    find_paths(lm)
    planted, function = torch.tensor([-0.8, 0.0, 0.5, 0.0]), torch.randn(2, 32)
    block, seen = lm.model.model.layers[1], {}

    def replace(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        w = block.self_attn.o_proj.weight.view(32, 4, 8)
        heads = torch.einsum("mhd,bqhd->bqhm", w, seen["z"].unflatten(-1, (4, 8)))
        task = 0 if seen["ids"] % 2 else 1
        return torch.einsum("h,bqhm->bqm", planted, heads) + 0.1 * seen["stream"] + function[task]

    hooks = [
        lm.model.register_forward_pre_hook(
            lambda m, a, k: seen.update(ids=int(k["input_ids"][0, -1])), with_kwargs=True
        ),
        block.register_forward_pre_hook(lambda m, a: seen.update(stream=a[0])),
        block.self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.update(z=a[0])),
        block.mlp.register_forward_hook(replace),
    ]
    texts = prompts(24)
    tasks = ["odd" if int(lm.encode(text)["input_ids"][0, -1]) % 2 else "even" for text in texts]
    found = mlp_decomposition(lm, texts, 1, tasks, resamples=50)
    for hook in hooks:
        hook.remove()
    np.testing.assert_allclose(found.weights, [-0.8, 0.0, 0.5, 0.0, 0.1], atol=1e-5)  # float32 outputs, exact model
    assert found.r2 == pytest.approx(1.0, abs=1e-6)
    order = [0 if task == "odd" else 1 for task in found.tasks]
    np.testing.assert_allclose(found.function, function[order].numpy(), atol=1e-4)
    assert ((found.low - 1e-5 <= found.weights) & (found.weights <= found.high + 1e-5)).all()
    assert found.to_frame()["part"].tolist() == ["H0", "H1", "H2", "H3", "stream"]


def test_a_real_mlp_is_explained_in_part_and_bad_tasks_are_refused(tiny: Any) -> None:
    lm = tiny("gemma2", num_key_value_heads=2, head_dim=8)
    found = mlp_decomposition(lm, prompts(12), 0, resamples=20)
    assert 0 < found.r2 < 0.9 and (found.low < found.high).all()
    with pytest.raises(HeadscopeError, match="two prompts or more"):
        mlp_decomposition(lm, prompts(3), 0, ["a", "a", "b"])
    with pytest.raises(HeadscopeError, match="layer 5 does not exist"):
        mlp_decomposition(lm, prompts(3), 5)
