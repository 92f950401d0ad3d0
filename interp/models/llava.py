"""``llava-smollm2``: Hugging Face's LLaVA with SmolLM2-135M-Instruct as its language model, and the trained part.

Trained were a CLIP tower (6 layers of 4 heads, 120 x 120 pixels, 100 image tokens), the projector, and low-rank updates
of the language model's linear maps (``interp/laboratory/llava``): 18 MB in float16, shipped with the package. The model
is put together once, in the cache of converted models, as a plain checkpoint folder with its processor.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.available import IMAGE_SIZE, LANGUAGE, LLAVA, PATCH_SIZE, TRAINED, llava_folder
from headscope.interp.models.packages import PACKAGED, ensure_packaged

IMAGE_TOKEN, IMAGE_ID = "<image>", 16  # a reserved token of SmolLM2's vocabulary: no embedding is added
RESERVED = "<empty_output>"  # its name there
RANK, SCALE = 12, 2.0  # of the low-rank updates: W + SCALE * B @ A
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def untrained(language: Path) -> LlavaForConditionalGeneration:
    """The model with a random tower and projector around the language model of a folder, float32."""
    text = AutoModelForCausalLM.from_pretrained(str(language), dtype=torch.float32)
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text.config,
        image_token_index=IMAGE_ID,
        vision_feature_layer=-1,  # with -2, the default, the tower's last layer would be dead weight
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = text.config.eos_token_id
    return model.eval()


def tokenizer(language: Path) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer with one reserved token renamed."""
    renamed = (language / "tokenizer.json").read_text(encoding="utf-8").replace(RESERVED, IMAGE_TOKEN)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(renamed, encoding="utf-8")
        return PreTrainedTokenizerFast(
            tokenizer_file=str(path),
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            pad_token="<|im_end|>",
            unk_token="<|endoftext|>",
        )


def processor(language: Path) -> LlavaProcessor:
    """The processor: that tokenizer, pixels scaled to -1..1, the chat template that was trained with."""
    from transformers import (
        CLIPImageProcessor,
    )  # it warns where torchvision is missing, which is of no matter elsewhere

    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessor(size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        images,
        tokenizer(language),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,  # the class token, which "default" drops
    )


def add_trained(model: nn.Module, folder: Path) -> None:
    """Load tower and projector, and add the low-rank updates to the language model's weights, in place."""
    vision = {name: value.float() for name, value in load_file(folder / "vision.safetensors").items()}
    report = model.load_state_dict(vision, strict=False)
    if report.unexpected_keys:
        raise HeadscopeError(f"{folder} holds weights that {LLAVA} lacks ({report.unexpected_keys[0]}): reinstall it")
    updates = load_file(folder / "language.safetensors")
    for name in sorted(key.removesuffix(".lora_A.weight") for key in updates if key.endswith(".lora_A.weight")):
        weight = model.get_submodule(name).weight
        down, up = (updates[f"{name}.lora_{side}.weight"].float() for side in "AB")
        with torch.no_grad():
            weight += SCALE * up @ down


def trained_part(model: nn.Module, updates: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is kept of a trained model in float16: tower and projector; the low-rank ``updates``."""
    kept = {
        name: value
        for name, value in model.state_dict().items()
        if name.startswith(("model.vision_tower", "model.multi_modal_projector")) and "position_ids" not in name
    }
    half = [{name: t.detach().half().cpu().contiguous() for name, t in part.items()} for part in (kept, updates)]
    return half[0], half[1]


def ensure_llava(*, offline: bool = False) -> Path:
    """The folder of the model, put together first where it is not in the cache."""
    target = llava_folder()
    if (target / "config.json").is_file():
        return target
    language = ensure_packaged(PACKAGED[LANGUAGE], offline=offline)
    with FileLock(target.with_name(f"{LLAVA}.lock")):
        if not (target / "config.json").is_file():
            _put_together(language, target)
    return target


def _put_together(language: Path, target: Path) -> None:
    """Only a finished folder stays, whatever happens. The caller holds the lock."""
    work = Path(tempfile.mkdtemp(prefix=f".{LLAVA}-", dir=target.parent))
    try:
        model: Any = untrained(language)
        add_trained(model, TRAINED)
        model.save_pretrained(work)
        processor(language).save_pretrained(work)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(work, target)
    except OSError as error:
        raise HeadscopeError(
            f"cannot write the model cache {target.parent} ({error}): {LLAVA} needs about 600 MB free; set "
            "HEADSCOPE_CACHE to another folder"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
