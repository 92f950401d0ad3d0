"""Anchored bias: heads, MLPs and neurons that favour an anchor token over the right answer, read by a lens of each
alone, and the vector that turns such a neuron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.models import load_model
from headscope.interp.models.unembedding import final_modules
from headscope.interp.results.scores import HeadScores
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites import attached
from headscope.interp.sites.given import Loadable
from headscope.interp.sites.gradients import frozen
from headscope.interp.sites.layout import stream_layers
from headscope.interp.sites.neurons import down_projection, value_vectors
from headscope.interp.sites.sizes import tower_size
from headscope.probes.lenses.attribution import read_last
from headscope.probes.lenses.neurons import Neurons
from headscope.probes.lenses.targets import Token, target_pairs, token_ids, unembedded
from headscope.probes.paths.norms import FrozenNorm
from headscope.probes.paths.rows import wrote
from headscope.probes.paths.writers import find_paths


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


@dataclass(frozen=True, eq=False)
class AnchorLens:
    """How far each part alone favours the anchor: ``mlps`` (prompt, layer) in logits, and ``heads`` as scores."""

    mlps: NDArray[np.float64]
    heads: HeadScores


def anchor_lens(
    model: Loadable, prompts: Sequence[str], anchors: Sequence[Token], answers: Sequence[Token]
) -> AnchorLens:
    """The logit lens of what each head and each MLP writes at the last token, anchor's logit minus the answer's.

    Li & Gao 2024 (arXiv 2405.03205): the final norm acts on the part itself, with the scale that this gives it, not the
    stream's (``logit_attribution`` uses that, and sums). For heads the paper's code is not published: the same lens of
    W_O z without bias [OURS]. Layers late and large are the candidates for ``anchored_neurons`` and ``SwapKeys``.

    What it does not show: shares of anything: a part that writes little has as large a lens as one that writes much.

    Raises:
        HeadscopeError: as ``logit_attribution``.
    """
    lm = load_model(model)
    pairs = target_pairs(lm, prompts, anchors, answers)
    paths = find_paths(lm)
    mlps = np.full((len(prompts), len(paths.layers)), np.nan)
    heads = np.full((*mlps.shape, max(path.heads for path in paths.layers)), np.nan)
    with frozen(lm), torch.no_grad():
        for i, prompt in enumerate(prompts):
            found, (u, _) = read_last(lm, paths, [prompt]), unembedded(paths, [pairs[i]])

            def gap(x: Tensor, u: Tensor = u) -> NDArray[np.float64]:
                said: Tensor = paths.norm(x.to(lm.model.dtype))
                return (said.to(u) * u).sum(-1).double().cpu().numpy()

            for at, path in enumerate(paths.layers):
                if path.mlp is not None:
                    mlps[i, at] = gap(found.mlp[path.layer][0])[0]
                if path.attention is not None:
                    heads[i, at, : path.heads] = gap(wrote(path, found, 0)[0][0])
    made = provenance(lm, prompts=prompts, tokens=pairs) | {"unit": "logits"}
    return AnchorLens(mlps, HeadScores("anchor_lens", heads, made))


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
    pair = torch.tensor(token_ids(lm, (anchor, answer)), device=lm.device)
    seen = Neurons()
    with attached(lm, seen):
        lm(prompt)
    centred = FrozenNorm.of(norm, torch.zeros(1, lm.info.d_model, device=lm.device, dtype=lm.model.dtype)).centres
    found: list[AnchoredNeuron] = []
    for layer in reversed(stream_layers(lm.inner, tower_size(lm).tower)):
        projection = down_projection(layer, lm.inner)
        v, m = value_vectors(projection), seen.m[layer.layer][0]
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
    anchor_id, answer_id = token_ids(lm, (anchor, answer))
    weight = head.weight
    assert isinstance(weight, Tensor)
    u = weight.detach().float()
    gain = FrozenNorm.of(norm, torch.zeros(1, lm.info.d_model, device=lm.device, dtype=lm.model.dtype)).gain
    u = (u[[anchor_id, answer_id]] - u.mean(0)) * gain.to(u.device)
    return (more * u[1] - less * u[0]).cpu()
