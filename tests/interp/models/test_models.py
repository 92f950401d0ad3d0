"""headscope.interp.models: loading, what goes wrong while loading, sizes, prompts, output projections."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.masking_utils import AttentionMaskInterface

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import ModelInfo, available_models, load_model, output_projections, packages
from headscope.interp.models import download as download_module
from headscope.interp.models.packages import PackagedModel, Wheel, ensure_packaged, model_folder

WORDS = ["<s>", "</s>", "<unk>", "user", "assistant", ":", *"abcdefghijklmnopqrstuvwxyz", "ab"]
SIZES = {"vocab_size": len(WORDS), "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
COMMON = SIZES | {"intermediate_size": 48, "max_position_embeddings": 16}
SHORT = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}

# name: (model class, configuration class, configuration, first layer's attention, first layer's projection)
TINY = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", COMMON | {"num_key_value_heads": 2}, "self_attn", "self_attn.o_proj"),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": len(WORDS), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
        "attn",
        "attn.c_proj",
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", COMMON, "attention", "attention.dense"),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        COMMON
        | {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 5}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        "self_attn",
        "self_attn.o_proj",
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "self_attn",
        "self_attn.out_proj",
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", COMMON, "self_attn", "self_attn.dense"),
    "bert": ("BertModel", "BertConfig", COMMON, "attention.self", "attention.output.dense"),
}


def tiny(name: str = "llama", **changes):
    model_class, config_class, config, *_ = TINY[name]
    config = getattr(transformers, config_class)(**config | SHORT | changes)
    return getattr(transformers, model_class)(config).eval()


def words(**kwargs) -> PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | kwargs
    return PreTrainedTokenizerFast(tokenizer_object=core, **options)


@pytest.fixture
def folder(tmp_path) -> Path:
    place = tmp_path / "tiny-llama"
    tiny().save_pretrained(place)
    words().save_pretrained(place)
    return place


@pytest.fixture
def lm():
    return load_model(tiny(), tokenizer=words())


def says(error: pytest.ExceptionInfo, *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


# What a model is


@pytest.mark.parametrize("name", TINY)
def test_info_reads_every_configuration(name):
    model = tiny(name)
    info = ModelInfo.from_model(model)
    assert (info.architecture, info.model_type) == (TINY[name][0], name)
    assert (info.layers, info.heads, info.d_model, info.context_length) == (2, 4, 32, 16)
    assert info.kv_heads == {"llama": 2, "gemma3_text": 1}.get(name, 4)
    assert info.d_head == info.d_value == (16 if name == "gemma3_text" else 8)
    assert info.sliding_window == ((5, None) if name == "gemma3_text" else None)
    assert (info.dtype, info.device, info.vocab_size) == ("float32", "cpu", len(WORDS))
    assert info.parameters == sum(p.numel() for p in model.parameters())
    assert info.attention_implementation == "sdpa"


def test_info_of_unusual_attention():
    latent = transformers.DeepseekV3Config(
        **COMMON | {"qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 10, "kv_lora_rank": 8},
        q_lora_rank=8,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=2,
        moe_intermediate_size=8,
    )
    info = ModelInfo.from_model(transformers.DeepseekV3ForCausalLM(latent))
    assert (info.d_head, info.d_value) == (16, 10)
    everywhere = transformers.MistralConfig(**COMMON | {"num_key_value_heads": 2, "sliding_window": 7})
    assert ModelInfo.from_model(transformers.MistralForCausalLM(everywhere)).sliding_window == (7, 7)
    falcon = transformers.FalconConfig(**SIZES)
    assert ModelInfo.from_model(transformers.FalconForCausalLM(falcon)).kv_heads == 1


def test_info_of_the_text_tower():
    text = TINY["llama"][2] | {"model_type": "llama"}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision |= {"image_size": 8, "patch_size": 4, "intermediate_size": 16}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=3)
    model = transformers.LlavaForConditionalGeneration(config)
    info = ModelInfo.from_model(model)
    assert (info.architecture, info.model_type, info.heads) == ("LlavaForConditionalGeneration", "llama", 4)
    assert list(output_projections(model).values()) == [
        f"model.language_model.layers.{layer}.self_attn.o_proj" for layer in range(2)
    ]
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_info_refuses_what_has_no_heads():
    with pytest.raises(HeadscopeError) as error:
        ModelInfo.from_model(torch.nn.Linear(2, 2))
    says(error, "Linear is not a Hugging Face model")


# Loading


def test_live_model(lm):
    assert load_model(lm) is lm
    assert (lm.name, lm.revision) == ("LlamaForCausalLM", None)
    with pytest.raises(HeadscopeError) as error:
        load_model(tiny())("a b")
    says(error, "without a tokenizer", "tokenizer=")
    with pytest.raises(HeadscopeError) as error:
        load_model(tiny(), dtype="float32")
    says(error, "model.to(...)")


def test_folder(folder):
    lm = load_model(folder)
    assert lm.name == "tiny-llama" and len(lm.revision) == 64
    reference = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(lm("a b c").logits, reference(**lm.encode("a b c")).logits)
    assert load_model(str(folder)).revision == lm.revision
    assert load_model(folder, dtype="bfloat16").info.dtype == "bfloat16"


def test_folder_revision_follows_the_weights(folder):
    before = load_model(folder).revision
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(folder)
    assert load_model(folder).revision != before


@pytest.mark.parametrize("name", ["weights.bin", "../weights.safetensors", "deep/weights.safetensors"])
def test_an_index_that_leads_elsewhere_is_refused(folder, name):
    """transformers unpickles a .bin that an index of safetensors names, and no revision would cover it."""
    model = load_model(folder).model
    (folder / "model.safetensors").unlink()
    place = folder / name
    place.parent.mkdir(exist_ok=True)
    torch.save(model.state_dict(), place)
    index = {"metadata": {}, "weight_map": dict.fromkeys(model.state_dict(), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(HeadscopeError) as error:
        load_model(folder)
    says(error, f"names '{name}'", "save_pretrained")


def test_several_files_of_weights_load_and_the_revision_covers_their_index(folder, tmp_path):
    whole = load_model(folder)
    whole.model.save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    index = tmp_path / "parts" / "model.safetensors.index.json"
    parts = load_model(tmp_path / "parts")
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, parts.model.state_dict()[name])
    index.write_text(index.read_text() + " ")
    assert load_model(tmp_path / "parts").revision != parts.revision


def test_loading_draws_no_bars_into_a_log(folder, capfd):
    load_model(folder)
    assert capfd.readouterr() == ("", "")
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_folder_without_a_tokenizer(tmp_path):
    tiny().save_pretrained(tmp_path)
    assert load_model(tmp_path).tokenizer is None
    assert load_model(tmp_path, tokenizer=words())("a").logits.shape[1] == 2


def test_folder_without_a_config(tmp_path):
    with pytest.raises(HeadscopeError) as error:
        load_model(tmp_path)
    says(error, "no config.json", "save_pretrained")
    (tmp_path / "weights.gguf").write_bytes(b"")
    with pytest.raises(HeadscopeError) as error:
        load_model(tmp_path)
    says(error, "weights.gguf")


def test_damaged_folders(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HeadscopeError) as error:
        load_model(folder)
    says(error, "damaged")
    weights.unlink()
    with pytest.raises(HeadscopeError) as error:
        load_model(folder)
    says(error, "safetensors")
    (folder / "config.json").write_text("{")
    with pytest.raises(HeadscopeError) as error:
        load_model(folder)
    says(error, "cannot load")


def test_absent_weights_are_refused(tmp_path):
    tiny().model.save_pretrained(tmp_path)  # the body without its head, which transformers would make up
    with pytest.raises(HeadscopeError) as error:
        load_model(tmp_path)
    says(error, "lm_head.weight", "random")


def test_not_a_language_model(tmp_path):
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(HeadscopeError) as error:
        load_model(tmp_path)
    says(error, "is a vit model, not a causal language model")


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "/nothing/here", "weights.gguf", "two words"])
def test_unknown_path(name):
    with pytest.raises(HeadscopeError) as error:
        load_model(name)
    says(error, "no such file or folder", "gemma3-270m, smollm2-135m")


def test_unknown_name_without_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HeadscopeError) as error:
        load_model("smollm9-135m")
    says(error, "hub cannot be reached", "gemma3-270m, smollm2-135m")
    with pytest.raises(HeadscopeError) as error:
        load_model("nobody/nothing", offline=True)
    says(error, "offline=True")


def test_hub_cache_is_enough(folder, monkeypatch, tmp_path):
    """A model in the hub's cache needs no network; nor does the hub get asked for it."""
    from headscope.interp.models import load

    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(load, "HfApi", None)
    real = load._pretrained
    monkeypatch.setattr(load, "_pretrained", lambda place, *a, **k: real(str(snapshot), *a, **k))
    lm = load_model("someone/tiny")
    assert (lm.name, lm.revision) == ("someone/tiny", commit)
    assert lm.generate("a b", max_new_tokens=1)


