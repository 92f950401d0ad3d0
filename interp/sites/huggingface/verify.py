"""Proof, on the spot, that our attention is the model's own.

1. The model's configured attention function runs as usual, on the mask that transformers builds for it.
2. At every call it runs again with the values replaced by one-hot rows for a tile of keys: its output is then exactly
   that tile of the pattern its real kernel computes, whatever the kernel (SDPA, FlashAttention, eager). This proves
   mask, window, softcap, sink and scale handling where attention weights cannot be asked for.
3. The tile and the output are compared with those of the AttentionCall we make of the same call.
4. The model's output of that pass is compared with its output untraced: code around attention may ask whether it has a
   mask (``untraced``).

A tower that the verification prompt does not reach (images, say) is checked when its first call comes. The prompt runs
once more without its attention mask, where transformers may make no mask at all and leave causality to a flag. A
function that is not known to be softmax attention (``headscope.interp.sites.huggingface.own``) is not compared with
anything: nothing ever stands in for it.

``headscope.interp.sites.agreement`` derives how far two right computations may differ. In half precision that may be
much, so a function that takes float32 as well runs once more on the same inputs in float32, and is held to float32's
bound. A kernel of half precision alone is held to its own: where its scores are large that proves the mask and little
else.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from headscope.interp.attention.call import AttentionCall
from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.agreement import Verification, compare_call
from headscope.interp.sites.compiled import uncompiled
from headscope.interp.sites.given import ModelLike, PreTrained
from headscope.interp.sites.huggingface import calls as hf_calls
from headscope.interp.sites.huggingface import own
from headscope.interp.sites.huggingface import route as hf_route
from headscope.interp.sites.huggingface import switch as hf_switch
from headscope.interp.sites.huggingface.masks import LazyMask, lazy_mask
from headscope.interp.sites.huggingface.prompt import SHORT, prompt
from headscope.interp.sites.huggingface.state import Route
from headscope.interp.sites.huggingface.untraced import drawn_alike, other_output
from headscope.interp.sites.interrupts import block, uninterrupted
from headscope.interp.sites.unwrap import bare_model, model_device

NAME = "headscope-verify"
LARGEST = 1 << 24  # query-key pairs of the largest call that is checked whole when it comes
_VERIFIED: WeakKeyDictionary[nn.Module, Verification] = WeakKeyDictionary()


def verify_once(model: ModelLike) -> Verification:
    """Verify a model the first time it is seen; afterwards return what was found.

    Raises:
        HeadscopeError: the model does not route its attention, or disagrees; the message names the layer.
    """
    inner = bare_model(model)
    if inner in _VERIFIED:
        return _VERIFIED[inner]
    found = verify(inner)
    if not found.passed:
        why = found.problems[0] if found.problems else "its attention was never called"
        raise HeadscopeError(hf_calls.refusal(inner, why))
    return found


def verify(model: ModelLike, inputs: dict[str, Tensor] | None = None, trust: Sequence[str] = ()) -> Verification:
    """Run the check on ``inputs`` (default: a small padded batch of random tokens, longer than the sliding window).

    A model that passes is known from then on to ``trace`` and to interventions. ``trust`` names attention
    implementations whose functions you registered or wrapped yourself, and which are softmax attention at every length
    and with every cache: they are compared like the others, and ours stands in for them from then on.

    Raises:
        HeadscopeError: the architecture is not routed, or does not run on inputs of ours (give ``inputs`` then).
    """
    inner = bare_model(model)
    hf_route.require_routable(inner)
    if hf_route.is_attached(inner):
        if trust:
            raise HeadscopeError("verify(trust=...) compares the model with itself; call it outside the `with` block")
        return _VERIFIED.get(inner) or Verification(calls=1)  # verified when the first handler was attached
    found = Verification()
    with hf_route.LOCK, uncompiled():
        hf_route.trust(inner, frozenset(trust))
        if inputs is None:
            _try(inner, found)
        else:
            _run(inner, found, inputs)
    if found.passed:
        _VERIFIED[inner] = found
        hf_route.set_check(inner, _Late(found))
    return found


def _try(model: PreTrained, found: Verification) -> None:
    """Verify on text; a model that does not run on text alone gets whatever else it takes."""
    from headscope.interp.sites.inputs import example_inputs

    failure: Exception | None = None
    if getattr(model, "main_input_name", "input_ids") == "input_ids":
        try:
            return _run(model, found, prompt(model))
        except HeadscopeError:
            raise
        except Exception as error:
            failure = error
            found.__init__()  # type: ignore[misc]
    try:
        inputs = example_inputs(model)
    except HeadscopeError as error:
        raise HeadscopeError(
            f"{type(model).__name__} cannot be verified on inputs of our own ({failure or error}); "
            "run headscope.interp.sites.verify(model, inputs) on inputs of yours first"
        ) from error
    _run(model, found, inputs)


def _run(model: nn.Module, found: Verification, inputs: dict[str, Any]) -> None:
    training = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model_device(model).type, enabled=False):
            with _probing(model, found):
                routed = drawn_alike(model, inputs)
            found.problems += other_output(model, inputs, routed)
            if found.problems:
                _check_weights(model)
            _run_unmasked(model, found, inputs)
    except HeadscopeError as error:
        named = type(model).__name__ in str(error)
        raise error if named else HeadscopeError(hf_calls.refusal(model, str(error))) from error
    finally:
        for part, was in training.items():
            part.training = was


def _check_weights(model: nn.Module) -> None:
    """Raise HeadscopeError where a weight is no number: nothing that such a model computes can be compared."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise HeadscopeError(
                f"{type(model).__name__} has weights that are not numbers, first in {name}: check the checkpoint, or "
                "load it with dtype='float32'"
            )


