"""What a model is: its sizes, read from its configuration with care for what configurations leave out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.placement import devices, parameter_count, quantization
from headscope.interp.sites.given import PreTrained


@dataclass(frozen=True)
class ModelInfo:
    """The sizes of a model's text tower.

    ``heads`` are query heads; ``kv_heads`` is smaller under grouped-query attention. ``d_head`` is the width of one
    head's query and key, ``d_value`` of its output (they differ in DeepSeek's latent attention). ``context_length`` is
    None where the configuration sets no limit. ``sliding_window`` holds each layer's window in tokens (the query itself
    included; None for a layer without one), or is None where no layer has one. ``dtype`` (of what is computed, where
    weights are quantized), ``device`` (several in layer order) and ``quantization`` (``"bitsandbytes 4bit"``, or None)
    are what they were when the model was described.
    """

    architecture: str
    model_type: str
    layers: int
    heads: int
    kv_heads: int
    d_head: int
    d_value: int
    d_model: int
    context_length: int | None
    vocab_size: int
    dtype: str
    device: str
    parameters: int
    sliding_window: tuple[int | None, ...] | None
    attention_implementation: str | None
    quantization: str | None = None

    @classmethod
    def from_model(cls, model: PreTrained) -> ModelInfo:
        """Describe a Hugging Face model (the text tower of a model with several)."""
        name = type(model).__name__
        if not hasattr(model, "config") or not hasattr(model, "parameters"):
            raise HeadscopeError(f"{name} is not a Hugging Face model: give a transformers model, a name or a path")
        config = text_config(model.config)
        layers = _size(config, name, "num_hidden_layers")
        heads = _size(config, name, "num_attention_heads")
        d_model = _size(config, name, "hidden_size")
        d_head, d_value = _head_sizes(config, heads, d_model)
        return cls(
            architecture=name,
            model_type=config.model_type,
            layers=layers,
            heads=heads,
            kv_heads=_kv_heads(config, heads),
            d_head=d_head,
            d_value=d_value,
            d_model=d_model,
            context_length=_context_length(config),
            vocab_size=_size(config, name, "vocab_size"),
            dtype=str(model.dtype).removeprefix("torch."),
            device=devices(model),
            parameters=parameter_count(model),
            sliding_window=_sliding_window(config, layers),
            attention_implementation=getattr(config, "_attn_implementation", None),
            quantization=quantization(model),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def text_config(config: Any) -> Any:
    """The configuration of the text tower (of the decoder where there are two), or the configuration itself."""
    inner = getattr(config, "text_config", None)
    if inner is not None:
        return inner
    try:
        return config.get_text_config(decoder=True)
    except (AttributeError, TypeError, ValueError):
        return config


def _size(config: Any, name: str, key: str) -> int:
    value = getattr(config, key, None)
    if not isinstance(value, int):  # absent (no attention heads at all), or one value per layer
        raise HeadscopeError(f"{name} has no single {key} ({value!r}): headscope reads models whose layers are alike")
    return value


def _kv_heads(config: Any, heads: int) -> int:
    if getattr(config, "new_decoder_architecture", False):  # Falcon 40B and later
        return int(config.num_kv_heads)
    if getattr(config, "multi_query", False):  # Falcon 7B, StarCoder 1
        return 1
    return int(getattr(config, "num_key_value_heads", None) or heads)


def _head_sizes(config: Any, heads: int, d_model: int) -> tuple[int, int]:
    nope = getattr(config, "qk_nope_head_dim", None)
    if nope is not None:  # latent attention: the configuration's head_dim is the rotary part only
        d_head = int(nope) + int(config.qk_rope_head_dim)
        return d_head, int(getattr(config, "v_head_dim", None) or d_head)
    d_head = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or d_model // heads
    return int(d_head), int(d_head)


def _context_length(config: Any) -> int | None:
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _sliding_window(config: Any, layers: int) -> tuple[int | None, ...] | None:
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    local = getattr(config, "attention_layers", None)  # GPT-Neo
    if local is not None and hasattr(config, "window_size"):
        types, window = [f"{kind}_attention" for kind in local], config.window_size
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    if types is None:
        return (int(window),) * layers
    windows = tuple(int(window) if kind in ("sliding_attention", "local_attention") else None for kind in types)
    return windows if any(w is not None for w in windows) else None