def test_bad_options(folder):
    for options, part in [
        ({"device": "gpu9"}, "unknown device"),
        ({"device": "cuda:99"}, "not available"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"dtype": "float99"}, "unknown dtype"),
        ({"tokenizer": "/nowhere/at/all"}, "tokenizer"),
    ]:
        with pytest.raises(HeadscopeError) as error:
            load_model(folder, **options)
        says(error, part)
    with pytest.raises(HeadscopeError) as error:
        load_model(3)
    says(error, "cannot load a int")


# GGUF


def write_gguf(model, path: Path) -> None:
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
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 2] + [1] * (len(WORDS) - 3))
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


def test_gguf_file(tmp_path):
    model, path = tiny(tie_word_embeddings=False), tmp_path / "tiny.gguf"
    write_gguf(model, path)
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


# Packaged models


@pytest.fixture
def entry(tmp_path, monkeypatch) -> PackagedModel:
    """A model in two wheels, and a pip that serves them from a folder."""
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path / "cache"))
    index = tmp_path / "index"
    index.mkdir()
    wheels = []
    for number, part in enumerate((b"GGUF-first", b"-second")):
        path = index / f"part{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("part/data.bin", part)
            archive.writestr("part/__init__.py", "raise RuntimeError('a wheel was imported')")
            archive.writestr("part/LICENSE", "free")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        wheels.append(Wheel(f"part{number}==1.0", digest, 10, ("part/data.bin",), ("part/LICENSE",) if number else ()))

    def pip(requirement, folder, tick=None):
        name = requirement.replace("==", "-") + "-py3-none-any.whl"
        (folder / name).write_bytes((index / name).read_bytes())
        return folder / name

    def convert(path, folder):
        assert path.read_bytes() == b"GGUF-first-second"
        tiny().save_pretrained(folder)
        words().save_pretrained(folder)

    monkeypatch.setattr(packages, "download_wheel", pip)
    monkeypatch.setattr(packages, "convert_gguf", convert)
    sha256 = hashlib.sha256(b"GGUF-first-second").hexdigest()
    model = PackagedModel("tiny-packaged", "Tiny", "MIT", sha256, 1000, tuple(wheels))
    monkeypatch.setitem(packages.PACKAGED, model.name, model)
    return model


