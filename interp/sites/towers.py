"""Which tower of a model an attention module belongs to, from the model's structure; names for ``trace(tower=...)``.

Modules of one kind are a pattern of names such as ``"model.layers.*.self_attn"``. Its tower is one of ``TOWERS``; a
tower's name selects all patterns of that tower, and a pattern selects itself.

What transformers says of a model decides: ``get_encoder`` and ``get_decoder`` of every part that is an encoder-decoder,
the part that a text configuration belongs to, the encoders of images and sound, and ``is_cross_attention``. The
innermost such part that holds a module is its tower. Names decide where none of that is said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.unwrap import bare_model

TOWERS = ("language", "vision", "audio", "encoder", "decoder", "cross", "connector")
EVERY = "all"  # a handler of every tower
_CROSS = re.compile(r"cross_?att|encoder_attn|enc(oder_)?_?dec(oder_)?_?att|x_?attn", re.IGNORECASE)
_CONNECTOR = re.compile(r"perceiver|resampler|q_?former|connector|projector|pooler|adapter|mapper", re.IGNORECASE)
_VISION = re.compile(r"vision|visual|image_(tower|encoder|model)|pixel|(^|\.)vit|vpm|sam_|vqmodel", re.IGNORECASE)
_AUDIO = re.compile(r"audio|speech|sound", re.IGNORECASE)
_READS = {"vision": ("pixel_values",), "audio": ("input_features", "input_values")}
_KNOWN: WeakKeyDictionary[nn.Module, dict[str, str]] = WeakKeyDictionary()


def parse_name(name: str, module: nn.Module | None) -> tuple[str, int]:
    """A module's pattern of names and its layer: "model.layers.3.self_attn" is ("model.layers.*.self_attn", 3).

    A name with several numbers has the first one's layer here; ``numbered`` counts such layers through.
    """
    # what a TransformerBridge puts between a layer and its parts, and torch.compile around a part
    name = name.replace("._original_component", "").replace("._orig_mod", "")
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", name)
    where = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
    layer = int(numbers[0]) if numbers else getattr(module, "layer_idx", None)
    return where, 0 if layer is None else int(layer)


def numbered(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, int]]:
    """Every module with its name, pattern and layer; the layers of a tower in stages count through them."""
    ranks: dict[str, int] = {}
    for name, module in model.named_modules():
        where, layer = parse_name(name, module)
        if where.count("*") > 1:
            layer = ranks[where] = ranks.get(where, -1) + 1
        yield name, module, where, layer


def modules_of(model: ModelLike) -> set[str]:
    """The patterns of the model's modules that stand in layers, attention or not, and attention that stands alone."""
    names = (parse_name(name, module)[0] for name, module in bare_model(model).named_modules())
    return {name for name in names if "*" in name or "att" in name}


def tower_of(module: str, model: nn.Module) -> str:
    """The tower of a pattern of modules: one of ``TOWERS``."""
    known = _KNOWN.get(model, {})
    if module in known:
        return known[module]
    where = parse_name(module, None)[0]
    if where not in known:
        _KNOWN[model] = _towers(model)
    return _KNOWN[model].get(where) or _by_name(where, model)


def default_tower(modules: set[str], model: nn.Module) -> str:
    """The tower recorded where none is named: the one that reads or writes text, if there is one."""
    present = {tower_of(module, model) for module in modules}
    return next((name for name in ("language", "decoder", *TOWERS) if name in present), "language")


def selects(chosen: str, module: str, model: nn.Module) -> bool:
    """Whether the name given as ``tower=`` (a tower's or a pattern) means these modules."""
    if chosen in TOWERS:
        at = tower_of(module, model)
        reads = at == "encoder" and getattr(model, "main_input_name", "") in _READS.get(chosen, ())
        return at == chosen or (chosen == "language" and at == "decoder") or reads
    return chosen in (EVERY, module)


def check_name(chosen: str | None, modules: set[str]) -> None:
    """Refuse a name that is neither an alias nor one of the model's patterns.

    Raises:
        HeadscopeError: the message lists what may be named.
    """
    if chosen is not None and chosen not in (*TOWERS, EVERY) and chosen not in modules:
        known = ", ".join(sorted(module for module in modules if "attn" in module or "attention" in module)[:8])
        raise HeadscopeError(f"no tower {chosen!r}: name one of ({', '.join(TOWERS)}) or a module pattern ({known})")


def _towers(model: nn.Module) -> dict[str, str]:
    roots, modules = _roots(model), dict(model.named_modules())
    found: dict[str, str] = {}
    for name, module in modules.items():
        where = parse_name(name, module)[0]
        if where in found:
            continue
        parts = name.split(".")
        above = [".".join(parts[:end]) for end in range(len(parts), -1, -1)]
        root = next((at for at in above if modules.get(at) in roots), None)
        below = where if root is None else ".".join(where.split(".")[root.count(".") + 1 if root else 0 :])
        parent = modules[".".join(parts[:-1])]
        if _is_cross(module, parent) or _CROSS.search(below):
            found[where] = "cross"
        else:
            found[where] = _by_name(where, model) if root is None else _within(roots[modules[root]], below)
    return found


def _is_cross(module: nn.Module, parent: nn.Module) -> bool:
    marked = any(getattr(part, "is_cross_attention", False) is True for part in (module, parent))
    return marked or "CrossAttention" in type(module).__name__


def _within(root: str, below: str) -> str:
    """The tower of a module of a part: only an encoder may hold others, and only what reads images has a connector."""
    if root in ("language", "decoder"):
        return root
    named = (("connector", _CONNECTOR), ("vision", _VISION), ("audio", _AUDIO))[: 3 if root == "encoder" else 1]
    return next((tower for tower, pattern in named if pattern.search(below)), root)


def _roots(model: nn.Module) -> dict[nn.Module, str]:
    """The parts of a model that transformers names: encoders, decoders, text models, encoders of images and sound."""
    found: dict[nn.Module, str] = {}
    for part in model.modules():
        config: Any = getattr(part, "config", None)
        if config is None or not hasattr(part, "get_encoder"):
            continue
        if getattr(config, "is_encoder_decoder", False) is True:
            named = {"encoder": _asked(part, "get_encoder"), "decoder": _asked(part, "get_decoder")}
        else:
            text = _asked(part, "get_decoder")
            kind = getattr(getattr(config, "text_config", None), "model_type", None)
            same = kind is not None and getattr(getattr(text, "config", None), "model_type", "") == kind
            named = {"language": text if same else None}
        named |= {"vision": _asked(part, "get_encoder", "image"), "audio": _asked(part, "get_encoder", "audio")}
        for tower, root in named.items():
            if root is not None and root is not part:
                found.setdefault(root, tower)
    return found


def _asked(part: nn.Module, name: str, *modality: str) -> nn.Module | None:
    try:
        found = getattr(part, name)(*modality)
    except (AttributeError, TypeError, ValueError, NotImplementedError):  # overrides that do not know the question
        return None
    return found if isinstance(found, nn.Module) else None


def _by_name(module: str, model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    for tower, pattern in (("cross", _CROSS), ("connector", _CONNECTOR), ("vision", _VISION), ("audio", _AUDIO)):
        if pattern.search(module):
            return tower
    if getattr(config, "is_encoder_decoder", False):
        return "encoder" if re.search(r"(^|[._])encoder\.", module) else "decoder"
    reads = getattr(model, "main_input_name", "input_ids")
    if not hasattr(config, "text_config"):
        return next((tower for tower, inputs in _READS.items() if reads in inputs), "language")
    return "language"
