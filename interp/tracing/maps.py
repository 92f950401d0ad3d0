"""Explicit attention maps of chosen heads on a chosen prompt: the only place that hands out a whole pattern."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.attention.parts import one_head
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.results.headset import HeadSet
from headscope.interp.sites import attached
from headscope.interp.sites.given import Loadable
from headscope.interp.sites.sizes import tower_size
from headscope.kernels.request import Reduced, Request

LIMIT_MIB = 1024.0


class _Maps(Handler):
    def __init__(self, layers: dict[int, list[int] | None]) -> None:
        self.layers = layers
        self.found: dict[int, torch.Tensor] = {}

    def request(self, call: AttentionCall) -> Request | None:
        return Request(lse=True, query_rows=torch.arange(0))

    def observe(self, call: AttentionCall, reduced: Reduced) -> None:
        heads = self.layers[call.layer]
        if heads is None:
            self.found[call.layer] = call.pattern()[0].cpu()
            return
        rows = [one_head(call, head).pattern()[0, 0].cpu() for head in heads]
        self.found[call.layer] = torch.stack(rows)


def patterns(
    lm: Loadable, prompt: str, *, layer: int | None = None, limit_mib: float = LIMIT_MIB
) -> tuple[NDArray[np.float32], list[str]]:
    """Attention maps of one layer (head, query, key), or of all layers (layer, head, query, key), and the tokens.

    ``lm``: load_model's result, or what load_model takes. Layers without softmax attention are NaN among all layers,
    and refused by themselves.

    Raises:
        HeadscopeError: the maps would take more than ``limit_mib`` MiB (said before anything is allocated), a layer
            that does not exist or does not attend, or layers that differ in their number of heads.
    """
    lm = load_model(lm)
    tokens, size = tokens_of(lm, prompt), tower_size(lm)
    size.check_layers([] if layer is None else [layer])
    layers = list(size.heads) if layer is None else [layer]
    count = size.depth if layer is None else 1
    need = count * (size.most_heads or lm.info.heads) * len(tokens) ** 2 * 4 / 2**20
    if need > limit_mib:
        raise HeadscopeError(
            f"these maps take {need:.0f} MiB, more than the limit of {limit_mib:.0f}: ask for one head with "
            "head_pattern, record statistics instead, or raise limit_mib"
        )
    found = _run(lm, prompt, dict.fromkeys(layers))
    if layer is not None:
        return found[layer], tokens
    shapes = {pattern.shape for pattern in found.values()}
    if len(shapes) != 1:
        raise HeadscopeError(f"the layers of {lm.name} differ in their number of heads; ask for one with layer=...")
    stacked = np.full((size.depth, *shapes.pop()), np.nan, dtype=np.float32)
    for index, pattern in found.items():
        stacked[index] = pattern
    return stacked, tokens


def head_pattern(lm: Loadable, prompt: str, layer: int, head: int) -> tuple[NDArray[np.float32], list[str]]:
    """One head's pattern (query, key) on a prompt, and the prompt's tokens as text; ``lm`` as for ``patterns``.

    Raises:
        HeadscopeError: a head that does not exist, a layer that does not attend, or a prompt whose map would pass the
            limit of ``patterns``.
    """
    lm = load_model(lm)
    size = tower_size(lm)
    HeadSet(((layer, head),)).check(size.depth, size.heads.get(layer) or size.most_heads or lm.info.heads)
    size.check_layers([layer])
    tokens = tokens_of(lm, prompt)
    need = len(tokens) ** 2 * 4 / 2**20
    if need > LIMIT_MIB:
        raise HeadscopeError(f"one map of {len(tokens)} tokens takes {need:.0f} MiB; draw plots.head_on_prompt")
    return _run(lm, prompt, {layer: [head]})[layer][0], tokens


def tokens_of(lm: LanguageModel, prompt: str) -> list[str]:
    """A prompt's tokens as the tokenizer spells them."""
    ids = lm.encode([prompt])["input_ids"][0].tolist()
    return [str(token) for token in lm.tokenizer.convert_ids_to_tokens(ids)]


def _run(lm: LanguageModel, prompt: str, layers: dict[int, list[int] | None]) -> dict[int, NDArray[np.float32]]:
    handler = _Maps(layers)
    with attached(lm, handler, layers=list(layers)):
        lm([prompt])
    silent = sorted(set(layers) - set(handler.found))
    if silent:
        raise HeadscopeError(
            f"layers {', '.join(map(str, silent))} make no softmax attention, so they have no map: ask for a layer "
            "that does with layer=..."
        )
    return {layer: pattern.numpy() for layer, pattern in handler.found.items()}
