"""What a model is called in annotations: as a user holds it, and as transformers made it.

``ModelLike`` is what ``trace``, ``apply`` and the like take (``Loadable``: or a name), and ``PreTrained`` the module
inside, which ``bare_model`` gives. A model that is loaded, with its tokenizer, is a ``LanguageModel`` of
``headscope.interp.models``; a part of a model is torch's ``nn.Module``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn


class HoldsModel(Protocol):
    """``load_model``'s result, as far as the floors below it know it."""

    @property
    def model(self) -> Any:
        """The Hugging Face model."""


class HoldsModule(Protocol):
    """An nnsight wrapper."""

    @property
    def _module(self) -> nn.Module: ...


ModelLike = nn.Module | HoldsModel | HoldsModule  # a Hugging Face model or a TransformerBridge is an nn.Module
Loadable = ModelLike | str | Path  # what load_model takes: also a name, a folder, a file

if TYPE_CHECKING:

    class PreTrained(nn.Module):
        """A transformers model for type checkers: torch's own typing calls any further attribute a tensor or a module,
        and transformers' is not read."""

        config: Any
        generation_config: Any
        device: torch.device
        dtype: torch.dtype
        generate: Callable[..., Any]
        get_input_embeddings: Callable[..., Any]
        get_output_embeddings: Callable[..., Any]
        set_attn_implementation: Callable[..., None]
else:
    PreTrained = nn.Module
