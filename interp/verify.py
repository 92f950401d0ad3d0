"""Proof, on the spot, that our attention is the model's own.

1. The model's configured attention function runs as usual, on the mask that transformers builds for it.
2. At every call it runs again with the values replaced by one-hot rows for a tile of keys: its output is then exactly
   that tile of the pattern its real kernel computes, whatever the kernel (SDPA, FlashAttention, eager). This proves
   mask, window, softcap, sink and scale handling where attention weights cannot be asked for.
3. The tile and the output are compared with those of the AttentionCall we make of the same call.

The bound is derived from the precision: a score s = scale q.k carries a rounding error of about eps |q||k| scale in the
inputs' precision, and p changes by at most that factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import masking_utils

from headscope.interp.attention import AttentionCall, bare_model, model_device, origin
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites import huggingface as site
from headscope.interp.sites.hf_masks import LazyMask, lazy_mask

NAME = "headscope-verify"
LONGEST_WINDOW = 1024  # a sliding window up to this size is exceeded by the verification prompt
_VERIFIED: WeakKeyDictionary[nn.Module, Verification] = WeakKeyDictionary()


@dataclass(eq=False)
class Verification:
    """What the check saw: attention calls, sites, layers, and the largest disagreement relative to its bound."""

    calls: int = 0
    layers: dict[str, list[int]] = field(default_factory=dict)
    worst: float = 0.0
    largest_difference: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every call agreed."""
        return self.calls > 0 and not self.problems


def verify_once(model: Any) -> Verification:
    """Verify a model the first time it is seen; afterwards return what was found.

    Raises:
        HeadscopeError: the model does not route its attention, or disagrees; the message names the layer.
    """
    if origin(model) == "transformer_lens":
        from headscope.interp.sites import transformer_lens

        return transformer_lens.verify_once(model)
    inner = bare_model(model)
    if inner not in _VERIFIED:
        found = verify(inner)
        if not found.passed:
            why = found.problems[0] if found.problems else "its attention was never called"
            raise HeadscopeError(site.refusal(inner, why))
        _VERIFIED[inner] = found
    return _VERIFIED[inner]


def verify(model: Any, inputs: dict[str, Tensor] | None = None) -> Verification:
    """Run the check on ``inputs`` (default: a small padded batch of random tokens, longer than the sliding window)."""
    inner = bare_model(model)
    if site.is_attached(inner):
        return Verification(calls=1)  # verified when the first handler was attached
    training = inner.training
    found = Verification()
    with _probing(inner, found), torch.no_grad():
        inner.eval()
        try:
            inner(**(prompt(inner) if inputs is None else inputs))
        finally:
            inner.train(training)
    for name, layers in found.layers.items():
        if len(set(layers)) != len(layers):
            found.problems.append(f"{name} attends more than once a layer")
    return found


def prompt(model: nn.Module) -> dict[str, Tensor]:
    """Two rows of random tokens, one padded on the left and one on the right."""
    config = model.config.get_text_config()
    windows = [w for w in (getattr(config, "sliding_window", None),) if w and w <= LONGEST_WINDOW]
    length = max([24, *(w + 8 for w in windows)])
    limit = getattr(config, "max_position_embeddings", None)
    length = min(length, limit) if limit else length
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (2, length), generator=generator)
    real = torch.ones_like(ids)
    real[0, :3] = 0
    real[1, -2:] = 0
    device = model_device(model)
    return {"input_ids": ids.to(device), "attention_mask": real.to(device), "use_cache": False}  # type: ignore[dict-item]


@contextmanager
def _probing(model: nn.Module, found: Verification) -> Iterator[None]:
    before = site.implementation(model)
    route = site.Route(model, before)
    places = {
        module: site._Place(route, name, *site.parse_name(name, module)) for name, module in model.named_modules()
    }
    names = {id(module): before.get("", "eager") for module in places}
    for sub in before:
        for module in places if sub else ():
            if getattr(module, "config", None) is getattr(model.config, sub, None):
                names[id(module)] = before[sub]

    def mask_function(**kwargs: Any) -> LazyMask:
        lazy = lazy_mask(**kwargs)
        config = kwargs.get("config")
        sub = next((s for s in before if s and getattr(model.config, s, None) is config), "")
        make = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[before[sub]]
        lazy.original = make(**{**kwargs, "allow_torch_fix": True})
        return lazy

    def function(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        real = site.original_function(module, names[id(module)])
        call = site.make_call(
            module, places[module], query, key, value, mask, kwargs.get("scaling"), kwargs.get("dropout", 0.0), kwargs
        )
        original = mask.original if isinstance(mask, LazyMask) else mask
        result = real(module, query, key, value, original, **kwargs)
        _compare(found, call, result[0], lambda v: real(module, query, key, v, original, **kwargs)[0])
        return result

    site.switch(model, NAME, function, mask_function)
    try:
        yield
    finally:
        site.restore(model, before, NAME)


def _compare(found: Verification, call: AttentionCall, output: Tensor, run: Any) -> None:
    found.calls += 1
    found.layers.setdefault(call.site, []).append(call.layer)
    keys, width = call.key.shape[2], call.value.shape[-1]
    eps = torch.finfo(call.query.dtype).eps
    reach = call.query.float().norm(dim=-1).amax() * call.key.float().norm(dim=-1).amax() * call.scale
    bound = eps * (8.0 + 2.0 * float(reach))
    rows = torch.arange(call.query.shape[2], device=call.query.device)
    real = call.mask.query_is_real(rows)
    keep = torch.ones(call.query.shape[0], rows.numel(), dtype=torch.bool, device=rows.device) if real is None else real
    keep = keep.expand(call.query.shape[0], -1)
    for first in sorted({0, max(0, keys - width)}):
        stop = min(keys, first + width)
        one_hot = torch.zeros_like(call.value)
        index = torch.arange(stop - first, device=rows.device)
        one_hot[:, :, first + index, index] = 1
        theirs = run(one_hot)[..., : stop - first]
        ours = call.pattern(keys=slice(first, stop)).transpose(1, 2)
        _judge(found, call, "the pattern", theirs.float()[keep], ours.float()[keep], bound)
    size = float(call.value.float().abs().amax())
    _judge(found, call, "the output", output.float()[keep], call.output().transpose(1, 2).float()[keep], bound * size)


def _judge(found: Verification, call: AttentionCall, what: str, theirs: Tensor, ours: Tensor, bound: float) -> None:
    difference = float((theirs - ours).abs().max()) if theirs.numel() else 0.0
    found.largest_difference = max(found.largest_difference, difference)
    found.worst = max(found.worst, difference / max(bound, 1e-38))  # values that are all zero have the bound zero
    if not difference <= bound:
        found.problems.append(f"{what} of layer {call.layer} differs from ours by {difference:.2g}, bound {bound:.2g}")
