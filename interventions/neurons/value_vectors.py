"""Edited value vectors: what chosen MLP neurons write when they are active, without touching a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.stream import NEURONS, StreamCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.given import ModelLike
from headscope.interventions.declared import Edit
from headscope.interventions.phases import as_mask

Neuron = tuple[int, int]  # layer, neuron


@dataclass(frozen=True, eq=False)
class EditValueVectors(Edit):
    """Give chosen MLP neurons other value vectors: v' = ``factor`` v + ``add``, where v is the neuron's column of the
    MLP's last projection, so that it writes m v' at a token where its activation is m.

    The MLP edit of Li & Gao 2024, "Anchored Answers" (arXiv 2405.03205; demos/mitigate_mlp.ipynb, where W_out[i] gets
    - 1 W_U[anchor] + 8 W_U[answer]): ``probes.away_from_anchor`` makes that vector, ``anchored_neurons`` finds them.
    A value vector in the sense of Geva et al. 2021 (arXiv 2012.14913). ``factor`` 0 takes the neuron away, 0 with
    ``add`` replaces its vector. The authors write into the weights, so at every token; here too unless ``during`` or
    ``positions`` say otherwise. Biases stay, and a norm behind the projection (Gemma 2 and 3) acts on the edited sum.

    Composed on one neuron, a later edit finds the activation as an earlier one scaled it, and adds by that.

    What a neuron writes goes with the sign of m: where m < 0, as GELU and gated MLPs have it, what is added pushes the
    other way; ``anchored_neurons`` reports m. A mixture of experts is refused. What it does not show: that the neuron
    alone holds what its vector says; others may stand in for it.

    Args:
        neurons: (layer, neuron) pairs, each once.
        factor: on their value vectors; ``strength`` s makes it 1 + s (factor - 1), and adds s ``add``.
        add: (d_model,) for all of them, or (neuron, d_model) in their order.
    """

    neurons: tuple[Neuron, ...]
    _: KW_ONLY
    factor: float = 1.0
    add: Tensor | None = None

    source: ClassVar[str] = "arXiv 2405.03205"
    unit: ClassVar[str] = "value vectors of neurons"
    strengths: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    refused: ClassVar[dict[str, str]] = {
        "mixture of experts": "which neurons a token has is the router's choice",
        "TransformerLens": "a bridge has hook points of its own for neurons",
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "neurons", _pairs(self.neurons))
        super().__post_init__()
        if self.add is not None:
            self._check_added(self.add)
        if not math.isfinite(self.factor):
            raise HeadscopeError(f"EditValueVectors: factor must be a finite number, not {self.factor!r}")
        places: dict[int, list[int]] = {}
        for place, (layer, _) in enumerate(self.neurons):
            places.setdefault(layer, []).append(place)
        object.__setattr__(self, "_places", places)
        object.__setattr__(self, "_rows", {})
        object.__setattr__(self, "_active", {})

    def _check_added(self, add: Any) -> None:
        whole = isinstance(add, Tensor) and add.is_floating_point() and add.dim() in (1, 2)
        if not whole or (add.dim() == 2 and add.shape[0] != len(self.neurons)):
            raise HeadscopeError(
                f"EditValueVectors: add must be a floating-point tensor (d_model,) or ({len(self.neurons)}, d_model), "
                f"not {add!r:.60}"
            )
        if not bool(add.detach().isfinite().all()):
            raise HeadscopeError("EditValueVectors: add holds numbers that are not finite")

    @property
    def neutral(self) -> bool:
        """Whether its settings are those that change nothing."""
        return self.strength == 0 or (self.factor == 1 and self.add is None)

    @property
    def streams(self) -> tuple[str, ...]:  # type: ignore[override]
        """The neurons, and what they write."""
        return () if self.neutral else NEURONS

    def in_force(self, model: ModelLike, tower: str | None) -> EditValueVectors:
        """A copy with a memory of its own."""
        return replace(self)

    def named_layers(self) -> dict[int, str] | None:
        """The layers of its neurons."""
        names: dict[int, list[str]] = {}
        for layer, neuron in self.neurons:
            names.setdefault(layer, []).append(f"neuron {neuron} of layer {layer}")
        return {layer: ", ".join(held) for layer, held in names.items()}

    def check(self, layers: int, heads: int) -> None:
        """Raise HeadscopeError for a layer that the model lacks."""
        for layer, neuron in self.neurons:
            if not 0 <= layer < layers:
                raise HeadscopeError(f"neuron {neuron} of layer {layer} does not exist: the model has {layers} layers")

    def concerns(self, module: str, layer: int) -> bool:
        """Attention says which rows are meant, where not all are."""
        return self._chooses and not self.neutral and layer in self._held

    def edit(self, call: AttentionCall) -> AttentionCall:
        """Note which rows of the layer are meant: its attention runs before its MLP."""
        if self.concerns(call.module, call.layer):
            self._noted[call.layer] = as_mask(self.rows(call), call)
        return call

    def stream(self, call: StreamCall) -> Tensor:
        """The neurons' activations scaled; then what they add is added."""
        places = self._held.get(call.layer)
        if self.neutral or places is None:
            return call.x
        active: dict[int, Tensor] = vars(self)["_active"]
        if call.place == "mlp_post":
            return self._scaled(call, places, active)
        m = active.pop(call.layer)
        if self.add is None:
            return call.x
        rows = self.add[None].expand(len(self.neurons), -1) if self.add.dim() == 1 else self.add
        if rows.shape[1] != call.x.shape[2]:
            raise HeadscopeError(
                f"EditValueVectors: add has {rows.shape[1]} dimensions, layer {call.layer} writes {call.x.shape[2]}"
            )
        wide = torch.promote_types(call.x.dtype, torch.float32)
        rows = rows[places].to(device=call.x.device, dtype=wide)
        return (call.x + self.strength * (m.to(wide) @ rows)).to(call.x.dtype)

    def _scaled(self, call: StreamCall, places: list[int], active: dict[int, Tensor]) -> Tensor:
        index = torch.tensor([self.neurons[place][1] for place in places], device=call.x.device)
        if int(index.max()) >= call.x.shape[2]:
            raise HeadscopeError(
                f"neuron {int(index.max())} of layer {call.layer} does not exist: its MLP has {call.x.shape[2]}"
            )
        m = call.x.index_select(2, index)
        factor = torch.full_like(m[..., :1], 1.0 + self.strength * (self.factor - 1.0))
        mine = self._rows_of(call)
        if mine is not None:
            factor = torch.where(mine[..., None], factor, 1.0)
        active[call.layer] = m if mine is None else m * mine[..., None]
        return call.x if self.factor == 1 else call.x.index_copy(2, index, m * factor)

    def _rows_of(self, call: StreamCall) -> Tensor | None:
        """Which rows are meant, bool (batch or 1, position); None: all."""
        if not self._chooses:
            return None
        mine = self._noted.pop(call.layer, None)
        if mine is None or mine.shape[1] != call.x.shape[1]:
            raise HeadscopeError(
                f"EditValueVectors: layer {call.layer} does not attend before its MLP runs, so that its rows are not "
                "known: use during='always' and no positions"
            )
        return mine.to(call.x.device)

    @property
    def _chooses(self) -> bool:
        return self.during != "always" or self.positions is not None

    @property
    def _held(self) -> dict[int, list[int]]:
        places: dict[int, list[int]] = vars(self)["_places"]
        return places

    @property
    def _noted(self) -> dict[int, Tensor]:
        noted: dict[int, Tensor] = vars(self)["_rows"]
        return noted

    def abort_forward(self) -> None:
        """What was noted is of a pass that broke off."""
        vars(self)["_rows"].clear()
        vars(self)["_active"].clear()


def _pairs(given: Any) -> tuple[Neuron, ...]:
    """(layer, neuron) pairs, each once.

    Raises:
        HeadscopeError: something else.
    """
    try:
        pairs = tuple((int(layer), int(neuron)) for layer, neuron in given)
    except (TypeError, ValueError) as error:
        raise HeadscopeError(
            f"EditValueVectors: neurons must be (layer, neuron) pairs, such as [(3, 14)], not {given!r:.60}"
        ) from error
    if not isinstance(given, Sequence) or not pairs or len({*pairs}) != len(pairs) or min(map(min, pairs)) < 0:
        raise HeadscopeError(f"EditValueVectors: name each (layer, neuron) once, at least one, not {given!r:.60}")
    return pairs
