"""Interventions as files: one safetensors file, tensors as tensors and everything else as JSON in its header.

Nothing in a file is executed: it names an edit of the registry, and settings that the edit's own constructor checks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.results.headset import HeadSet
from headscope.interp.runs.files import write_atomically
from headscope.interp.runs.provenance import fingerprint, provenance
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.unwrap import bare_model

FORMAT = 1
SHAPES = ("architecture", "layers", "heads", "d_model")


def tensor_hash(x: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in any dtype."""
    flat = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A setting as JSON; tensors go to ``tensors`` under ``name``.

    Raises:
        HeadscopeError: an object that a file cannot hold without executing something.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, HeadSet):
        return {"heads": [list(head) for head in value], "weights": list(value.weights), "name": value.name}
    if isinstance(value, list | tuple):
        items = [encode(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return {type(value).__name__: items}
    if isinstance(value, Mapping):
        pairs = [
            [encode(key, f"{name}.{i}.key", tensors), encode(item, f"{name}.{i}", tensors)]
            for i, (key, item) in enumerate(value.items())
        ]
        return {"dict": pairs}
    raise HeadscopeError(
        f"{name} is a {type(value).__name__}, which a file cannot hold: use numbers, strings, tensors, lists or dicts"
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What ``encode`` was given.

    Raises:
        ValueError, KeyError, TypeError: something else.
    """
    if not isinstance(value, dict):
        return value
    if "heads" in value:
        pairs = tuple((int(layer), int(head)) for layer, head in value["heads"])
        return HeadSet(pairs, tuple(value["weights"]), str(value["name"]))
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "float":
        return float(held)
    if kind == "dict":
        return {decode(key, tensors): decode(item, tensors) for key, item in held}
    items = [decode(item, tensors) for item in {"list": held, "tuple": held}[kind]]
    return tuple(items) if kind == "tuple" else items


def write(path: str | Path, document: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write an intervention's document and tensors, with a hash of both."""
    held = {"format": FORMAT, **document}
    header = {"headscope": json.dumps(held), "sha256": _hash(held, tensors)}
    write_atomically(Path(path), save_tensors(tensors, metadata=header))
    return Path(path)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document and the tensors of a file that ``write`` wrote.

    Raises:
        HeadscopeError: no such file, another kind of file, another format, or contents that were changed since.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise HeadscopeError(f"cannot read {path} ({error.strerror}); give a file that an edit's save wrote") from error
    try:
        tensors = load_tensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        document, digest = dict(json.loads(header["headscope"])), header["sha256"]
        found = document["format"]
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise not_saved(path, error) from error
    if found != FORMAT:
        raise HeadscopeError(f"{path} is an intervention of format {found}, this version reads {FORMAT}")
    if _hash(document, tensors) != digest:
        raise HeadscopeError(f"{path} was changed or damaged after it was saved (its hash differs); save it again")
    return document, tensors


def not_saved(path: str | Path, error: Exception) -> HeadscopeError:
    """The refusal of a file that is no saved intervention."""
    why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return HeadscopeError(f"{path} is not a saved intervention ({why}); give a file that an edit's save wrote")


def _hash(document: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    held = {name: [str(x.dtype), list(x.shape), tensor_hash(x)] for name, x in tensors.items()}
    return hashlib.sha256(json.dumps([document, held], sort_keys=True).encode()).hexdigest()


def signature(model: ModelLike) -> dict[str, Any]:
    """What tells a model from others: its name and revision, its shapes, a hash of a few weights."""
    inner = bare_model(model)
    config = inner.config.get_text_config()
    made = provenance(model)["model"]
    sizes = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "d_model": "hidden_size"}
    return {
        **{key: made[key] for key in ("name", "revision", "architecture")},
        **{key: int(getattr(config, name, 0) or 0) for key, name in sizes.items()},
        "fingerprint": fingerprint(inner),
    }


def require_model(made_for: Mapping[str, Any] | None, model: ModelLike, what: str) -> None:
    """Refuse an intervention that was saved for another model.

    Equal revisions are the same weights in any precision; where one of them is unknown, the weights are compared.

    Raises:
        HeadscopeError: names both models.
    """
    if made_for is None:
        return
    here = signature(model)
    for key in SHAPES:
        if made_for.get(key) != here[key]:
            raise HeadscopeError(
                f"{what} was saved for {made_for.get('name')} with {key} {made_for.get(key)}, this model has "
                f"{here[key]}; make it again on this model"
            )
    known = made_for.get("revision") is not None and made_for.get("revision") == here["revision"]
    if not known and made_for.get("fingerprint") != here["fingerprint"]:
        raise HeadscopeError(
            f"{what} was saved for {made_for.get('name')} (revision {made_for.get('revision')}), this is "
            f"{here['name']} (revision {here['revision']}) with other weights; make it again on this model, or load it "
            "with load_intervention(path, any_model=True)"
        )
