"""The processor of a model of images and text: what turns chats with pictures into the model's inputs."""

from __future__ import annotations

from typing import Any

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.explained import explained, quiet
from headscope.interp.models.language_model import LanguageModel


def processor_of(lm: LanguageModel) -> Any:
    """The processor that came with the model, or the one of the folder or hub repository that it was loaded from.

    It is kept on ``lm``. Only what is on this machine is read: a checkpoint's processor stands beside its weights.

    Raises:
        HeadscopeError: the model reads no pictures, or its processor is not there or cannot be built.
    """
    if lm.processor is not None:
        return lm.processor
    if getattr(lm.inner.config, "vision_config", None) is None:
        raise HeadscopeError(f"{lm.name} ({lm.info.architecture}) reads no pictures: give a model of images and text")
    place = getattr(lm.inner.config, "name_or_path", "")
    if not place:
        raise HeadscopeError(f"{lm.name} came without a processor: pass processor= to load_model")
    from transformers import AutoProcessor

    with explained(f"the processor of {place}"), quiet():
        commit = getattr(lm.inner.config, "_commit_hash", None)
        lm.processor = AutoProcessor.from_pretrained(place, revision=commit, local_files_only=True)
    if not hasattr(lm.processor, "tokenizer"):  # transformers falls back to a tokenizer alone
        lm.processor = None
        raise HeadscopeError(f"{place} holds no processor of pictures: pass processor= to load_model")
    return lm.processor
