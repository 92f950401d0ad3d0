"""Neurons that favour an anchor token over the right answer, and the vector that turns them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headscope.interp.attention.handler import Handler
from headscope.interp.attention.stream import StreamCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.models.unembedding import final_modules
from headscope.interp.sites import attached
from headscope.interp.sites.given import Loadable
from headscope.interp.sites.layout import stream_layers
from headscope.interp.sites.neurons import down_projection, value_vectors
from headscope.interp.sites.sizes import tower_size

Token = str | int


@dataclass(frozen=True)
class AnchoredNeuron:
    """A neuron that writes towards the anchor: ``activation`` m at the prompt's last token, ``size`` |m| |v|, and
    ``gap``, the anchor's logit minus the answer's of what it writes alone. With ``activation`` below 0 an added vector
    pushes the other way."""

    layer: int
    neuron: int
    activation: float
    size: float
    gap: float


def anchored_neurons(
    model: Loadable, prompt: str, anchor: Token, answer: Token, *, top: int = 10, gap: float = 4.0
) -> list[AnchoredNeuron]:
    """The neurons of Li & Gao 2024 (arXiv 2405.03205) for one prompt: in every layer the ``top`` of the largest |m| |v|
    at the last token, of which those stay whose writing by itself favours the anchor by more than ``gap`` logits.

    A neuron's logits are those of norm(m v + b): the final norm acts on what it writes with its own scale, and the
    projection's whole bias b is added to each, as in the authors' notebook. They fold the norm's gain and centre what
    is written; a gap of two logits is the same unfolded, and |v| here is of the centred vector where the norm centres.

    Args:
        model: load_model's result, or what it takes.
        prompt: read at its last token.
        anchor, answer: one token each, an id or a string (mind its leading space).
        top, gap: 10 and 4 of the notebook, for GPT-2 small.

    Returns:
        Last layer first, as the authors try them one layer at a time (the first neuron of a layer alone), and in a
        layer the largest first. None where no neuron passes.

    Raises:
        HeadscopeError: a token that is several; no single norm before the unembedding; a mixture of experts, or
            quantized value vectors.
    """
    lm = load_model(model)
    norm, head = final_modules(lm)
    pair = torch.tensor(_ids(lm, (anchor, answer)), device=lm.device)
    seen = _Activations()
    with attached(lm, seen):
        lm(prompt)
    centred = _centres(norm, lm)
    found: list[AnchoredNeuron] = []
    for layer in reversed(stream_layers(lm.inner, tower_size(lm).tower)):
        projection = down_projection(layer, lm.inner)
        v, m = value_vectors(projection), seen.at[layer.layer]
        length = (v - v.mean(-1, keepdim=True) if centred else v).float().norm(dim=-1)
        size, index = (m.float().abs() * length).topk(min(top, len(m)))
        with torch.no_grad():
            written = m[index, None] * v[index]
            bias = getattr(projection, "bias", None)
            logits = head(norm(written if bias is None else written + bias))[:, pair].float()
        apart = (logits[:, 0] - logits[:, 1]).tolist()
        rows = zip(index.tolist(), m[index].tolist(), size.tolist(), apart, strict=True)
        found += [AnchoredNeuron(layer.layer, n, x, s, by) for n, x, s, by in rows if by > gap]
    return found


def away_from_anchor(model: Loadable, anchor: Token, answer: Token, *, less: float = 1.0, more: float = 8.0) -> Tensor:
    """What the authors add to a value vector: - ``less`` u[anchor] + ``more`` u[answer], (d_model,), float32.

    u are rows of the unembedding with the final norm's gain folded in, and the mean over the vocabulary taken away,
    which is where their 1 and 8 hold (for GPT-2 small); ``EditValueVectors(neurons, add=...)`` takes it.

    Raises:
        HeadscopeError: a token that is several, or no single norm before the unembedding.
    """
    lm = load_model(model)
    norm, head = final_modules(lm)
    anchor_id, answer_id = _ids(lm, (anchor, answer))
    weight = head.weight
    assert isinstance(weight, Tensor)
    u = weight.detach().float()
    u = (u[[anchor_id, answer_id]] - u.mean(0)) * _gain(norm, lm)
    return (more * u[1] - less * u[0]).cpu()


class _Activations(Handler):
    """The neurons' activations at the last token of a prompt, by layer."""

    streams = ("mlp_post",)
    only_reads = True

    def __init__(self) -> None:
        self.at: dict[int, Tensor] = {}

    def stream(self, call: StreamCall) -> Tensor:
        self.at[call.layer] = call.x[0, -1].detach()
        return call.x


def _gain(norm: nn.Module, lm: LanguageModel) -> Tensor:
    """The norm's factor on every dimension (d_model,), read off a vector of mean 0 and of +-1, large beside epsilon."""
    width = lm.info.d_model
    signs = torch.ones(width, device=lm.device)
    signs[1::2] = -1.0
    with torch.no_grad():
        weight = next(norm.parameters(), signs)
        up, down = (norm((x * 1e3 * signs).to(weight.dtype)).float() for x in (1.0, -1.0))
    gain: Tensor = (up - down) / 2 * signs
    return gain


def _centres(norm: nn.Module, lm: LanguageModel) -> bool:
    """Whether it takes the mean away: all-equal dimensions then come out as its shift alone."""
    with torch.no_grad():
        weight = next(norm.parameters(), torch.ones(1, device=lm.device))
        flat = torch.full((lm.info.d_model,), 1e3, device=lm.device, dtype=weight.dtype)
        apart = norm(flat) - norm(-flat)
    return bool(apart.float().abs().max() < 1e-3)


def _ids(lm: LanguageModel, tokens: Sequence[Token]) -> list[int]:
    found = []
    for token in tokens:
        ids = [token] if isinstance(token, int) else lm.required_tokenizer()(token, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise HeadscopeError(f"{token!r} is {len(ids)} tokens of {lm.name}: name one token, or give its id")
        found.append(int(ids[0]))
    return found
