"""Dense references of models that read pictures: patterns, outputs and streams of the untouched model in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from headscope.interp.prompts.look import look
from headscope.interp.prompts.vision_data import ask


@pytest.fixture(scope="session")
def dense() -> Any:
    return _dense


@pytest.fixture(scope="session")
def read(seeing, picture) -> Any:
    """A chat as a model reads it, and what the untouched model computes of it."""
    boxes = {"thing": (16.0, 4.0, 40.0, 36.0)}
    one = look(seeing, ask(picture(0), "What is it?", system="Be brief.", boxes=boxes))
    return one, _dense(seeing, one.prompt.inputs)


def _dense(lm: Any, inputs: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """``pattern`` (layer, head, query, key), ``z`` (layer, head, query, d_head), ``stream`` (layer, position, d_model):
    what enters each layer, from plain hooks."""
    model = copy.deepcopy(lm.inner).double()
    model.set_attn_implementation("eager")
    layers = next(
        m for name, m in model.named_modules() if name.endswith(("language_model.layers", "text_model.layers"))
    )
    z, stream = [], []
    for layer in layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: z.append(args[0][0].detach()))
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: stream.append((args[0] if args else kwargs["hidden_states"])[0].detach()),
            with_kwargs=True,
        )
    given = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    with torch.no_grad():
        patterns = model(**given, output_attentions=True, use_cache=False).attentions
    heads = patterns[0].shape[1]
    return {
        "pattern": torch.cat(patterns).numpy(),
        "z": torch.stack([one.view(len(one), heads, -1).transpose(0, 1) for one in z]).numpy(),
        "stream": torch.stack(stream).numpy(),
    }