def nothing_left(entry: PackagedModel) -> bool:
    """Only the lock file may stay of a failed attempt."""
    left = [path.name for path in model_folder(entry).parent.iterdir()]
    return left == [f"{entry.name}.lock"]


def test_packaged_model(entry, monkeypatch):
    lm = load_model("tiny-packaged")
    assert (lm.name, lm.revision, lm.info.layers) == ("tiny-packaged", entry.gguf_sha256, 2)
    folder = model_folder(entry)
    assert (folder / "LICENSE").read_text() == "free"
    assert not list(folder.glob("*.gguf")) and not list(folder.parent.glob(".*"))
    monkeypatch.setattr(packages, "download_wheel", None)  # a second time needs no pip
    assert load_model("Tiny-Packaged", offline=True).revision == lm.revision
    (folder / "model.safetensors").unlink()
    with pytest.raises(HeadscopeError) as error:
        load_model("tiny-packaged", offline=True)
    says(error, "not in the cache", "offline=True")


def test_damaged_cache_is_made_anew(entry):
    folder = ensure_packaged(entry)
    (folder / "model.safetensors").unlink()
    assert ensure_packaged(entry) == folder
    assert (folder / "model.safetensors").is_file()


def test_checksum_mismatch(entry, monkeypatch):
    bad = PackagedModel(
        entry.name, "Tiny", "MIT", entry.gguf_sha256, 1, (Wheel("part0==1.0", "0" * 64, 10, ("part/data.bin",)),)
    )
    with pytest.raises(HeadscopeError) as error:
        ensure_packaged(bad)
    says(error, "checksum mismatch", "part0-1.0", "removed")
    assert nothing_left(entry)
    bad = PackagedModel(entry.name, "Tiny", "MIT", "f" * 64, 1, entry.wheels)
    with pytest.raises(HeadscopeError) as error:
        ensure_packaged(bad)
    says(error, "checksum mismatch", "model.gguf")
    assert nothing_left(entry)


