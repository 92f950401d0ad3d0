"""A configuration of any architecture made tiny: one set of rules by what a size means, never by architecture.

Every width becomes one number, every count of heads another, and so on, through all sub-configurations, so that sizes
that had to agree before still do. Lists with one entry a layer keep one layer of each kind.
"""

from __future__ import annotations

import re
from typing import Any

WIDTH, HEADS, KV_HEADS, HEAD = 128, 4, 2, 32
VOCAB, FIRST_TOKEN, POSITIONS, WINDOW = 128, 100, 160, 8
IMAGE, PATCH = 32, 8
EXPERTS = 4

# Only where a configuration's own validation or a size that no name tells demands it.
HINTS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},  # by default every layer is recurrent
    "llama4_vision_model": {"intermediate_size": 4 * WIDTH},  # pixel shuffle joins four patches before it
    "granitemoehybrid": {
        "layers_block_type": ["mamba", "attention"],
        "layer_types": ["mamba", "attention"],
    },  # as bamba
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},  # a cycle of three would not reach attention
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},  # its own validation
    "xmod": {"default_language": "en_XX"},  # demanded by its forward
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},  # open by default, and read
    "chameleon": {"vocabulary_map": {"<image>": 3}},  # knows its image token by name only
    "emu3": {"vocabulary_map": {"<image>": 3}},  # the same
    "aria": {"projector_patch_to_query_dict": {(IMAGE // PATCH) ** 2: 4}},  # patches of an image to its tokens
    "blip-2": {"image_token_index": FIRST_TOKEN},  # open by default; the forward puts images nowhere then
    "instructblip": {"image_token_index": FIRST_TOKEN},  # the same
    "nemotron_h_omni": {"image_token_id": FIRST_TOKEN},  # the same
    "qwen2_5_omni_thinker": {"vision_start_token_id": FIRST_TOKEN + 10, "vision_end_token_id": FIRST_TOKEN + 11},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": FIRST_TOKEN + 10, "vision_end_token_id": FIRST_TOKEN + 11},
    "step3p5": {"sliding_window": WINDOW},  # open by default, and read
    "muse_glimmer": {"out_hidden_size": 4 * WIDTH},  # four patches merged
    "muse_spark": {"out_hidden_size": 4 * WIDTH},  # the same
    "mllama_vision_model": {"vision_output_dim": 2 * WIDTH},  # the last layer beside the intermediate ones
    "gemma4_vision": {"pooling_kernel_size": 2},  # must divide the patches of an image
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},  # must multiply out to the number of layers
}

# Sizes that a configuration leaves open and some models then read.
RECOMPUTED = ("out_features", "out_indices", "_out_features", "_out_indices", "stage_names")  # follow the depth
DEFAULTS = {
    "head_dim": HEAD,
    "num_key_value_heads": HEADS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "vocab_size": VOCAB,
}

_LAYERS = (
    r"(\w+_)?(num_hidden_layers|n_layers?|num_layers|num_encoder_layers|num_decoder_layers|encoder_layers"
    r"|decoder_layers|num_blocks|depth|layers|num_spatial_layers|num_temporal_layers|encoder_depth|decoder_depth)"
)
_HEADS = r"(\w+_)?(num_attention_heads|n_heads?|num_heads|attention_heads|num_sliding_attention_heads)"
_KV_HEADS = r"(\w+_)?(num_key_value_heads|num_kv_heads|n_head_kv|num_query_groups|num_kv_groups)"
_WIDTH = (
    r"(\w+_)?(hidden_size\w*|d_model|n_embd|embed_dims?|word_embed_proj_dim|model_dim|hidden_dim|dim|projection_dim"
    r"|embedding_size|emb_dim|embedding_dim|output_dim|intermediate_size|intermediate_size_mlp|ffn_dim|n_inner|d_ff|dff"
    r"|dim_ff|mlp_dim|ffn_hidden_size|feed_forward_size|lru_width|mlp_hidden_size|cross_attention_hidden_size"
    r"|projection_size|share_expert_dim|projection_hidden_dim|pooler_output_size|alignment_intermediate_size"
    r"|resampler_dim|projector_(in|out)put_dim|attention_hidden_size|dense_intermediate_size)"
)
_HEAD = (
    r"(\w+_)?(head_dim|d_kv|kv_channels|d_head|head_size|attention_head_size|qk_nope_head_dim|qk_rope_head_dim"
    r"|v_head_dim|key_dim)"
)
_POSITIONS = (
    r"(\w+_)?(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|context_length|seq_length"
    r"|max_source_positions|max_target_positions|model_max_length|seq_len|max_(en|de)coder_position_embeddings)"
)
_PICKED = object()  # as many layers as were picked
# (name, new size); the first that matches the whole name decides. A function receives the old value.
RULES: tuple[tuple[str, Any], ...] = (
    (r"type_vocab_size|num_channels|in_channels|out_channels|num_labels|num_mel_bins|\w*kernel\w*|conv_L_cache", None),
    (r"mamba_(n|num)_heads|num_mamba_heads", 2 * WIDTH // HEAD),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"mamba_(d_head|head_dim|headdim)", HEAD),
    (r"n_mamba_heads", 2),
    (r"(mamba_)?n_groups|mamba_d_groups", 1),
    (r"linear_num_key_heads", KV_HEADS),
    (r"linear_num_value_heads|linear_num_heads", HEADS),
    (r"\w*state_size|mamba_d_state", lambda old: min(old, 16)),
    (r"qk_head_dim", 2 * HEAD),
    (r"(\w+_)?(q|kv|o)_lora_rank|laurel_rank|altup_rank", 16),
    (r"\w*original_max_position_embeddings", POSITIONS // 2),
    (_POSITIONS, lambda old: min(old, POSITIONS)),
    (r"position_embedding_size|num_position_embeddings", (IMAGE // PATCH) ** 2),
    (r"pos_emb_(height|width)|posemb_grid_size", IMAGE // PATCH),
    (r"num_kv_shared_layers", lambda old: 2),
    (r"max_window_layers|first_k_dense_replace|num_nextn_predict_layers", lambda old: min(old, 1)),
    (r"\w*sparse_step", lambda old: min(old, 2)),
    (r"num_sparse_(en|de)coder_layers", 1),
    (r"\w*layer_period", lambda old: min(old, 2)),
    (r"\w*layer_offset", lambda old: min(old, 1)),
    (r"moe_layer_end_index", 1),
    (r"(\w+_)?(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts)", EXPERTS),
    (r"(\w+_)?(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts)", lambda old: min(old, 2)),
    (r"n_group|num_expert_group", lambda old: min(old, 2)),
    (r"topk_group", 1),
    (r"index_n_heads", HEADS),
    (r"index_topk", 1024),
    (r"\w*vocab_size\w*|vocab_offset|\w+_vocab", lambda old: min(old, VOCAB)),
    (r"spatial_merge_size|temporal_patch_size|scale_factor", lambda old: min(old, 2)),
    (r"\w*sliding_window|sliding_window_size|attention_window\w*|local_attention|attention_chunk_size", WINDOW),
    (r"window_size", lambda old: 2 * PATCH if old > 2 * PATCH else min(old, IMAGE // PATCH)),
    (r"num_frames|max_temporal_embeddings", lambda old: min(old, 2)),
    (r"\w*image_size|resolution|crop_size", IMAGE),
    (r"\w*patch_size", lambda old: min(old, PATCH)),
    (r"rotary_dim", HEAD // 2),
    (r"patch_embed_hidden_size", 3 * PATCH**2),  # of flattened patches
    (r"latent_query_num|num_image_tokens|image_seq_length|mm_tokens_per_image|\w*soft_tokens_per_image", 4),
    (_LAYERS, _PICKED),
    (_KV_HEADS, KV_HEADS),
    (_HEADS, HEADS),
    (_HEAD, HEAD),
    (_WIDTH, WIDTH),
)
_COMPILED = [(re.compile(pattern), new) for pattern, new in RULES]
_TOKEN = re.compile(
    r"(?!\w*(ignore|layer))\w*(token_?\w*|pad|bos|eos|mask|start|end|think|im|image|patch)_?(id|index|ids)"
)
_LAYER_LISTS = re.compile(r"\w*(index(es)?|indices|layers|idxs?|layer_ids)$")


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """The tiny version of a configuration's ``to_dict()``."""
    return _Shrinker().whole(config)


class _Shrinker:
    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}

    def whole(self, old: dict[str, Any]) -> dict[str, Any]:
        """One configuration with everything nested in it."""
        layers = _layer_count(old)
        picks = _picks(old, layers)
        grouped = _is_grouped(old)
        new: dict[str, Any] = {}
        for key, value in old.items():
            if key in RECOMPUTED:
                continue
            new[key] = self._value(str(key), value, layers, picks)
            if re.fullmatch(_KV_HEADS, str(key)) and isinstance(value, int) and not isinstance(value, bool):
                new[key] = 1 if value == 1 else KV_HEADS if grouped else HEADS
        _rotary(new)
        return {**new, **HINTS.get(str(old.get("model_type")), {})}

    def _value(self, key: str, value: Any, layers: int | None, picks: list[int]) -> Any:
        if key == "per_layer_config" and isinstance(value, dict):  # sizes that differ in some layers, by layer index
            sizes = {int(i): self.whole(v) for i, v in value.items()}
            return {new: sizes[old] for new, old in enumerate(picks) if old in sizes}
        if isinstance(value, dict):
            return self.whole(value)
        if value is None:
            return DEFAULTS.get(key)
        if isinstance(value, list | tuple):
            return self._list(key, list(value), layers, picks)
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        if _TOKEN.fullmatch(key):
            return self._token(value)
        for pattern, new in _COMPILED:
            if pattern.fullmatch(key):
                new = len(picks) if new is _PICKED else new
                return value if new is None or value <= 0 else new(value) if callable(new) else new
        return value

    def _list(self, key: str, value: list[Any], layers: int | None, picks: list[int]) -> list[Any]:
        if not value or isinstance(value[0], str | bool | float) or key in ("no_rope_layers", "intermediate_size"):
            by_layer = layers is not None and len(value) == layers
            return [self._value(key, value[i], layers, picks) for i in picks] if by_layer else value
        if re.fullmatch(r"vision_feature_layers?", key):  # counted from the last
            return [-1, -2]
        if key == "image_grid_pinpoints":
            return [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]]
        if not all(isinstance(x, int) for x in value):
            return [self._list(key, list(x), None, []) if isinstance(x, list | tuple) else x for x in value]
        if key.endswith("ratios") or key.endswith("multiplier"):
            return value
        if _TOKEN.fullmatch(key):
            return [self._token(x) for x in value]
        if layers is not None and _LAYER_LISTS.fullmatch(key) and max(value) < layers + 1:
            kept = {min(len(picks) - 1, x * len(picks) // layers) for x in value if x >= 0}
            if len(kept) == len(picks) and len(value) < layers:
                kept = {len(picks) - 1}
            return sorted(kept) if key != "no_rope_layers" else value
        if layers is not None and len(value) == layers:
            return [self._value(key, value[i], layers, picks) for i in picks]
        return [self._value(key, x, None, [0, 1]) for x in value]

    def _token(self, value: int) -> int:
        if value < FIRST_TOKEN:
            return value
        return self.tokens.setdefault(value, FIRST_TOKEN + len(self.tokens))


def _layer_count(config: dict[str, Any]) -> int | None:
    for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "decoder_layers", "encoder_layers"):
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _picks(config: dict[str, Any], layers: int | None) -> list[int]:
    """Layers to keep: the first of each kind, at least two, twice over where later layers share keys of earlier."""
    if layers is None:
        return [0, 1]
    kinds: list[Any] = [()] * layers
    for key, value in config.items():
        by_layer = isinstance(value, list | tuple) and len(value) == layers
        if by_layer and re.search(r"types?$|no_rope_layers|attention_layers", key):
            kinds = [(*kind, str(x)) for kind, x in zip(kinds, value, strict=True)]
    first = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    if len(first) == 1:
        first = [0, min(1, layers - 1)]
    return first * 2 if config.get("num_kv_shared_layers") else first


def _is_grouped(config: dict[str, Any]) -> bool:
    heads = next((v for k, v in config.items() if re.fullmatch(_HEADS, str(k)) and isinstance(v, int)), None)
    return any(v != heads for k, v in config.items() if re.fullmatch(_KV_HEADS, str(k)) and isinstance(v, int))


def _rotary(config: dict[str, Any]) -> None:
    """Rotary tables with one entry a frequency follow the head's new width."""
    width = int(config.get("qk_rope_head_dim") or config.get("head_dim") or HEAD)
    ropes = [v for v in config.values() if isinstance(v, dict)]
    for rope in [config, *ropes]:
        share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
        frequencies = int(width * share) // 2
        for key in ("long_factor", "short_factor"):
            if isinstance(rope.get(key), list):
                rope[key] = (rope[key] * frequencies)[:frequencies]
        section = rope.get("mrope_section", [0, 0, 0] if "rope_theta" in rope else None)
        if isinstance(section, list) and section:  # models that read it have a default for their own head's width
            rest = [frequencies // 4] * (len(section) - 1)
            rope["mrope_section"] = [frequencies - sum(rest), *rest]
