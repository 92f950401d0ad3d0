"""Exported checkpoints, loaded by transformers alone, against the edited model.

Tolerance: weights are rounded once (2^-24 of each) and sums go in another order: 1e-5 of the largest logit, as in
test_ablate.py; that the edits move logits by more than 1e-2 of it is asserted.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from headscope.interp import load_model
from headscope.interp.errors import HeadscopeError
from headscope.interp.models.language_model import LanguageModel
from headscope.interp.survey.tiny import tiny_model
from headscope.interventions import (
    AblateHeads,
    AddToHeads,
    AffineHeads,
    ClampHeads,
    Intervention,
    PatchHeads,
    ProjectHeads,
    ScaleHeads,
    apply,
    export,
    exporting,
)
from headscope.interventions.applying import size

TOLERANCE = 1e-5
KINDS = ("llama", "gpt2", "qwen3", "gemma3_text", "mistral", "qwen2")
NO_BIAS = ("mistral", "qwen2")  # no bias behind the heads, and no setting that gives one


def table(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def edits(lm: LanguageModel) -> tuple[Intervention, Intervention]:
    """Several in an order that matters, two heads twice: one that needs no bias, one that does."""
    layers, heads = size(lm)
    whole = (layers, heads, int(getattr(lm.model.config, "head_dim", None) or lm.info.d_head))
    two, last = [(0, 1), (1, 0)], [(1, heads - 1)]
    linear = ProjectHeads(two, table(1, *whole), strength=0.7) + AffineHeads(two, A=table(2, 2, whole[2]))
    linear = linear + ScaleHeads([(0, 0), (0, 1)], -0.4) + AblateHeads(last)
    affine = AddToHeads(two, table(3, *whole), sigma=table(4, *whole[:2]), strength=-2.0)
    affine = affine + linear + AblateHeads(last, "mean", means=table(5, *whole), strength=0.5)
    return linear, affine + ClampHeads([(0, 0)], table(6, *whole), low=0.3, high=0.3)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(3, 23)[None] % model.config.vocab_size).logits
    return found


def digest(model: Any) -> str:
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in model.state_dict().values())).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_gives_the_edited_models_logits(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    before, was, config = logits(model), digest(model), model.config.to_dict()
    for number, edit in enumerate(edits(load_model(model))):
        out = tmp_path / f"out{number}"
        if number and kind in NO_BIAS:
            with pytest.raises(
                HeadscopeError, match="which needs model.layers.0.self_attn.o_proj.bias; .* has no such"
            ):
                export(model, edit, out)
            continue
        assert export(model, edit, out) == out
        with apply(model, edit):
            wanted = logits(model)
        again = AutoModelForCausalLM.from_pretrained(out).eval()
        scale = float(wanted.abs().max())
        assert type(again) is type(model) and float((wanted - before).abs().max()) > 1e-2 * scale
        assert float((logits(again) - wanted).abs().max()) <= TOLERANCE * scale
    assert digest(model) == was and model.config.to_dict() == config and torch.equal(logits(model), before)
    assert {path.name for path in tmp_path.iterdir()} <= {"out0", "out1"}  # nothing half-written


def test_biases_that_come_along_are_zero(tmp_path: Path) -> None:
    """Llama's ``attention_bias`` gives q, k and v biases too."""
    model = tiny_model("llama")
    assert not model.config.attention_bias
    again = AutoModelForCausalLM.from_pretrained(export(model, edits(load_model(model))[1], tmp_path / "out"))
    new = again.state_dict().keys() - model.state_dict().keys()
    assert again.config.attention_bias and len(new) == 2 * 4 and all(name.endswith("_proj.bias") for name in new)
    assert all(bool(again.state_dict()[name].any()) == ("o_proj" in name) for name in new)


