"""What a checkpoint's folder holds: which class it was saved as, weights that are no pickles, its fingerprint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.options import Options

INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


def refuse_pickles(folder: Path, place: str) -> None:
    """Refuse weights other than safetensors files in ``folder`` itself: transformers unpickles what an index names,
    and an adapter loads another model, of which the revision says nothing.

    Raises:
        HeadscopeError: names the file.
    """
    if (folder / "adapter_config.json").is_file():
        raise HeadscopeError(f"{place} holds an adapter of another model: load it with peft and pass the object")
    if not (folder / INDEX).is_file():
        return
    try:
        files = set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HeadscopeError(f"{folder / INDEX} cannot be read ({error!r}): save the model again") from error
    for file in sorted(map(str, files)):
        if not file.endswith(".safetensors") or Path(file).name != file:
            raise HeadscopeError(
                f"{folder / INDEX} names {file!r}, which is no safetensors file beside it: save the model with "
                "save_pretrained (headscope reads no pickles)"
            )


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _saved_encoder(config: Any) -> Any:
    """The class that an encoder was saved as (BERT without a head, or with another than a language model's), or None.

    The causal class that transformers has for encoders too would find its head missing.
    """
    decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    if decodes or type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        return None
    kind = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    return kind if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) else None


def auto_class(config: Any, place: str, options: Options) -> Any:
    saved = _saved_encoder(config)
    if saved is not None:
        return saved
    own_code = getattr(config, "auto_map", None) or {}
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if options.trust_remote_code and "AutoModelForCausalLM" in own_code:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise HeadscopeError(
        f"{place} is a {config.model_type} model, not a causal language model: load it with transformers and pass the "
        "object to load_model"
    )


def fingerprint(folder: Path) -> str:
    """SHA-256 over config.json, the index of weights, the folder's own code, and samples of every safetensors file
    (its size, its first MiB, 64 blocks of 64 KiB).

    Reading all of a large checkpoint would take longer than loading it; training any layer changes the samples.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob(INDEX), *folder.glob("*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            for block in range(64):
                stream.seek(size * block // 64)
                digest.update(stream.read(1 << 16))
    return digest.hexdigest()
