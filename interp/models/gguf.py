"""GGUF files through transformers, as ordinary float models that can be saved again."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headscope.interp.errors import HeadscopeError

if TYPE_CHECKING:
    import torch


def read_gguf(path: Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The dequantized model (float32 unless asked) and the tokenizer of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise HeadscopeError(
            f"{path} is not a GGUF file (it starts with {magic!r}): give a .gguf file or a model folder"
        )
    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # transformers' own progress bars
            model = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype or torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**place)
    except ImportError as error:
        raise HeadscopeError(f"reading GGUF files needs the gguf and accelerate packages ({_line(error)})") from error
    except Exception as error:  # the reader raises whatever the broken bytes lead to
        raise HeadscopeError(
            f"cannot read {path} as a GGUF model ({_line(error)}): the file is corrupt or cut short (fetch it again), "
            "or transformers does not know its architecture"
        ) from error
    _forget_quantization(model)
    return model.eval(), tokenizer


def _forget_quantization(model: Any) -> None:
    """A model read from GGUF is dequantized, but says that it is not and then refuses to be saved."""
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    model.hf_quantizer = None
    model.is_quantized = False


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the GGUF's model (float32 safetensors), configuration and tokenizer into ``folder``."""
    from safetensors import SafetensorError

    model, tokenizer = read_gguf(path)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            model.save_pretrained(folder, max_shard_size="1000GB")  # one file: model.safetensors
            tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(str(error)) from error


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