def _run_unmasked(model: nn.Module, found: Verification, inputs: dict[str, Any]) -> None:
    """The first example once more without a mask, as many callers leave it out; some models need one."""
    mask = inputs.get("attention_mask")
    if found.problems or not isinstance(mask, Tensor) or mask.dim() != 2:
        return
    rest = {name: x for name, x in inputs.items() if name != "attention_mask"}
    if set(rest) == {"input_ids", "use_cache"}:
        rest["input_ids"] = rest["input_ids"][:1, :SHORT]
    again = Verification()
    try:
        with _probing(model, again):
            model(**rest)
    except HeadscopeError:
        raise
    except Exception:  # whatever it is, nobody can run the model so
        return
    found.add(again)


@block
def _probing(model: nn.Module, found: Verification) -> Iterator[None]:
    before, thread = hf_switch.implementations(model), threading.get_ident()
    route = Route(model, before, trusted=hf_route.trusted(model))
    places = hf_route.places(route)

    def function(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        place, tensors = places.get(module), (query, key, value)
        if place is None or threading.get_ident() != thread:  # the user's own call of this model, or of a twin of it
            name = "sdpa" if place is None else place.implementation
            now = getattr(getattr(module, "config", None), "_attn_implementation_internal", None)
            name = now.own or "eager" if isinstance(now, hf_switch.Switched) else name
            return own.leave(module, name, *tensors, attention_mask, known=False, **kwargs)
        options = {"scaling": None, "dropout": 0.0, **kwargs}
        call = hf_calls.make_call(
            module, place, *tensors, attention_mask, options["scaling"], options["dropout"], options
        )
        return _check(found, module, place, call, attention_mask, options)

    try:
        hf_switch.switch(model, NAME, function, lazy_mask)
        yield
    finally:
        try:
            with uninterrupted():
                hf_switch.restore(before, NAME)
        finally:
            hf_switch.restore(before, NAME)  # an interrupt may have come just before
    _check_layers(found, places)


def _check_layers(found: Verification, places: dict[nn.Module, Any]) -> None:
    """A module that attends again in one pass shares its weights between layers, unless it goes through images."""
    towers = {place.module: place.tower for place in places.values()}
    for name, layers in found.layers.items():
        if len(set(layers)) != len(layers) and towers[name] not in ("vision", "audio"):
            found.problems.append(f"{name} attends more than once a layer (layers share their weights)")


class _Late:
    """Checks the modules that the verification did not reach, at their first call."""

    def __init__(self, found: Verification) -> None:
        self.found = found
        self.known = set(found.layers)

    def __call__(
        self, module: nn.Module, place: Any, call: AttentionCall, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> None:
        if call.module in self.known:
            return
        if call.query.shape[2] * call.key.shape[2] > LARGEST:
            raise HeadscopeError(
                f"{call.module} was not verified and this input is too long to do it now; run "
                "headscope.interp.sites.verify(model, inputs) on a shorter input of the same kind first"
            )
        with torch.no_grad():
            _check(self.found, module, place, call, mask, kwargs)
        if self.found.problems:
            why = self.found.problems[0]
            self.found.problems.clear()
            raise HeadscopeError(hf_calls.refusal(place.route.model, why))
        self.known.add(call.module)


def _check(
    found: Verification, module: nn.Module, place: Any, call: AttentionCall, mask: Tensor | None, kwargs: dict[str, Any]
) -> Any:
    """Compare one call with what the model's configured function computes, and return the latter's result."""
    found.calls += 1
    found.layers.setdefault(call.module, []).append(call.layer)
    real = own.original_function(module, place.implementation)
    original = mask.original(place.implementation) if isinstance(mask, LazyMask) else mask
    if place.implementation not in place.route.trusted and not own.is_known(module, place.implementation):
        return real(module, call.query, call.key, call.value, original, **kwargs)

    def run(value: Tensor) -> Any:
        return real(module, call.query, call.key, value, original, **kwargs)

    result = run(call.value)
    found.note(call, compare_call(call, result[0], lambda value: run(value)[0]), _hint(call, place.implementation))
    if call.query.dtype in (torch.float16, torch.bfloat16):
        _compare_wide(found, module, real, call, original, kwargs)
    return result


def _hint(call: AttentionCall, implementation: str) -> str:
    """Why transformers' function may differ, in words: what SDPA leaves out of a call, or eager code's float32."""
    parts = [name for name, x in (("softcap", call.softcap), ("sink logits", call.sinks)) if x is not None]
    if implementation == "eager" and call.query.dtype == torch.float64:
        return " (eager code may take its softmax in float32: load it with attn_implementation='sdpa', or in float32)"
    if implementation != "sdpa" or not parts:
        return ""
    return f" (sdpa leaves out its {' and '.join(parts)}: load the model with attn_implementation='eager')"


def _compare_wide(
    found: Verification, module: nn.Module, real: Any, call: AttentionCall, mask: Tensor | None, kwargs: dict[str, Any]
) -> None:
    """The same in float32, where the function takes it: rounding hides nothing there."""
    wide = call.with_(query=call.query.float(), key=call.key.float(), value=call.value.float())
    mask, options = _float32(mask), {name: _float32(value) for name, value in kwargs.items()}

    def run(value: Tensor) -> Tensor:
        output: Tensor = real(module, wide.query, wide.key, value, mask, **options)[0]
        return output

    try:
        output = run(wide.value)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):  # a kernel of half precision only
        return
    found.note(wide, compare_call(wide, output, run))


def _float32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x
