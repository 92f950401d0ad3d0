"""Vision-aware head reinforcement: the heads that answer most to an image, or to any span, are turned up."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from headscope.interp.attention.call import AttentionCall
from headscope.interp.attention.handler import Handler
from headscope.interp.errors import HeadscopeError
from headscope.interp.heads.divergence.context_divergence import above_median, outliers
from headscope.interp.models import load_model
from headscope.interp.prompts.vision import VisionPrompt
from headscope.interp.results.headset import HeadSet
from headscope.interp.sites import attached
from headscope.interp.sites.before import own_passes
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.sizes import tower_size
from headscope.interp.sites.unwrap import takes
from headscope.interp.statistics.spans import by_example
from headscope.interventions.declared import Edit
from headscope.interventions.outputs.scale import ScaleHeads
from headscope.interventions.phases import as_mask, is_every, is_none
from headscope.interventions.prompts import Prompts, ReadsPrompts, held_for

TextStream = Literal["reinforced", "plain"]
Choice = Literal["divergence", "random"]


@dataclass(frozen=True, eq=False)
class ReinforceHeads(ReadsPrompts, Edit):
    """Multiply by ``factor`` the heads whose output a prompt's span moves most, chosen anew for every prompt.

    VHR, He et al. 2025, "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence" (arXiv
    2412.13949, Algorithm 1; no code is to be had). Before the model reads a batch of prompts, one joint pass of two
    streams is run, the prompts and the same without ``span`` (its tokens taken out, what follows moves up). Layer by
    layer in it, upwards: a head's divergence (VHD) is the norm of the difference between its z at the last positions of
    both; outliers are set to 0 (``ContextDivergence``); those strictly above the layer's median are chosen, and scaled
    at all positions before the next layer is read. The heads of a prompt then stay the same for its response.

    [OURS], where the paper is silent: the stream without the span is reinforced, too (``text_stream="plain"``: it is
    not; the choice of heads differs), and layers are named as shares of the depth: the second and the last 14 of 32.
    ``during`` and ``positions`` say where heads are scaled afterwards, not where they are while they are chosen. The
    joint pass is of the model without other edits.

    What it does not show: that the heads use what the span says. ``choose="random"`` is the control: as many heads of
    the same layers, drawn for each prompt (``evaluate`` runs it beside the edit).

    Args:
        span: what is taken out: an image, or any span, by positions or as a published name.
        factor: the paper's alpha; ``strength`` s makes it 1 + s (factor - 1), also while heads are chosen.
        layers: those in which heads are reinforced.
        zero_outliers: the paper's rule; False is its ablation.
        text_stream: whether the prompt without the span is reinforced while heads are chosen.
        choose: "divergence", or "random" heads.
        seed: of random heads, which a prompt's tokens decide with it.
    """

    _: KW_ONLY
    span: Any = "image"
    factor: float = 2.0
    layers: tuple[int, ...] | None = None
    zero_outliers: bool = True
    text_stream: TextStream = "reinforced"
    choose: Choice = "divergence"
    seed: int = 0

    source: ClassVar[str] = "arXiv 2412.13949"
    unit: ClassVar[str] = "factor on z"
    refused: ClassVar[dict[str, str]] = {
        "TransformerLens": "the prompt is read before the model reads it, which a bridge does not show",
        "nnsight": "a wrapper would take the pass that chooses for its own",
        "chunked prefill": "heads are chosen at the prompt's last position",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.span, str):
            by_example(self.span)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted({int(x) for x in np.atleast_1d(self.layers)})))
        if self.text_stream not in ("reinforced", "plain"):
            raise HeadscopeError(f"text_stream must be 'reinforced' or 'plain', not {self.text_stream!r}")
        if self.choose not in ("divergence", "random"):
            raise HeadscopeError(f"ReinforceHeads: choose is 'divergence' or 'random', not {self.choose!r}")
        object.__setattr__(self, "_chosen", {})

    @property
    def neutral(self) -> bool:
        """A factor of 1, too, changes nothing."""
        return self.strength == 0 or self.factor == 1

    @property
    def bounded(self) -> bool:
        """Heads are chosen where the prompt ends."""
        return True

    @property
    def chooses(self) -> bool:
        """Which heads, for each prompt."""
        return self.choose != "random"

    def with_random_choice(self, seed: int) -> ReinforceHeads:
        """As many random heads of the same layers."""
        return self.for_its_model(replace(self, choose="random", seed=seed))

    def in_force(self, model: ModelLike, tower: str | None) -> ReinforceHeads:
        """A copy that holds the choice for the prompt that is being read; it knows its layers."""
        depth = tower_size(model, tower).depth
        return replace(self, layers=layers_of(depth, self.layers))

    def check(self, layers: int, heads: int) -> None:
        """Raise HeadscopeError where the model lacks one of the layers."""
        layers_of(layers, self.layers)

    def concerns(self, module: str, layer: int) -> bool:
        """Its layers."""
        return not self.neutral and (self.layers is None or layer in self.layers)

    def read(self, model: ModelLike, prompts: Prompts) -> None:
        """Choose heads for these prompts."""
        streams = TwoStreams(self, len(prompts.ids), _seeds(prompts, self.seed))
        both = prompts.beside(prompts.without(self.span))
        with own_passes(model) as inner, attached(model, streams, layers=self.layers):
            last = {"logits_to_keep": 1} if takes(inner, "logits_to_keep") else {}  # logits are not looked at
            inner(**both.inputs(), **last, use_cache=False)
        vars(self)["_chosen"].clear()
        vars(self)["_chosen"].update(streams.chosen)

    @property
    def chosen(self) -> dict[int, Tensor]:
        """Of the copy in force: the heads chosen last, bool (prompt, head) by layer."""
        held: dict[int, Tensor] = vars(self)["_chosen"]
        return held

    def scaled(self, call: AttentionCall, z: Tensor, chosen: Tensor) -> Tensor:
        """z (batch, head, query, d_value) with the heads ``chosen`` (batch, head) multiplied."""
        factor = call.either(chosen.to(z.device), 1.0 + self.strength * (self.factor - 1.0), 1.0)
        return (z * factor[:, :, None, None]).to(z.dtype)

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        """The chosen heads scaled on the rows that are meant."""
        rows = self.rows(call) if self.concerns(call.module, call.layer) else slice(0, 0)
        if is_none(rows):
            return z
        new = self.scaled(call, z, held_for(self.chosen.get(call.layer), len(z), self.name))
        return new if is_every(rows, call) else torch.where(as_mask(rows, call)[:, None, :, None], new, z)


class TwoStreams(Handler):
    """Chooses heads in a pass over ``count`` prompts and, after them in the batch, the same without a span."""

    def __init__(self, edit: ReinforceHeads, count: int, seeds: list[int]) -> None:
        self.by, self.count, self.seeds = edit, count, seeds
        self.chosen: dict[int, Tensor] = {}

    def edit_output(self, call: AttentionCall, z: Tensor) -> Tensor:
        """z of both streams, or of the first alone, with this layer's heads scaled."""
        whole, rest = z[:, :, -1].double().cpu().numpy().reshape(2, self.count, *z[:, :, -1].shape[1:])
        moved, size = np.linalg.norm(whole - rest, axis=-1), (rest**2).sum(-1)  # (prompt, head)
        kept = np.where(outliers(moved, size), 0.0, moved) if self.by.zero_outliers else moved
        mine = above_median(kept)
        if self.by.choose == "random":
            rng = [np.random.default_rng([seed, call.layer]) for seed in self.seeds]
            mine = np.stack([one.permutation(row) for one, row in zip(rng, mine, strict=True)])
        held = self.chosen[call.layer] = torch.from_numpy(mine)
        other = held if self.by.text_stream == "reinforced" else torch.zeros_like(held)
        return self.by.scaled(call, z, torch.cat([held, other]))


