"""Every edge of a pass to first order: what senders write, and what the answer makes of it at each place it is read.

A stream is a sum, so an edge is a product at every token: (what the sender would write instead) . dL/d(what the
receiver reads). The second is dL/dq pulled back from a head's queries to the stream before its layer, through that
layer's own norm, projection and rotation alone (k, v and MLPs alike); the first is pushed forward from the head's z to
the stream, through its output projection and any norm after it. Both are products with derivatives that autograd takes
of the model's own graph: no module is named and no norm is held still.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.sites.gradients import frozen
from headscope.interp.sites.layout import stream_layers
from headscope.interp.sites.sizes import tower_size
from headscope.interp.sites.unwrap import bare_model
from headscope.probes.patching.activation import numbers
from headscope.probes.patching.nodes import LOGITS
from headscope.probes.patching.pairs import Metric, Pairs, measure
from headscope.probes.patching.places import COMPONENTS, INPUTS, Place, Places, by_head, layers_of

EMBEDDING = "embedding"
WRITES = ("resid_pre", "z", "mlp_out")


@dataclass(eq=False)
class Edges:
    """``values`` (pair, sender, receiver), NaN where none is; ``base`` and ``other`` (pair,) the metric of the run that
    is patched and of the other."""

    senders: list[str]
    receivers: list[str]
    values: NDArray[np.float64]
    base: NDArray[np.float64]
    other: NDArray[np.float64]


class Live(Places):
    """Keeps what passes every site in the graph of the pass, as a value that a zero was added to (``leaves``), so that
    gradients there, and from there, can be asked for; every query head has keys and values of its own."""

    def __init__(self, mid: bool, entering: Tensor | None = None) -> None:
        super().__init__(keep=(*COMPONENTS, *WRITES, "attn_out", "resid_post", *(["resid_mid"] if mid else [])))
        self.entering = entering
        self.leaves: dict[Place, Tensor] = {}

    def edit(self, call: AttentionCall) -> AttentionCall:
        """Keep q, k and v."""
        return call.with_(**{INPUTS[site]: self._pass(site, call.layer, x) for site, x in by_head(call).items()})

    def _pass(self, site: str, layer: int, x: Tensor) -> Tensor:
        if site not in self.keep:
            return x
        if site == "resid_pre" and self.entering is not None and not self.leaves:
            x = self.entering.to(x)
        self.leaves[site, layer] = leaf = torch.zeros_like(x, requires_grad=True)
        self.kept[site, layer] = x + leaf
        return self.kept[site, layer]


def first_order(lm: LanguageModel, pairs: Pairs, where: Tensor, metric: Metric, steps: int) -> Edges:
    """Every edge of the clean run towards the corrupt one, at the tokens ``where``; gradients are means over ``steps``
    points between what enters the first layer in both."""
    size = tower_size(lm)
    mid = all(layer.in_turn for layer in stream_layers(bare_model(lm), size.tower))
    given = Places(keep=WRITES)
    other = numbers(measure(lm, pairs, pairs.corrupt, given, metric))[0]
    found: Edges | None = None
    written = start = end = torch.zeros(0)
    for step in range(steps):
        live = Live(mid, start + step / steps * (end - start) if step else None)
        with frozen(lm), torch.enable_grad():
            said = measure(lm, pairs, pairs.clean, live, metric, grad=True)[0]
            if found is None:
                first = layers_of(live.kept, "resid_pre")[0]
                start, end = live.kept["resid_pre", first].detach(), given.kept["resid_pre", first]
                names, written = _written(live, given.kept, where.to(said.device))
                found = Edges(names, [], np.zeros(0), numbers(said), other)
            receivers, blocks = [], []
            for named, slopes, before in _read(live, said):
                products = written[:, :before] @ slopes.transpose(0, 1).flatten(2).mT  # (pair, sender, receiver)
                missing = products.new_full((len(products), len(names) - before, len(named)), torch.nan)
                blocks.append(numbers(torch.cat([products, missing], 1)))
                receivers += named
        found.receivers = receivers
        found.values = found.values + np.concatenate(blocks, 2) / steps if step else np.concatenate(blocks, 2) / steps
    assert found is not None
    return found


def _written(live: Live, given: Mapping[Place, Tensor], where: Tensor) -> tuple[list[str], Tensor]:
    """Senders in the order of the pass, the embedding, then heads and the MLP of each layer, and what they would write
    instead at the tokens ``where``: (pair, sender, token x d_model)."""
    own = live.kept
    layers = layers_of(own, "resid_pre")
    names, parts = [EMBEDDING], [(given["resid_pre", layers[0]] - own["resid_pre", layers[0]].detach())[None]]
    for layer in layers:
        if ("z", layer) in own:
            moved = given["z", layer] - own["z", layer].detach()
            parts.append(_pushed(own["attn_out", layer], live.leaves["z", layer], moved))
            names += [f"L{layer}H{head}" for head in range(len(parts[-1]))]
        if ("mlp_out", layer) in own:
            parts.append((given["mlp_out", layer] - own["mlp_out", layer].detach())[None])
            names.append(f"L{layer}MLP")
    whole = torch.where(where[None, :, :, None], torch.cat(parts), 0)
    return names, whole.transpose(0, 1).flatten(2)


def _read(live: Live, said: Tensor) -> Iterator[tuple[list[str], Tensor, int]]:
    """Receivers in the order of the pass: names, dL/d(what each reads) (receiver, pair, token, d_model), and how many
    senders are before them."""
    layers = layers_of(live.kept, "resid_pre")
    asked = [at for at in live.leaves if at[0] in (*INPUTS, "mlp_out") or at == ("resid_post", layers[-1])]
    slopes = torch.autograd.grad(said.sum(), [live.leaves[at] for at in asked], retain_graph=True)
    slope, before = dict(zip(asked, slopes, strict=True)), 1
    for layer in layers:
        stream, heads = live.leaves["resid_pre", layer], 0
        for site in (site for site in INPUTS if (site, layer) in slope):
            pulled = _pulled(live.kept[site, layer], stream, slope[site, layer])
            heads = len(pulled)
            yield [f"L{layer}H{head}.{site}" for head in range(heads)], pulled, before
        if ("mlp_out", layer) in slope:
            between = live.leaves.get(("resid_mid", layer), stream)
            (one,) = torch.autograd.grad(
                live.kept["mlp_out", layer], between, slope["mlp_out", layer], retain_graph=True
            )
            yield [f"L{layer}MLP"], one[None], before + (0 if between is stream else heads)
        before += heads + (("mlp_out", layer) in slope)
    yield [LOGITS], slope["resid_post", layers[-1]][None], before


def _pushed(written: Tensor, z: Tensor, moved: Tensor) -> Tensor:
    """The derivative of ``written`` by ``z`` times what moves in each head alone: (head, pair, token, d_model)."""
    back = torch.zeros_like(written, requires_grad=True)
    (pulled,) = torch.autograd.grad(written, z, back, create_graph=True)  # linear in back: its derivative is J itself
    found = []
    for head in range(moved.shape[1]):
        (each,) = torch.autograd.grad(pulled, back, _alone(moved, head), retain_graph=True)
        found.append(each)
    return torch.stack(found)


def _pulled(read: Tensor, stream: Tensor, slope: Tensor) -> Tensor:
    """dL/d(stream) through each head of ``read`` alone: (head, pair, token, d_model)."""
    return torch.stack(
        [torch.autograd.grad(read, stream, _alone(slope, head), retain_graph=True)[0] for head in range(slope.shape[1])]
    )


def _alone(x: Tensor, head: int) -> Tensor:
    """``x`` (pair, head, token, d) of one head, 0 in the others."""
    one = torch.zeros_like(x)
    one[:, head] = x[:, head]
    return one