@pytest.mark.parametrize("stage", ["download_wheel", "convert_gguf"])
@pytest.mark.parametrize("exception", [KeyboardInterrupt, HeadscopeError("corrupt")])
def test_interruption_leaves_nothing(entry, monkeypatch, stage, exception):
    real = getattr(packages, stage)

    def interrupted(*args):
        real(*args)
        raise exception

    monkeypatch.setattr(packages, stage, interrupted)
    with pytest.raises(KeyboardInterrupt if exception is KeyboardInterrupt else HeadscopeError):
        ensure_packaged(entry)
    assert nothing_left(entry)
    monkeypatch.setattr(packages, stage, real)
    assert (ensure_packaged(entry) / "model.safetensors").is_file()


def test_leftovers_of_a_killed_process_are_removed(entry):
    stale = model_folder(entry).parent / ".tiny-packaged-abc123" / "out"
    stale.mkdir(parents=True)
    (stale / "model.safetensors").write_bytes(b"half")
    folder = ensure_packaged(entry)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, "tiny-packaged.lock"}


def test_two_at_once_convert_once(entry, monkeypatch):
    real, conversions = packages.convert_gguf, []

    def slow(*args):
        conversions.append(1)
        time.sleep(0.8)  # longer than the first attempt to take the lock
        real(*args)

    monkeypatch.setattr(packages, "convert_gguf", slow)
    threads = [threading.Thread(target=ensure_packaged, args=(entry,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1 and packages.is_ready(entry)


def test_cache_that_cannot_be_written(entry, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path / "file"))
    with pytest.raises(HeadscopeError) as error:
        ensure_packaged(entry)
    says(error, "HEADSCOPE_CACHE")


@pytest.mark.parametrize(
    ("log", "part"),
    [
        ("WARNING: Retrying (Retry(total=4)) ... NewConnectionError\nERROR: No matching distribution", "no network"),
        ("ERROR: IncompleteRead(12 bytes read, 80 more expected)", "interrupted"),
        ("ERROR: No matching distribution found for thing==1.0", "no wheel of thing==1.0"),
        ("/bin/python: No module named pip", "ensurepip"),
        ("ERROR: [Errno 28] No space left on device", "No space left"),
        ("", "no output"),
    ],
)
def test_pip_failures(tmp_path, monkeypatch, log, part):
    """A program that fails as pip does."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ncat <<'END' >&2\n{log}\nEND\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    (tmp_path / "work").mkdir()
    with pytest.raises(HeadscopeError) as error:
        download_module.download_wheel("thing==1.0", tmp_path / "work")
    says(error, part, "thing==1.0")


def test_ctrl_c_ends_pip(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    started = []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[0])

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download_module.download_wheel("thing==1.0", tmp_path, interrupt)
    assert started[0].poll() is not None


def test_available_models(entry):
    known = {model.name: model for model in available_models()}
    assert {"smollm2-135m", "gemma3-270m"} <= known.keys()
    assert not known["smollm2-135m"].cached  # the cache is the test's own
    assert known["smollm2-135m"].license == "Apache-2.0"
    code = "import sys, headscope.interp.models as m; m.available_models(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Prompts


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "opt"])
def test_padding_changes_nothing(name):
    lm = load_model(tiny(name), tokenizer=words())
    assert lm.tokenizer.pad_token == "</s>" and len(lm.tokenizer) == len(WORDS)
    prompts = ["a b c d e f", "x y"]
    batch = lm(prompts).logits
    for row, prompt in enumerate(prompts):
        alone = lm(prompt).logits[0]
        torch.testing.assert_close(batch[row, : len(alone)], alone)
    texts = lm.generate(prompts, max_new_tokens=4)
    assert texts == [lm.generate(prompt, max_new_tokens=4)[0] for prompt in prompts]


def test_forward_keeps_no_gradient_and_passes_options(lm):
    output = lm("a b c", output_hidden_states=True, logits_to_keep=1)
    assert not output.logits.requires_grad
    assert output.logits.shape == (1, 1, len(WORDS)) and len(output.hidden_states) == 3
    assert lm.encode("a b c")["input_ids"].tolist() == [[0, 6, 7, 8]]


@pytest.mark.parametrize(
    ("prompts", "part"),
    [("", "prompt 0 is empty"), (["a", ""], "prompt 1 is empty"), ([], "no prompt"), ([3], "int, not text")],
)
def test_empty_prompts(lm, prompts, part):
    for call in (lm, lm.generate):
        with pytest.raises(HeadscopeError) as error:
            call(prompts)
        says(error, part)


def test_prompt_without_tokens():
    tokenizer = words()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(HeadscopeError) as error:
        load_model(tiny(), tokenizer=tokenizer)(["a", " "])
    says(error, "prompt 1 has no tokens")


def test_prompt_longer_than_the_context(lm):
    lm("a " * 15)
    with pytest.raises(HeadscopeError) as error:
        lm(["a", "a " * 16])
    says(error, "prompt 1 has 17 tokens", "context", "(16)")
    with pytest.raises(HeadscopeError) as error:
        lm.generate("a " * 12, max_new_tokens=4)
    says(error, "13 tokens and 4 new ones")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_that_are_not_numbers(dtype):
    lm = load_model(tiny().to(getattr(torch, dtype)), tokenizer=words())
    with torch.no_grad():
        lm.model.model.norm.weight[0] = torch.nan
    for call in (lm, partial(lm.generate, max_new_tokens=2)):
        with pytest.raises(HeadscopeError) as error:
            call(["a b", "c"])
        says(error, f"not numbers in {dtype}", "weights" if dtype == "float32" else "dtype='float32'")


def test_forbidden_tokens_are_not_an_error(lm):
    lm.model.lm_head.register_forward_hook(lambda m, args, out: out.index_fill(-1, torch.tensor([3]), -torch.inf))
    assert lm("a b").logits[0, -1, 3] == -torch.inf


def test_chat():
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}assistant :"
    lm = load_model(tiny(), tokenizer=words(chat_template=template))
    assert lm.chat("a b") == "user : a b assistant :"  # the tokenizer adds <s> by itself
    assert lm.encode(lm.chat("a b"))["input_ids"].tolist() == [[0, 3, 5, 6, 7, 4, 5]]
    with pytest.raises(HeadscopeError) as error:
        load_model(tiny(), tokenizer=words()).chat("a")
    says(error, "no chat template")


# Output projections


@pytest.mark.parametrize("name", TINY)
def test_output_projections(name):
    model = tiny(name)
    modules = dict(model.named_modules())
    found = output_projections(model)
    _, _, _, attention, projection = TINY[name]
    prefixes = [key.removesuffix(attention) for key in found]
    assert all(key.endswith(f".{attention}") for key in found)
    assert found == {f"{prefix}{attention}": f"{prefix}{projection}" for prefix in prefixes}
    assert [prefix.rstrip(".")[-1] for prefix in prefixes] == ["0", "1"]
    width = ModelInfo.from_model(model).heads * ModelInfo.from_model(model).d_value
    for leaf in found.values():
        weight = modules[leaf].weight
        assert weight.shape[0 if name == "gpt2" else 1] == width  # GPT-2's Conv1D is stored transposed


def test_probing_leaves_the_model_as_it_was(lm):
    lm.model.train()
    lm.model.model.layers[0].eval()
    training = [module.training for module in lm.model.modules()]
    state, before = torch.random.get_rng_state(), lm.model.eval()(**lm.encode("a b c")).logits
    for module, was in zip(lm.model.modules(), training, strict=True):
        module.training = was
    assert output_projections(lm)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in lm.model.modules()] == training
    untouched(lm.model)
    assert torch.equal(lm.model.eval()(**lm.encode("a b c")).logits, before)


def untouched(model) -> None:
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in model.modules())
    for interface in (AttentionInterface, AttentionMaskInterface):
        assert "headscope_projection_probe" not in interface._global_mapping


def test_probing_restores_after_an_exception():
    model = tiny()

    def broken(*args, **kwargs):
        raise IndexError("broken layer")

    model.model.layers[1].mlp.forward = broken
    with pytest.raises(HeadscopeError) as error:
        output_projections(model)
    says(error, "broken layer")
    untouched(model)


@pytest.mark.parametrize("name", ["Bloom", "Falcon", "GPTJ", "Mpt"])
def test_models_that_do_not_route_are_refused(name):
    sizes = {"vocab_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    before = config._attn_implementation
    with pytest.raises(HeadscopeError) as error:
        output_projections(model)
    says(error, f"{name}ForCausalLM does not call transformers' attention interface")
    assert config._attn_implementation == before


def test_gated_heads_are_refused(monkeypatch):
    model = tiny()
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda m, args: (args[0] * 2,), prepend=True)
    with pytest.raises(HeadscopeError) as error:
        output_projections(model)
    says(error, "model.layers.0.self_attn", "unchanged")


# Real models


@pytest.mark.slow
def test_smollm2():
    load_model("smollm2-135m")
    start = time.perf_counter()
    lm = load_model("smollm2-135m")
    assert time.perf_counter() - start < 5
    info = lm.info
    assert (info.layers, info.heads, info.kv_heads, info.d_head, info.context_length) == (30, 9, 3, 64, 8192)
    logits = lm("The capital of France is").logits
    assert lm.tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert "Paris" in lm.generate(lm.chat("What is the capital of France?"), max_new_tokens=12)[0]
    assert output_projections(lm) == {
        f"model.layers.{i}.self_attn": f"model.layers.{i}.self_attn.o_proj" for i in range(30)
    }


@pytest.mark.slow
def test_gemma3():
    lm = load_model("gemma3-270m")
    info = lm.info
    assert (info.layers, info.heads, info.kv_heads, info.d_head, info.vocab_size) == (18, 4, 1, 256, 262144)
    assert info.sliding_window == tuple(None if i in (5, 11, 17) else 512 for i in range(18))
    assert info.context_length == 32768 and lm.tokenizer.bos_token_id == 2
    assert "France" in lm.generate("The capital of France is", max_new_tokens=8)[0]
