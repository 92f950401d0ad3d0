"""How a model is loaded, with every default decided: precision, device or devices, quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from headscope.interp.errors import HeadscopeError

NEEDS_BITSANDBYTES = "needs bitsandbytes: pip install 'headscope[quantized]'"
DeviceMap = str | Mapping[str, Any]


@dataclass(frozen=True)
class Options:
    """``dtype`` may be ``"auto"``; with a ``device_map``, ``device`` is only where PyTorch would go by itself."""

    dtype: torch.dtype | str
    device: torch.device
    device_map: DeviceMap | None
    quantize: Any
    trust_remote_code: bool
    tokenizer: Any

    @classmethod
    def decide(
        cls,
        dtype: torch.dtype | str | None,
        device: torch.device | str | None,
        device_map: DeviceMap | None,
        quantize: Any,
        **others: Any,
    ) -> Options:
        """Check what the user gave and fill in the rest.

        Raises:
            HeadscopeError: something unknown, or not available here.
        """
        if device is not None and device_map is not None:
            raise HeadscopeError("give device= (all on one) or device_map= (several devices), not both")
        if isinstance(quantize, str):
            if quantize not in ("4bit", "8bit"):
                raise HeadscopeError(
                    f"unknown quantization {quantize!r}: give '4bit', '8bit' or a quantization config of transformers"
                )
            if find_spec("bitsandbytes") is None:
                raise HeadscopeError(f"quantize={quantize!r} {NEEDS_BITSANDBYTES}")
        place = _device(device)
        return cls(_dtype(dtype, place), place, device_map, quantize, **others)

    @property
    def gguf_dtype(self) -> torch.dtype:
        """Dequantized weights have no dtype of their own: float32 unless asked."""
        return self.dtype if isinstance(self.dtype, torch.dtype) else torch.float32

    def arguments(self, config: Any) -> dict[str, Any]:
        """What transformers' ``from_pretrained`` is called with for a checkpoint of this configuration."""
        chosen: dict[str, Any] = {"dtype": self.dtype}
        if self.quantize is not None:
            chosen["quantization_config"] = self._bitsandbytes(config) if self.loads_in_bits else self.quantize
        if self.device_map is not None:
            chosen["device_map"] = self.device_map
        elif not self.is_moved_afterwards(config):
            chosen["device_map"] = {"": self.device}
        return chosen

    @property
    def loads_in_bits(self) -> bool:
        """Whether ``quantize`` is one of our two names."""
        return isinstance(self.quantize, str)

    def is_moved_afterwards(self, config: Any) -> bool:
        """Whether the loaded model is moved as a whole: quantized weights and several devices are placed on loading."""
        quantized = self.quantize is not None or getattr(config, "quantization_config", None) is not None
        return self.device_map is None and not quantized

    def _bitsandbytes(self, config: Any) -> Any:
        from transformers import BitsAndBytesConfig

        if self.quantize == "8bit":
            return BitsAndBytesConfig(load_in_8bit=True)
        own = getattr(config, "dtype", None)
        compute = self.dtype if isinstance(self.dtype, torch.dtype) else own
        compute = compute if isinstance(compute, torch.dtype) else torch.float32
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise HeadscopeError(f"unknown device {str(device)!r}: give 'cpu', 'cuda', 'cuda:0', 'mps' ...") from error
    if place.type == "cuda" and (not torch.cuda.is_available() or (place.index or 0) >= torch.cuda.device_count()):
        raise HeadscopeError(f"device {str(place)!r} is not available to PyTorch here: use device='cpu'")
    return place


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | str:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if found != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise HeadscopeError(f"unknown dtype {dtype!r}: give 'float32', 'bfloat16', 'float16', 'float64' or 'auto'")
    return found
