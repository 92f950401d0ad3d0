"""What every way of choosing tokens is: an intervention that takes the place of the model's ``generate``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts.boundary import prompt_boundary
from headscope.interp.registry import check_numbers, make, settings
from headscope.interp.sites.before import before_passes
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.unwrap import bare_model
from headscope.interp.tracing.guards import guard, release
from headscope.interventions import files
from headscope.interventions.base import Intervention
from headscope.interventions.decoding import DECODINGS
from headscope.interventions.prompts import Prompts
from headscope.interventions.words import described, is_default, short, told

# options of generate that change nothing here; any other is refused
_PLAIN = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1, "use_cache": True}


class Decoding(Intervention):
    """Base of the ways of choosing tokens: frozen dataclasses of keywords that write ``continued``.

    Inside ``with apply(model, decoding)`` the model's ``generate`` is this decoding, for one prompt or a batch padded
    on either side, beside edits of attention that are in force; so that ``evaluate`` takes it like an edit. A task that
    does not call ``generate`` is not changed by it, and the block says so.
    """

    kind: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_numbers(self, self.kind)

    @property
    def name(self) -> str:  # type: ignore[override]
        """What results call it: its kind, and the settings that are not the defaults."""
        shown = [told(one, x) for one in fields(self) if not is_default(one, x := getattr(self, one.name))]  # type: ignore[arg-type]
        return f"{self.kind} ({', '.join(shown)})" if shown else self.kind

    def continued(self, model: ModelLike, prompts: Prompts, most: int) -> list[list[int]]:
        """The tokens, at most so many, that each prompt is continued with, the one that ends a text included."""
        raise NotImplementedError

    def concerns(self, module: str, layer: int) -> bool:
        """No layer."""
        return False

    def named_layers(self) -> dict[int, str]:
        """None."""
        return {}

    def with_settings(self, **given: Any) -> Decoding:
        """The same way with other settings, checked like new ones."""
        held = {name: getattr(self, name) for name in settings(type(self))}
        return self.for_its_model(make(type(self), self.kind, {**held, **given}))

    def describe(self) -> dict[str, Any]:
        """Every field."""
        own = {one.name: described(getattr(self, one.name)) for one in fields(self)}  # type: ignore[arg-type]
        return {**super().describe(), "kind": type(self).__name__, **own}

    def document(self, tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
        """Its name in the registry and its settings."""
        here = f"{type(self).__module__}:{type(self).__qualname__}"
        kind = next((name for name, place in DECODINGS.places.items() if place == here), None)
        if kind is None:
            raise HeadscopeError(f"{type(self).__name__} is in no registry, so a file could not name it")
        held = {one.name: getattr(self, one.name) for one in fields(self)}  # type: ignore[arg-type]
        return {"kind": kind, "settings": {name: files.encode(x, prefix + name, tensors) for name, x in held.items()}}

    def __repr__(self) -> str:
        held = [(one, getattr(self, one.name)) for one in fields(self)]  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{f.name}={short(x)}' for f, x in held if not is_default(f, x))})"

    @contextmanager
    def around(self, model: ModelLike) -> Iterator[None]:
        """Its own ``generate`` in place of the model's.

        Raises:
            HeadscopeError: a TransformerBridge or an nnsight wrapper, or a model that generates nothing.
        """
        called, passes = list[int](), list[int]()

        def instead(*args: Any, **options: Any) -> Tensor:
            called.append(1)
            return self._generate(model, args, options)

        made = guard(bare_model(model), "generate", lambda args, options: nullcontext(), instead)
        if made is None:
            raise HeadscopeError(f"{type(bare_model(model)).__name__} has no generate, which {self.kind} stands for")
        try:
            with before_passes(model, lambda inputs: passes.append(1), self.kind):
                yield
        finally:
            release(made)
        if passes and not called:
            warnings.warn(
                f"{self.name} changed nothing in this block: the model's generate was not called",
                UserWarning,
                stacklevel=2,
            )

    def _generate(self, model: ModelLike, args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        """Prompts and what continues them, (prompt, position), as transformers' ``generate`` gives them."""
        inner: Any = bare_model(model)
        given, config = dict(options), inner.generation_config
        if args:
            given.setdefault("input_ids", args[0])
        most = given.pop("max_new_tokens", None) or config.max_new_tokens
        ends = given.pop("eos_token_id", config.eos_token_id)
        pad = given.pop("pad_token_id", config.pad_token_id)
        given.pop("logits_processor", None)  # lm.generate's own: it refuses logits that are not numbers
        for name, value in _PLAIN.items():
            if given.pop(name, value) != value:
                raise HeadscopeError(f"{self.kind} chooses tokens itself: leave out generate's option {name}")
        unknown = [name for name, x in given.items() if not isinstance(x, Tensor | Mapping) and x is not None]
        if unknown or most is None:
            what = f"leave out generate's option {unknown[0]}" if unknown else "say max_new_tokens"
            raise HeadscopeError(f"{self.kind} chooses tokens itself: {what}")
        prompts = Prompts.of(model, given, self.kind)
        if prompts is None:
            raise HeadscopeError(f"{self.kind} begins with a prompt, not with a cache")
        with prompt_boundary(prompts.mask.sum(-1).tolist()):
            rows = self.continued(model, prompts, int(most))
        ids = given["input_ids"]
        fill = pad if pad is not None else ends[0] if isinstance(ends, list) else ends if ends is not None else 0
        width = max(map(len, rows))
        new = [[*row, *[int(fill)] * (width - len(row))] for row in rows]
        return torch.cat([ids, torch.tensor(new, device=ids.device, dtype=ids.dtype)], 1)
