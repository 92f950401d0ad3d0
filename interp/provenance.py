"""Where a number came from: model, revision, versions, seed, parameters, the prompts' hash."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from typing import Any


def provenance(
    model: Any = None, *, seed: int | None = None, prompts: Iterable[str] | None = None, **parameters: Any
) -> dict[str, Any]:
    """A JSON-able description of a run. ``model`` is a LanguageModel or a bare Hugging Face module."""
    record: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": {"python": platform.python_version(), "platform": platform.machine()},
        "parameters": parameters,
    }
    if model is not None:
        from headscope.interp.attention import bare_model
        from headscope.interp.errors import HeadscopeError

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
            "device": str(getattr(inner, "device", "")),
        }
    if seed is not None:
        record["seed"] = seed
    if prompts is not None:
        record["prompts_sha256"] = hash_texts(prompts)
    return record


def versions() -> dict[str, str]:
    """Versions of the libraries that decide the numbers."""
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
