"""GGUF files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model


def write_gguf(model, path: Path, vocabulary) -> None:
    """The tiny Llama as llama.cpp's converter writes it (rotary pairs interleaved)."""
    from gguf import GGUFWriter

    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3, 2] + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {"embed_tokens": "token_embd", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {"self_attn.o_proj": "attn_output"}
    names |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")} | {"lm_head": "output"}
    for key, tensor in model.state_dict().items():
        name = key.removeprefix("model.").replace("layers.", "blk.")
        for long, short in names.items():
            name = name.replace(long, short)
        name = "output_norm.weight" if name == "norm.weight" else name
        if "attn_q" in name or "attn_k" in name:
            tensor = tensor.view(-1, 2, 4, 32).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file(tmp_path, tiny, says, vocabulary):
    model, path = tiny(tie_word_embeddings=False), tmp_path / "tiny.gguf"
    write_gguf(model, path, vocabulary)
    lm = load_model(path)
    assert (lm.name, lm.revision) == ("tiny", hashlib.sha256(path.read_bytes()).hexdigest())
    ids = torch.tensor([[0, 7, 8, 9]])
    torch.testing.assert_close(lm.model(ids).logits, model(ids).logits)
    lm.model.save_pretrained(tmp_path / "again")  # transformers refuses this for a model that calls itself quantized
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HeadscopeError) as error:
        load_model(path)
    says(error, "corrupt or cut short")
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(HeadscopeError) as error:
        load_model(path)
    says(error, "is not a GGUF file")
