"""transformers' mask functions as rules: the lazy mask that travels through a model in place of an S x S tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import masking_utils

from headscope.interp.errors import HeadscopeError
from headscope.kernels.masks import IndexRule, Mask

HFRule = Callable[..., Any]


class LazyMask(Tensor):
    """A stand-in of shape (batch, 1, query, key) with no storage that carries a Mask.

    It travels from transformers' mask factory to our attention function. Any other reader would take it for a real
    mask and be silently wrong, so every data operation on it raises. It may move to another device (accelerate moves
    what a layer is called with to the layer's), once for each.
    """

    rule: Mask
    gaps: bool
    arguments: dict[str, Any]
    elsewhere: dict[torch.device, LazyMask]
    originals: dict[str, Tensor | None]
    left_out: dict[str, bool]
    causal: dict[bool, Mask]
    read: dict[tuple[Any, ...], Any]  # what layers found that it says of their calls, by what they asked
    # else asking for its shape takes longer than attention
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], device: torch.device | str, rule: Mask, arguments: dict[str, Any] | None = None
    ) -> LazyMask:
        made: LazyMask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=torch.device(device))
        made.rule, made.gaps, made.arguments, made.originals, made.elsewhere = rule, False, arguments or {}, {}, {}
        made.left_out, made.causal, made.read = {}, {}, {}
        return made

    def on(self, device: torch.device) -> LazyMask:
        """The same mask for queries and keys on ``device``; layers that share a device share one object."""
        if device not in self.elsewhere:
            moved = LazyMask(tuple(self.shape), device, _on(self.rule, self.device, device), self.arguments)
            moved.gaps = self.gaps
            self.elsewhere[device] = moved
        return self.elsewhere[device]

    def original(self, implementation: str) -> Tensor | None:
        """The mask that transformers makes for another attention implementation from the same arguments; made once."""
        if implementation not in self.originals:
            make = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
            made = None if make is None else make(**self.arguments)
            self.originals[implementation] = None if made is None else made.to(self.device)
        return self.originals[implementation]

    def is_left_out(self, implementation: str) -> bool:
        """Whether transformers makes no mask here for ``implementation``, whose function then goes by its causality
        alone: where no mask function is registered, and where SDPA's says that none is needed."""
        if implementation not in self.left_out:
            make = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.get(implementation)
            self.left_out[implementation] = make is None or (make is masking_utils.sdpa_mask and self._is_skipped())
        return self.left_out[implementation]

    def _is_skipped(self) -> bool:
        """The two conditions under which ``sdpa_mask`` gives None; it would build the mask where neither holds."""
        asked = self.arguments
        keys, local = asked["kv_length"], asked.get("local_size")
        padding = masking_utils.prepare_padding_mask(asked["attention_mask"], keys, asked["kv_offset"])
        where = (padding, asked["q_length"], keys, asked["q_offset"], asked["kv_offset"], local)
        if asked.get("allow_is_causal_skip", True) and masking_utils._ignore_causal_mask_sdpa(*where):
            return True
        skips = asked.get("allow_is_bidirectional_skip", False)
        return bool(skips and masking_utils._ignore_bidirectional_mask_sdpa(padding, keys, local))

    def by_causality(self, causal: bool) -> Mask:
        """What a function without a mask attends to: one object, so that what is planned for it serves all layers."""
        if causal not in self.causal:
            plain = Mask(
                query_offset=self.rule.query_offset, key_offset=self.rule.key_offset, right=0 if causal else None
            )
            self.causal[causal] = self.rule if self._says(causal) else plain
        return self.causal[causal]

    def _says(self, causal: bool) -> bool:
        """Whether the rule is causal, or sees everything, already (a window is wider than the keys): nearly always."""
        rule = replace(self.rule, left=None) if self.arguments["kv_length"] <= (self.rule.left or 0) + 1 else self.rule
        return rule.is_plain_causal if causal else rule.is_full

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyMask(shape={tuple(self.shape)}, rule={self.rule})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func.overloadpacket in (torch.ops.aten.detach, torch.ops.aten.alias):
            made = LazyMask(tuple(args[0].shape), args[0].device, args[0].rule, args[0].arguments)
            for name in ("gaps", "originals", "elsewhere", "left_out", "causal", "read"):
                setattr(made, name, getattr(args[0], name))
            return made
        to = kwargs or {}
        if func.overloadpacket is torch.ops.aten._to_copy and "device" in to and to.get("dtype") in (None, torch.bool):
            return args[0].on(to["device"])
        raise HeadscopeError(
            f"this model, or a hook on it, reads its attention mask itself ({func}), so the mask cannot stay a rule: "
            "remove the hook and give the model a ready-made mask (batch, 1, query, key), or report the architecture"
        )


def lazy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: HFRule = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> LazyMask:
    """A mask function for transformers' AttentionMaskInterface that keeps the rule and builds nothing.

    The offsets are read now: a StaticCache updates its offset tensor in place before the layers run.
    """
    rule = translate(mask_function, batch_size, vmap=use_vmap)
    query_offset, key_offset = int(q_offset), int(kv_offset)  # once each: on a card it waits for what runs there
    rule = replace(rule, query_offset=query_offset, key_offset=key_offset)
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, key_offset)
    before = rule
    if padding is not None:
        rule = with_padding(rule, padding.to(torch.bool), batch_size)
    arguments: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": query_offset,
    }
    arguments |= {"kv_offset": key_offset, "mask_function": mask_function, "attention_mask": attention_mask}
    made = LazyMask(
        (batch_size, 1, q_length, kv_length),
        device,
        rule,
        {**others, **arguments, "use_vmap": use_vmap, "device": device},
    )
    made.gaps = rule.rule is not before.rule
    return made


