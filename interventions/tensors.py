"""Tensors of an edit by name, as the command line gives them: ``FILE.safetensors``, or ``FILE.safetensors:NAME``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.registry import settings

END = ".safetensors"


def with_tensors(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an edit in which names of files stand for tensors, where the edit takes tensors.

    Raises:
        HeadscopeError: no such file, no such tensor in it, or several without a name.
    """
    takes = {name for name, one in settings(cls).items() if "Tensor" in one.type}
    return {name: tensor(x) if name in takes and isinstance(x, str) else x for name, x in given.items()}


def tensor(place: str) -> Tensor:
    """The tensor that ``FILE.safetensors`` holds, or ``FILE.safetensors:NAME`` where it holds several.

    Raises:
        HeadscopeError: see above.
    """
    before, found, name = place.rpartition(END)
    file = Path(before + END)
    if not found or (name and not name.startswith(":")):
        raise HeadscopeError(f"{place!r} names no tensor; give FILE{END}, or FILE{END}:NAME")
    try:
        held: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise HeadscopeError(f"cannot read tensors from {file} ({error}); give a safetensors file") from error
    if not name and len(held) == 1:
        return next(iter(held.values()))
    if name[1:] not in held:
        what = f"no tensor {name[1:]!r}" if name else f"{len(held)} tensors"
        raise HeadscopeError(f"{file} holds {what}; name one of them: {file}:{next(iter(sorted(held)), '...')}")
    return held[name[1:]]