def test_half_precision_and_tokenizer(llama: LanguageModel, tmp_path: Path) -> None:
    llama.model.to(torch.bfloat16)
    lm = LanguageModel.wrap(llama.model, llama.tokenizer, name="tiny")
    out = export(lm, edits(lm)[1], tmp_path / "new" / "out")
    again = load_model(str(out), dtype="bfloat16")
    assert again.model.dtype == torch.bfloat16 and again.encode("w1 w5")["input_ids"].tolist() == [[3, 7]]
    assert AutoTokenizer.from_pretrained(out)("w1")["input_ids"] == [3]


Z = table(7, 2, 4, 2, 8)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            ScaleHeads([(0, 1)], 0.5, during="decode"),
            r"scale 1 heads \(decode, factor=0.5\) .* acts with during='decode'",
        ),
        (ScaleHeads([(0, 1)], 0.5, positions=(0, 3)), r"acts with positions=\(0, 3\), weights act always"),
        (AblateHeads([(0, 1)], "uniform"), r"ablate 1 heads \(uniform\) cannot be baked .* no map z -> M z \+ b"),
        (AblateHeads([(0, 1)], "resample", samples=Z), r"ablate 1 heads \(resample.*\) cannot be baked"),
        (ClampHeads([(0, 1)], Z[:, :, 0], low=0.0), "clamp 1 heads .* cannot be baked"),
        (PatchHeads([(0, 1)], Z, positions=(0, 2)), "patch 1 heads cannot be baked .*acts with positions"),
        (ScaleHeads([(0, 1)], 0.5) + AblateHeads([(0, 2)], "uniform"), r"ablate 1 heads \(uniform\) cannot"),
        (Intervention(), "intervention cannot be baked into weights: it does not only map heads' outputs"),
        (ScaleHeads([(5, 1)], 0.5), "L5H1 does not exist"),
    ],
)
def test_what_is_not_linear_everywhere_is_refused_by_name(
    llama: LanguageModel, tmp_path: Path, edit: Intervention, message: str
) -> None:
    with pytest.raises(HeadscopeError, match=message) as refused:
        export(llama, edit, tmp_path / "out")
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


def test_other_models_and_folders_are_refused(llama: LanguageModel, tmp_path: Path) -> None:
    edit = ScaleHeads([(0, 1)], 0.5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    with pytest.raises(HeadscopeError, match="is there already; choose an empty or a new folder"):
        export(llama, edit, tmp_path / "full")
    with pytest.raises(HeadscopeError, match="no decoder-only language model"):
        export(tiny_model("t5", "encoder-decoder"), edit, tmp_path / "t5")
    llama.model.model.layers[0].self_attn.o_proj = torch.nn.Sequential(llama.model.model.layers[0].self_attn.o_proj)
    with pytest.raises(HeadscopeError, match="holds other weights than its class makes"):
        export(llama, edit, tmp_path / "adapted")
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_a_checkpoint_that_is_wrong_is_not_left_behind(
    llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = exporting.baked

    def wrong(leaf: Any, heads: int, maps: Any) -> Any:
        weight, bias = right(leaf, heads, maps)
        return 1.01 * weight, bias

    monkeypatch.setattr(exporting, "baked", wrong)
    with pytest.raises(HeadscopeError, match="gives other logits than the edited model .*keep the edit as a file"):
        export(llama, ScaleHeads([(0, 1)], 0.5), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_smollm2(smollm2: LanguageModel, tmp_path: Path) -> None:
    """Ten heads' offsets and a head scaled, in the real model: what is loaded again writes the same text."""
    heads = [(layer, layer % 9) for layer in range(10, 20)]
    edit = AddToHeads(heads, table(1, 10, 64), strength=0.5) + ScaleHeads([(18, 6)], 0.0)
    again = load_model(str(export(smollm2, edit, tmp_path / "out")))
    prompt = "The capital of France is"
    with apply(smollm2, edit):
        wanted, text = smollm2(prompt).logits, smollm2.generate(prompt, max_new_tokens=8)
    assert float((again(prompt).logits - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())
    assert again.generate(prompt, max_new_tokens=8) == text
