"""Which module of each attention layer receives the concatenated heads, found by watching one short forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.info import text_config
from headscope.interp.models.placement import require_own_weights
from headscope.interp.sites.compiled import uncompiled
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.unwrap import bare_model, model_device, origin

_NAME = "headscope_projection_probe"


def output_projections(model: ModelLike, inputs: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The output projection of every attention module: {attention module's name: leaf module's name}.

    The leaf's input holds the heads' outputs side by side, in head order: (batch, query, heads * d_value). No name is
    assumed: during one forward of four tokens each attention call returns noise of its own, and the first leaf module
    whose input is that noise is the layer's output projection. The model is left as it was found, also after an error.

    Takes a LanguageModel or a bare Hugging Face model; ``inputs`` replaces the four tokens (for a model whose input is
    not text). Raises HeadscopeError where attention does not go through transformers' attention interface, or where
    something (a gate) changes the heads' outputs before the projection.
    """
    module = bare_model(model)
    if origin(model) == "transformer_lens":
        raise HeadscopeError(
            f"a TransformerBridge computes {type(module).__name__}'s attention itself, so its output projections are "
            "not found: load the model with load_model or transformers, and give that"
        )
    require_own_weights(module)  # who asks for a projection reads it
    watch = _Watch(module)
    with uncompiled(), _probing(module, watch), torch.no_grad():
        try:
            module(**(inputs if inputs is not None else _four_tokens(module)))
        except Exception as error:
            if not watch.waiting:  # own attention code, which our mask function left without a mask
                raise HeadscopeError(_not_routed(module)) from error
            raise HeadscopeError(
                f"{type(module).__name__} does not run on four tokens ({type(error).__name__}: {str(error)[:120]}): "
                "give output_projections the inputs that it needs"
            ) from error
    if not watch.waiting:
        raise HeadscopeError(_not_routed(module))
    if watch.unseen:
        raise HeadscopeError(
            f"{type(module).__name__}: the heads of {sorted(watch.unseen)[0]} do not reach any module unchanged "
            "(something acts on them first): headscope cannot tell its output projection"
        )
    return watch.found


def _not_routed(module: nn.Module) -> str:
    return (
        f"{type(module).__name__} does not call transformers' attention interface: headscope cannot see its heads; "
        "use an architecture that does (Llama, Qwen, Gemma, Mistral, GPT-2, GPT-NeoX, Phi, OPT ...)"
    )


class _Watch:
    """The attention function that returns noise, and the hook that looks for that noise in every leaf's input."""

    def __init__(self, module: nn.Module) -> None:
        self.names = {id(part): name for name, part in module.named_modules()}
        self.found: dict[str, str] = {}
        self.waiting: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    @property
    def unseen(self) -> set[str]:
        """Attention modules whose heads have not been seen at a leaf."""
        return self.waiting.keys() - self.found.keys()

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """An attention function as transformers calls it; returns (batch, query, head, d_value)."""
        batch, heads, queries, _ = query.shape
        noise = torch.randn(batch, queries, heads, value.shape[-1], generator=self.generator)
        output = noise.to(value.device, value.dtype)
        self.waiting[self.names[id(module)]] = output.clone()
        return output, None

    def look(self, leaf: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pre-forward hook."""
        for x in (*args, *kwargs.values()):
            if not isinstance(x, Tensor):
                continue
            for name, output in self.waiting.items():
                if name not in self.found and _same(x, output):
                    self.found[name] = self.names[id(leaf)]


def _same(x: Tensor, output: Tensor) -> bool:
    if x.numel() != output.numel() or x.ndim < 2 or x.shape[-1] != output.shape[-2] * output.shape[-1]:
        return False
    return x.device == output.device and torch.equal(x.reshape(-1), output.reshape(-1).to(x.dtype))


def _four_tokens(module: Any) -> dict[str, Any]:
    if getattr(module, "main_input_name", "input_ids") != "input_ids":
        raise HeadscopeError(f"{type(module).__name__} does not read text: give output_projections the inputs it needs")
    ids = torch.arange(1, 5, device=model_device(module))[None] % text_config(module.config).vocab_size
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if getattr(module.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


@contextlib.contextmanager
def _probing(module: Any, watch: _Watch) -> Iterator[None]:
    """Route attention through the watch and hook every leaf; undo all of it on the way out."""
    # Dropout passes its input on in evaluation: it is never the projection.
    leaves = [m for m in module.modules() if not any(m.children()) and not isinstance(m, nn.Dropout | nn.Identity)]
    hooks = [leaf.register_forward_pre_hook(watch.look, with_kwargs=True) for leaf in leaves]
    try:
        with routed(module, watch.attend):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def routed(module: Any, attend: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Inside the block every attention call of a Hugging Face model goes to ``attend``, which is called as transformers
    calls an attention function; no mask is made, and modules evaluate. All of it is undone, also after an error."""
    configs = _configs(module)
    training = {part: part.training for part in module.modules()}
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    try:
        module.eval()
        for config, _ in configs:
            config._attn_implementation_internal = _NAME
        yield
    finally:
        for config, implementation in configs:
            config._attn_implementation_internal = implementation
        for part, was in training.items():
            part.training = was
        # There is no public way to take a name out again.
        AttentionInterface._global_mapping.pop(_NAME, None)
        AttentionMaskInterface._global_mapping.pop(_NAME, None)


def _configs(module: nn.Module) -> list[tuple[Any, str | None]]:
    """Every configuration object inside the model with its attention implementation."""
    seen: dict[int, Any] = {}
    queue = [part.config for part in module.modules() if hasattr(part, "config")]
    while queue:
        config = queue.pop()
        if id(config) in seen or not hasattr(config, "_attn_implementation_internal"):
            continue
        seen[id(config)] = config
        queue += [getattr(config, key) for key in getattr(config, "sub_configs", {}) if getattr(config, key, None)]
    return [(config, config._attn_implementation_internal) for config in seen.values()]
