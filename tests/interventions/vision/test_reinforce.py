"""VHR on a tiny LLaVA against its algorithm: two streams advanced layer by layer, by hand and in float64.

Tolerance: as for every edit, 1e-5 of the largest logit (float32 sums in another order); a wrong head moves percents.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from headscope.interp.models.language_model import LanguageModel
from headscope.interp.prompts.vision import VisionPrompt
from headscope.interp.sites import verify_once
from headscope.interventions import ReinforceHeads, apply
from headscope.interventions.outputs.reinforce import reinforced_heads
from headscope.interventions.prompts import Prompts


def two_streams(model: Any, prompt: VisionPrompt, layers: list[int], factor: float, plain: bool) -> dict[int, Tensor]:
    """Algorithm 1, one layer of both streams after the other, with dense attention: the heads of each layer."""
    language = copy.deepcopy(model.model.language_model).double()
    ids = prompt.inputs["input_ids"][0]
    with torch.no_grad():
        images = model.model.get_image_features(pixel_values=prompt.inputs["pixel_values"]).pooler_output
        x = model.get_input_embeddings()(ids).double()
        x[ids == model.config.image_token_id] = torch.cat(list(images)).double()
        streams, chosen = [x, x[ids != model.config.image_token_id]], {}
        for layer, block in enumerate(language.layers):
            each = [_z(language, block, x) for x in streams]
            if layer in layers:
                moved = (each[0][:, -1] - each[1][:, -1]).norm(dim=-1)
                size = each[1][:, -1].square().sum(-1)
                out = (moved > moved.mean() + moved.std()) & (size > size.mean() + size.std())
                moved[out] = 0.0
                held = moved > np.median(moved)
                chosen[layer] = held
                for stream in (0,) if plain else (0, 1):
                    each[stream][held] *= factor
            for i, z in enumerate(each):
                x = streams[i] + block.self_attn.o_proj(z.transpose(0, 1).flatten(1))
                streams[i] = x + block.mlp(block.post_attention_layernorm(x))
    return chosen


def _z(language: Any, block: Any, x: Tensor) -> Tensor:
    """The heads' outputs (head, position, d_head) of dense causal attention."""
    h, n = block.input_layernorm(x), len(x)
    attention = block.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (one(h).view(1, n, -1, attention.head_dim).transpose(1, 2) for one in projections)
    q, k = apply_rotary_pos_emb(q, k, *language.rotary_emb(x[None], torch.arange(n)[None]))
    k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
    scores = (q @ k.transpose(2, 3) * attention.scaling).masked_fill(
        ~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf
    )
    return (scores.softmax(-1) @ v)[0]


@pytest.mark.parametrize("stream", ["reinforced", "plain"])
def test_a_joint_pass_is_the_algorithm(
    vlm: LanguageModel, batch: VisionPrompt, singles: list[VisionPrompt], generated: Any, stream: Any
) -> None:
    """Each chat of a padded batch has the heads of the loop over its own two streams, and they are scaled from the
    prompt on, in every cached step; nothing else changes."""
    layers, factor, passes = [0, 2], 3.0, list[int]()
    verify_once(vlm)
    hook = vlm.model.register_forward_hook(lambda *_: passes.append(1))
    with apply(vlm, ReinforceHeads(layers=layers, factor=factor, text_stream=stream)):
        tokens, found = generated(batch)
    hook.remove()
    assert len(passes) == found.shape[1] + 1, "one joint pass for all layers"
    sets = []
    for i, prompt in enumerate(singles):
        chosen = two_streams(vlm.model, prompt, layers, factor, stream == "plain")
        sets.append({(layer, int(h)) for layer, mine in chosen.items() for h in mine.nonzero()})
        own = reinforced_heads(vlm, prompt, layers=layers, factor=factor, text_stream=stream)
        assert set(own.heads) == sets[-1] and len(sets[-1]) == 2 * vlm.info.heads // 2
        with apply(vlm, own):
            alone_tokens, alone = generated(prompt)
        scale = float(alone.abs().max())
        assert alone_tokens[0].tolist() == tokens[i].tolist()
        assert float((alone[0] - found[i]).abs().max()) <= 1e-5 * scale
        assert float((generated(prompt)[1][0, 0] - alone[0, 0]).abs().max()) > 1e-3 * scale
    assert sets[0] != sets[1], "each prompt has heads of its own"


def test_the_control_draws_as_many_heads_of_the_same_layers(
    vlm: LanguageModel, batch: VisionPrompt, generated: Any
) -> None:
    edit = ReinforceHeads(layers=(0, 1, 2))
    drawn = [edit.with_random_choice(seed) for seed in range(3)]
    assert edit.chooses and not drawn[0].chooses
    results = []
    for one in (edit, *drawn):
        held = one.in_force(vlm, None)
        with apply(vlm, one):
            results.append(generated(batch)[1][:, 0])
        with batch.published():
            held.read(vlm, Prompts.of(vlm, batch.inputs, "test"))
        assert [mine.sum(-1).tolist() for mine in held.chosen.values()] == [[2, 2]] * 3
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
