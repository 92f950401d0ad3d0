"""Where a number came from: model, revision, versions, seed, parameters, the prompts' hash."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray as xr
    from torch import Tensor, nn

    from headscope.interp.sites.given import ModelLike


def provenance(
    model: ModelLike | None = None, *, seed: int | None = None, prompts: Iterable[str] | None = None, **parameters: Any
) -> dict[str, Any]:
    """A JSON-able description of a run. ``model`` is a LanguageModel or a bare Hugging Face module."""
    record: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": {"python": platform.python_version(), "platform": platform.machine()},
        "parameters": parameters,
    }
    if model is not None:
        from headscope.interp.errors import HeadscopeError
        from headscope.interp.models.placement import devices, quantization
        from headscope.interp.sites.unwrap import bare_model

        inner: Any
        try:
            inner = bare_model(model)
        except HeadscopeError:
            inner = getattr(model, "model", model)
        name = getattr(model, "name", None)
        record["model"] = {
            "name": (name if isinstance(name, str) else None)
            or getattr(getattr(inner, "config", None), "name_or_path", "")
            or type(inner).__name__,
            "revision": getattr(model, "revision", None),
            "architecture": type(inner).__name__,
            "dtype": str(getattr(inner, "dtype", "")).removeprefix("torch."),
            "device": devices(inner) if hasattr(inner, "parameters") else "",
        }
        form = quantization(inner)
        record["model"] |= {} if form is None else {"quantization": form}
    if seed is not None:
        record["seed"] = seed
    if prompts is not None:
        record["prompts_sha256"] = hash_texts(prompts)
    return record


def signed(record: xr.Dataset, model: ModelLike, **parameters: Any) -> xr.Dataset:
    """A traced record (an xarray Dataset) with its provenance as the attribute ``headscope``, as JSON."""
    made = provenance(model, **parameters)
    made["tokens_sha256"] = _sha256(record["token"].to_numpy().tobytes() if "token" in record else b"")
    return record.assign_attrs(headscope=json.dumps(made, default=str))


def versions() -> dict[str, str]:
    """Versions of the libraries that decide the numbers."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:  # reading them from disk takes as long as a short pass
    found = {}
    for name in ("headscope", "torch", "transformers", "tokenizers", "numpy", "scikit-learn", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hash_texts(texts: Iterable[str]) -> str:
    """SHA-256 over the texts, each closed by a byte that UTF-8 never uses, so that boundaries count."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8") + b"\xff")
    return digest.hexdigest()


def describe(value: Any) -> Any:
    """A declaration (a statistic, a selection of queries) as JSON-able values that are equal where its results are.

    Tensors and arrays become hashes of their bytes. A function is its name, its code and what it closes over.

    Raises:
        HeadscopeError: an object that cannot be told from another by its contents.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        return [describe(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if hasattr(value, "tobytes"):
        return {"shape": list(value.shape), "type": str(value.dtype), "sha256": _sha256(value.tobytes())}
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: describe(getattr(value, field.name)) for field in fields(value)}
        return {type(value).__qualname__: held}
    if isinstance(value, FunctionType):
        closure = [describe(cell.cell_contents) for cell in value.__closure__ or ()]
        return {value.__qualname__: [_code(value.__code__), closure, describe(value.__defaults__)]}
    from headscope.interp.errors import HeadscopeError

    raise HeadscopeError(
        f"{value!r} cannot be compared between runs; use numbers, tensors, plain functions or dataclasses"
    )


def _code(code: CodeType) -> str:
    constants = [_code(item) if isinstance(item, CodeType) else repr(item) for item in code.co_consts]
    return _sha256(repr((code.co_code.hex(), code.co_names, constants)).encode())


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a few hundred weights of every parameter: tells models of one name apart, not one changed weight.

    Under tensor parallelism all processes must call it. Quantised weights are then each process's own part, and their
    scales belong to that part: it is another model's than that of the same weights quantised whole, as they are.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        for held in _plain(parameter) if not parameter.is_meta and parameter.numel() else ():
            flat = held.detach().reshape(-1)
            few = flat[:: max(1, flat.numel() // 256)]
            digest.update(
                few.double().cpu().numpy().tobytes() if few.is_floating_point() else repr(few.tolist()).encode()
            )
    return _of_all(model, digest.hexdigest())


def _plain(weights: Any) -> list[Tensor]:
    """The plain tensors that weights consist of: whole, where they are split over processes; packed numbers and scales,
    where they are quantised."""
    if hasattr(weights, "full_tensor"):
        return _plain(weights.full_tensor())
    if hasattr(weights, "__tensor_flatten__"):
        return [x for name in weights.__tensor_flatten__()[0] for x in _plain(getattr(weights, name))]
    return [weights]


def _of_all(model: nn.Module, mine: str) -> str:
    """One fingerprint for all processes that hold parts of ``model``: each one's, where they are the same."""
    from torch import distributed as dist

    from headscope.interp.sites.huggingface.parallel import tensor_mesh

    mesh = tensor_mesh(model)
    if mesh is None:
        return mine
    found = [mine] * mesh.size()
    dist.all_gather_object(found, mine, group=mesh.get_group())
    return mine if len(set(found)) == 1 else hash_texts(found)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
