"""Direct logit attribution inside MLPs: what each neuron's value vector writes towards a token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from headscope.interp.attention.handler import Handler
from headscope.interp.attention.stream import StreamCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.runs.provenance import provenance
from headscope.interp.sites import attached
from headscope.interp.sites.given import Loadable
from headscope.interp.sites.gradients import frozen
from headscope.interp.sites.neurons import down_projection
from headscope.probes.lenses.attribution import read_last
from headscope.probes.lenses.targets import Token, in_stream, target_pairs, unembedded
from headscope.probes.paths.norms import FrozenNorm
from headscope.probes.paths.writers import Paths, Writer, find_paths, norm_between, watching

Scale = Literal["stream", "own"]


@dataclass(frozen=True, eq=False)
class NeuronShares:
    """What MLP neurons write towards a token at a prompt's last position.

    Attributes:
        activations: (layer, neuron) m, what the MLP's last projection is given; NaN where a layer has fewer neurons.
        shares: (layer, neuron) in logits before a final softcap or factor.
        beside: (layer,) what the projection's bias and a norm's shift give; nan with ``scale="own"``, where shares do
            not sum to anything.
    """

    activations: NDArray[np.float32]
    shares: NDArray[np.float32]
    beside: NDArray[np.float64]
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_frame(self, top: int = 20) -> pd.DataFrame:
        """The ``top`` neurons of the largest |share|: layer, neuron, activation, share."""
        order = np.argsort(-np.abs(np.nan_to_num(self.shares)), axis=None, kind="stable")[:top]
        layer, neuron = np.unravel_index(order, self.shares.shape)
        at = (layer, neuron)
        columns = {"layer": layer, "neuron": neuron, "activation": self.activations[at], "share": self.shares[at]}
        return pd.DataFrame(columns)


def neuron_attribution(
    model: Loadable, text: str, target: Token, against: Token | None = None, *, scale: Scale = "stream"
) -> NeuronShares:
    """Each neuron's direct contribution m_i v_i to the logit of ``target`` (minus that of ``against``) after a text.

    m_i is what the MLP's last projection is given and v_i its column for the neuron (Geva et al. 2022, arXiv
    2203.14680). With ``scale="stream"`` norms have the scale that the whole of what they were given made it, and the
    neurons' shares and ``beside`` sum to the MLP's of ``logit_shares``. With ``scale="own"`` it is the lens of Li & Gao
    2024 (arXiv 2405.03205): the final norm acts on m_i v_i + b alone, with the scale that this gives it, and b, the
    projection's whole bias, is added to every neuron. They fold the norm's gain and centre what is written, which
    leaves a difference of two logits as it is. Works through adapters (LoRA) and quantized projections.

    What it does not show: what a neuron does through later layers; with ``"own"``, its share of anything.

    Raises:
        HeadscopeError: as ``logit_attribution``; a mixture of experts; ``"own"`` where a norm follows the MLP, or
            without ``against`` (the norm's shift would count in every neuron).
    """
    lm = load_model(model)
    pairs = target_pairs(lm, [text], [target], None if against is None else [against])
    if scale not in ("stream", "own") or (scale == "own" and against is None):
        raise HeadscopeError("neuron_attribution: scale is 'stream', or 'own' with a token to compare with (against)")
    paths = find_paths(lm)
    writers = neuron_writers(lm, paths)
    with frozen(lm):
        seen = Neurons()
        with attached(lm, seen):
            found = read_last(lm, paths, [text])
        u, _ = unembedded(paths, pairs)
        direction, _ = in_stream(paths, found, u)
        rows = [
            _in_stream(writers[layer], seen, layer, direction)
            if scale == "stream"
            else (*_own(writers[layer], seen.m[layer], paths.norm, u), np.nan)
            for layer in (path.layer for path in paths.layers)
        ]
    widest = max(len(m) for m, _, _ in rows)
    made = provenance(lm, prompts=[text], tokens=pairs[0], scale=scale) | {"unit": "logits"}
    full = [np.full((len(rows), widest), np.nan, np.float32) for _ in range(2)]
    for at, (m, share, _) in enumerate(rows):
        full[0][at, : len(m)], full[1][at, : len(m)] = m, share
    return NeuronShares(full[0], full[1], np.array([float(beside) for *_, beside in rows]), made)


class Neurons(Handler):
    """Keeps, of the last token of one text, neurons' activations and what their projection gave, by layer."""

    streams = ("mlp_post", "mlp_down")
    only_reads = True

    def __init__(self) -> None:
        self.m: dict[int, Tensor] = {}
        self.gave: dict[int, Tensor] = {}

    def stream(self, call: StreamCall) -> Tensor:
        held = self.m if call.place == "mlp_post" else self.gave
        held[call.layer] = call.x[:1, -1].detach()
        return call.x


def neuron_writers(lm: LanguageModel, paths: Paths) -> dict[int, Writer]:
    """Each layer's way from its neurons to the stream.

    Raises:
        HeadscopeError: a layer without such neurons, or whose MLP reaches the stream through something but a norm.
    """
    with watching(lm.inner) as seen, torch.no_grad():
        lm.inner(input_ids=torch.arange(1, 5, device=lm.device)[None] % lm.info.vocab_size)
    found = {}
    for path in paths.layers:
        down, norm = down_projection(path.stream, lm.inner), None
        wrote = None if path.mlp is None else seen[path.mlp][1]
        if wrote is None or not torch.equal(seen[down][1], wrote):
            norm = None if wrote is None else norm_between(seen[down][1], wrote, path.module, seen)
            if norm is None:
                raise HeadscopeError(
                    f"{lm.name}: layer {path.layer} does not add its MLP's output to the residual stream as it is or "
                    "through a norm, so its neurons have no direct share of the logits"
                )
        found[path.layer] = Writer(down, norm, lm.device)
    return found


def _in_stream(
    writer: Writer, seen: Neurons, layer: int, direction: Tensor
) -> tuple[NDArray[Any], NDArray[Any], float]:
    """Activations, shares (neuron,), and what is added beside them."""
    m, beside = seen.m[layer], 0.0
    if writer.norm is not None:
        x = seen.gave[layer][:, None]
        norm = FrozenNorm.of(writer.norm, x)
        beside = float((norm.shift.reshape(-1) * direction).sum())
        direction = norm.back(direction[:, None], norm.scale(x))[:, 0]
    back = writer.back(direction, m.shape[-1])
    beside += float((writer.bias(m.shape[-1]) * direction).sum())
    return m[0].float().cpu().numpy(), (m.to(back) * back)[0].float().cpu().numpy(), beside


def _own(writer: Writer, m: Tensor, norm: nn.Module, u: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Activations, and u . norm(m_i v_i + b) of every neuron (neuron,)."""
    if writer.norm is not None:
        raise HeadscopeError("scale='own' is not defined where a norm follows the MLP: use scale='stream'")
    shares = []
    with torch.no_grad():
        for part in torch.split(torch.arange(m.shape[-1], device=m.device), 256):
            alone = m.new_zeros(len(part), 1, m.shape[-1])
            alone[torch.arange(len(part)), 0, part] = m[0, part]
            shares.append((norm(writer.projection(alone)[:, 0]).to(u) * u).sum(-1))
    return m[0].float().cpu().numpy(), torch.cat(shares).float().cpu().numpy()
