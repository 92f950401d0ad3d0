"""Loading: folders, names, the hub, what goes wrong there; and two real models."""

from __future__ import annotations

import json
import time

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from headscope.interp.errors import HeadscopeError
from headscope.interp.models import load_model, output_projections


def test_live_model(lm, tiny, says):
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
def test_an_index_that_leads_elsewhere_is_refused(folder, name, says):
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


def test_folder_without_a_tokenizer(tmp_path, tiny, words):
    tiny().save_pretrained(tmp_path)
    assert load_model(tmp_path).tokenizer is None
    assert load_model(tmp_path, tokenizer=words())("a").logits.shape[1] == 2


def test_folder_without_a_config(tmp_path, says):
    with pytest.raises(HeadscopeError) as error:
        load_model(tmp_path)
    says(error, "no config.json", "save_pretrained")
    (tmp_path / "weights.gguf").write_bytes(b"")
    with pytest.raises(HeadscopeError) as error:
        load_model(tmp_path)
    says(error, "weights.gguf")


def test_damaged_folders(folder, says):
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


def test_absent_weights_are_refused(tmp_path, tiny, says):
    tiny().model.save_pretrained(tmp_path)  # the body without its head, which transformers would make up
    with pytest.raises(HeadscopeError) as error:
        load_model(tmp_path)
    says(error, "lm_head.weight", "random")


def test_not_a_language_model(tmp_path, says):
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(HeadscopeError) as error:
        load_model(tmp_path)
    says(error, "is a vit model, not a causal language model")


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "/nothing/here", "weights.gguf", "two words"])
def test_unknown_path(name, says):
    with pytest.raises(HeadscopeError) as error:
        load_model(name)
    says(error, "no such file or folder", "gemma3-270m, llava-smollm2, smollm2-135m")


def test_unknown_name_without_network(monkeypatch, says):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HeadscopeError) as error:
        load_model("smollm9-135m")
    says(error, "hub cannot be reached", "gemma3-270m, llava-smollm2, smollm2-135m")
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


def test_bad_options(folder, says):
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