def layers_of(depth: int, given: Iterable[int] | None) -> tuple[int, ...]:
    """The layers of a model of so many, by default the paper's as shares of the depth.

    Raises:
        HeadscopeError: none, or one that is not there.
    """
    layers = {1, *range(depth - round(depth * 14 / 32), depth)} if given is None else set(given)
    if not layers or not layers <= set(range(depth)):
        raise HeadscopeError(f"layers {sorted(layers)} are not among 0-{depth - 1}; name those to reinforce")
    return tuple(sorted(layers))


def reinforced_heads(model: ModelLike, prompt: VisionPrompt, **settings: Any) -> ScaleHeads:
    """The heads that ``ReinforceHeads`` chooses for one prompt, as an edit that is fixed from then on.

    On other prompts it is the paper's ablation ("fixed VHR"): heads of one sample for all.

    Args:
        model: load_model's result.
        prompt: one chat with named spans, as ``vision_prompt`` makes them (with images or without).
        settings: of ``ReinforceHeads``.

    Raises:
        HeadscopeError: several chats, no such span or layer, or no head above its layer's median.
    """
    lm = load_model(model)
    edit = ReinforceHeads(**settings).in_force(lm, None)
    if prompt.inputs["input_ids"].shape[0] != 1:
        raise HeadscopeError("heads are chosen for one chat; use ReinforceHeads for a batch, each with its own")
    with prompt.published():
        prompts = Prompts.of(lm, prompt.inputs, "reinforced_heads")
        assert prompts is not None  # there is no cache
        edit.read(lm, prompts)
    chosen = sorted(edit.chosen.items())
    heads = [(layer, int(head)) for layer, mine in chosen for head in mine[0].nonzero()[:, 0]]
    if not heads:
        raise HeadscopeError(f"no head of layers {edit.layers} answers to the span {edit.span!r} more than another")
    return ScaleHeads(HeadSet(tuple(heads), name="reinforced"), edit.factor)


def _seeds(prompts: Prompts, seed: int) -> list[int]:
    """A seed for each prompt that does not go by its place in a batch."""
    each = [ids[mask].tolist() for ids, mask in zip(prompts.ids, prompts.mask, strict=True)]
    return [zlib.crc32(repr((seed, ids)).encode()) for ids in each]
