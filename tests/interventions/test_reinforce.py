"""Reinforced heads against the algorithm done by hand with PyTorch hooks on both prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.vision import VisionPrompt
from headscope.interventions.outputs.reinforce import reinforced_heads

HEADS, D_HEAD = 4, 8
IDS = torch.randint(2, 64, (1, 10), generator=torch.Generator().manual_seed(4))
PROMPT = VisionPrompt({"input_ids": IDS}, {"image": [[(2, 6)]]})


def z_of(model: Any, ids: Tensor, scaled: dict[int, list[int]], factor: float) -> list[np.ndarray]:
    """z (head, d_head) of every layer at the last position, the heads of ``scaled`` multiplied after they are read."""
    found: list[np.ndarray] = []
    hooks = []
    for layer, block in enumerate(model.model.layers):

        def hook(_: Any, args: tuple[Tensor, ...], layer: int = layer) -> tuple[Tensor, ...]:
            z = args[0].clone().view(1, -1, HEADS, D_HEAD)
            found.append(z[0, -1].double().numpy().copy())
            z[:, :, scaled.get(layer, [])] *= factor
            return (z.flatten(2),)

        hooks.append(block.self_attn.o_proj.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(ids)
    for one in hooks:
        one.remove()
    return found


@pytest.mark.parametrize("text_stream", ["reinforced", "plain"])
def test_layer_by_layer_on_both_prompts(llama: LanguageModel, text_stream: Any) -> None:
    rest, chosen = torch.cat([IDS[:, :2], IDS[:, 6:]], 1), {}
    for layer in (0, 1):
        whole = z_of(llama.model, IDS, chosen, 3.0)[layer]
        alone = z_of(llama.model, rest, chosen if text_stream == "reinforced" else {}, 3.0)[layer]
        moved, size = np.linalg.norm(whole - alone, axis=-1), (alone**2).sum(-1)
        out = (moved > moved.mean() + moved.std(ddof=1)) & (size > size.mean() + size.std(ddof=1))
        moved[out] = 0.0
        chosen[layer] = np.flatnonzero(moved > np.median(moved)).tolist()
    found = reinforced_heads(llama, PROMPT, layers=(0, 1), factor=3.0, text_stream=text_stream)
    assert found.heads.by_layer() == chosen and found.factor == 3.0


def test_which_layers_and_what_is_refused(llama: LanguageModel) -> None:
    """The second of two layers is also among the last 14 of 32."""
    assert set(reinforced_heads(llama, PROMPT).heads.by_layer()) == {1}
    with pytest.raises(HeadscopeError, match="no span is called 'picture'"):
        reinforced_heads(llama, PROMPT, span="picture")
    with pytest.raises(HeadscopeError, match="are not among 0-1"):
        reinforced_heads(llama, PROMPT, layers=(7,))