def with_padding(mask: Mask, real: Tensor, batch: int) -> Mask:
    """``mask`` restricted to the positions that ``real`` (batch, position) marks; ranges where each row is one run."""
    held = real.cpu().numpy()  # one copy: on a card each question is a launch and a wait
    if held.all():
        return mask
    count, some = held.sum(1), held.any(1)
    start = np.where(some, held.argmax(1), 0)
    end = np.where(some, held.shape[1] - held[:, ::-1].argmax(1), 0)
    # both begin at a multiple of 16 bytes: Triton compiles a kernel anew for a tensor that does not
    ends = np.zeros((2, len(count) + len(count) % 2), np.int64)
    ends[:, : len(count)] = start, end
    there = torch.from_numpy(ends).to(real.device)[:, : len(count)]
    mask = replace(mask, start=there[0], end=there[1])
    if (end - start == count).all():
        return mask
    earlier = mask.rule  # holes between tokens: keep the range for speed and look the holes up

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = real[b, k]
        return seen if earlier is None else seen & earlier(b, h, q, k)

    return replace(mask, rule=rule, examples=batch)


def _on(mask: Mask, here: torch.device, there: torch.device) -> Mask:
    """``mask`` for positions on another device; its index function is evaluated where the tensors it reads are."""

    def moved(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(there)

    inner = mask.rule

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert inner is not None
        return inner(b.to(here), h.to(here), q.to(here), k.to(here)).to(there)

    return replace(
        mask,
        start=moved(mask.start),
        end=moved(mask.end),
        origin=moved(mask.origin),
        segments=moved(mask.segments),
        rule=None if inner is None else rule,
    )


def translate(function: HFRule, batch: int, *, vmap: bool = False) -> Mask:
    """A transformers mask function as a Mask; one that is not recognised becomes its ``rule``, evaluated by tiles."""
    known = _recognise(function)
    return known if known is not None else Mask(right=None, rule=_by_index(function, vmap), examples=batch)


def _by_index(function: HFRule, vmap: bool) -> IndexRule:
    if not vmap:
        return lambda b, h, q, k: function(b, h, q, k)
    expanded = masking_utils._vmap_expansion_sdpa(function)

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        with masking_utils.TransformGetItemToIndex():
            result: Tensor = expanded(b.reshape(-1), h.reshape(-1), q.reshape(-1), k.reshape(-1))
        return result

    return rule


def _recognise(function: HFRule) -> Mask | None:
    """The rule of a function made by transformers.masking_utils, from its name and closure; None if unknown."""
    if function is masking_utils.causal_mask_function:
        return Mask.causal()
    if function is masking_utils.bidirectional_mask_function:
        return Mask.full()
    cells = getattr(function, "__closure__", None)
    if getattr(function, "__module__", "") != masking_utils.__name__ or not cells:
        return None
    maker = function.__qualname__.split(".")[0]
    held = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))
    full = Mask.full()
    if maker == "sliding_window_overlay":
        return replace(full, left=int(held["sliding_window"]) - 1)
    if maker == "sliding_window_bidirectional_overlay":
        return replace(full, left=int(held["sliding_window"]), right=int(held["sliding_window"]))
    if maker == "chunked_overlay":
        return replace(full, chunk=int(held["chunk_size"]), origin=held["left_padding"])
    if maker == "packed_sequence_mask_function":
        return replace(full, segments=held["packed_sequence_mask"])
    if maker == "remap_positions_for_packed_sequence":
        # inside one packed sequence positions differ as indices do; chunks count from each sequence's own start
        inner = _recognise(held["mask_function"])
        return inner if inner is not None and inner.chunk is None else None
    if maker == "and_masks":
        return _conjunction([_recognise(part) for part in held["mask_functions"]])
    return None


def _conjunction(parts: list[Mask | None]) -> Mask | None:
    """All of several rules at once, or None where one is unknown or two would need the same field."""
    merged = Mask.full()
    for part in parts:
        if part is None:
            return None
        for name in ("left", "right"):
            values = [x for x in (getattr(merged, name), getattr(part, name)) if x is not None]
            nearest: dict[str, Any] = {name: min(values) if values else None}
            merged = replace(merged, **nearest)
        for name in ("chunk", "origin", "segments"):
            value = getattr(part, name)
            if value is None:
                continue
            if getattr(merged, name) is not None:
                return None
            merged = replace(merged, **{name: value})
    return merged
