"""Where a loaded model's weights are, and in what form: several devices, offloaded to CPU or disk, quantized."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.unwrap import model_device


def devices(model: nn.Module) -> str:
    """The devices of a model in layer order, as one string: ``"cuda:0"``, ``"cuda:0, cuda:1, disk"``.

    ``"cpu (offloaded)"``: the weights are kept elsewhere and fetched there for each call.
    """
    placed = getattr(model, "hf_device_map", None)
    if placed:
        names = [place if place == "disk" else str(torch.device(place)) for place in placed.values()]
    else:
        found = dict.fromkeys(p.device for p in model.parameters())  # few: there are hundreds of parameters
        names = [str(device) if device.type != "meta" else _fetched_to(model) for device in found]
    return ", ".join(dict.fromkeys(names))


def _fetched_to(model: nn.Module) -> str:
    try:
        return f"{model_device(model)} (offloaded)"
    except HeadscopeError:  # a model without weights, for describing only
        return "meta"


def quantization(model: nn.Module) -> str | None:
    """How a model's weights are quantized (``"bitsandbytes 4bit"``, ``"gptq"``), or None."""
    config: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None

    def entry(name: str) -> Any:
        return config.get(name) if isinstance(config, dict) else getattr(config, name, None)

    method = entry("quant_method")
    bits = "4bit" if entry("load_in_4bit") else "8bit" if entry("load_in_8bit") else ""
    return f"{getattr(method, 'value', method)} {bits}".strip()


def parameter_count(model: nn.Module) -> int:
    """How many parameters a model has; packed 4-bit weights count as what they stand for."""
    if hasattr(model, "num_parameters"):
        return int(model.num_parameters())  # type: ignore[operator]
    return sum(parameter.numel() for parameter in model.parameters())


def require_own_weights(module: nn.Module) -> None:
    """Refuse to read weights of which this process holds a part.

    Raises:
        HeadscopeError: says so.
    """
    split = any(hasattr(parameter, "to_local") for parameter in module.parameters())
    if split or any(getattr(part, "_is_hooked", False) for part in module.modules()):  # quantised: plain, and in parts
        raise HeadscopeError(
            f"the weights of this {type(module).__name__} are split over processes (tensor parallelism or FSDP), and a "
            "method that reads them needs them whole: load the model without tp_size, with device_map='auto' if it is "
            "large"
        )


@contextmanager
def fetched(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` (a leaf) with its own weights present inside the block, also where accelerate keeps them elsewhere.

    Raises:
        HeadscopeError: they are split over processes.
    """
    require_own_weights(module)
    with align_module_device(module):
        yield module
