"""Tiny random models of any architecture in transformers, for tests, teaching and trying things out: no download.

The architecture's own default configuration is shrunk by ``headscope.interp.survey.shrink`` and built with random
weights, scaled so that attention patterns are neither uniform nor one-hot: a mistake in a mask or a scale shows.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.quiet import errors_only
from headscope.interp.survey.shrink import shrink

Kind = Literal["causal-lm", "encoder", "image-text", "encoder-decoder"]
_AUTO: dict[str, tuple[str, ...]] = {
    "causal-lm": ("AutoModelForCausalLM",),
    "encoder": ("AutoModel",),
    "image-text": ("AutoModelForImageTextToText",),
    "encoder-decoder": ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"),
}


def tiny_config(model_type: str, **sizes: Any) -> Any:
    """The shrunk default configuration of a model type of transformers, such as ``"llama"``; ``sizes`` replace its own.

    Raises:
        HeadscopeError: transformers knows no such type, or its configuration cannot be made tiny.
    """
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        raise HeadscopeError(f"transformers {transformers.__version__} has no model type {model_type!r}")
    kind = transformers.CONFIG_MAPPING[model_type]
    try:
        with errors_only():
            return kind.from_dict({**shrink(_seeing(kind).to_dict()), **sizes})
    except Exception as error:
        raise HeadscopeError(_failure(f"the configuration of {model_type}", error)) from error


def tiny_model(
    model_type: str, kind: Kind = "causal-lm", seed: int = 0, *, dtype: torch.dtype = torch.float32, **sizes: Any
) -> Any:
    """A random model of ``model_type`` with two layers (one of each kind it has) on the CPU, in evaluation mode.

    Args:
        model_type: transformers' name, e.g. ``"llama"``, ``"gemma3"``, ``"bert"``, ``"llava"``, ``"whisper"``.
        kind: which of its classes: ``"causal-lm"``, ``"encoder"`` (any base model: text, image or both),
            ``"image-text"``, ``"encoder-decoder"``.
        seed: of the weights; torch's own random state is left as it was.
        dtype: of the weights.
        sizes: fields of the configuration, in place of the tiny ones.

    Raises:
        HeadscopeError: no such type or kind, or the model cannot be built so small.
    """
    import transformers

    if kind not in _AUTO:
        raise HeadscopeError(f"kind is one of {sorted(_AUTO)}, not {kind!r}")
    config = tiny_config(model_type, **sizes)
    autos = [getattr(transformers, name) for name in _AUTO[kind]]
    auto = next((a for a in autos if type(config) in a._model_mapping), None)
    if auto is None:
        raise HeadscopeError(f"{model_type} has no {kind} model in transformers {transformers.__version__}")
    with torch.random.fork_rng(devices=[]), errors_only():
        torch.manual_seed(seed)
        try:
            model = auto.from_config(config, dtype=torch.float32).eval()
        except Exception as error:
            raise HeadscopeError(_failure(f"a tiny {model_type}", error)) from error
        _spread(model)
    return model.to(dtype)


def _seeing(kind: Any) -> Any:
    """The default configuration, with a vision tower where the architecture has one that it leaves open."""
    default: Any = kind()
    tower: Any = getattr(kind, "sub_configs", {}).get("vision_config")
    if getattr(default, "vision_config", tower) is None and getattr(tower, "model_type", None):
        return kind(vision_config=tower().to_dict())
    return default


def parameter_seed(name: str) -> int:
    """A seed for one parameter, the same in every run."""
    return sum((i + 1) * ord(c) for i, c in enumerate(name)) % (2**31)


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Random weights of unit gain; queries and keys thereby get scores that spread over a few units."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn_like(parameter)
        if parameter.dim() >= 2:
            fan_in = parameter.shape[0] if type(_owner(model, name)).__name__ == "Conv1D" else parameter[0].numel()
            embedding = isinstance(_owner(model, name), nn.Embedding)
            parameter.copy_(noise * (0.5 if embedding else max(1, fan_in) ** -0.5))
        else:
            parameter.add_(0.1 * noise)


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _failure(what: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines)[:160] if lines else "no message"
    return f"{what} cannot be built: {type(error).__name__}: {text}"


__all__ = ["Kind", "tiny_config", "tiny_model"]
