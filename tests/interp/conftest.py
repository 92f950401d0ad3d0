"""Tiny image-text models with real processors, built on the spot: byte-level tokenizer, PIL image processors."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BatchFeature,
    Gemma3Processor,
    Idefics3Processor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.video_utils import VideoMetadata, make_batched_videos

from headscope.interp import load_model
from headscope.interp.models import LanguageModel
from headscope.interp.survey.tiny import tiny_model

SQUARE = {"height": 32, "width": 32}
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% elif c['type'] == 'video' %}VIDEO{% else %}{{ c['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}<eos>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NAMES = ("llava", "qwen2_vl", "qwen2_5_vl", "gemma3", "idefics3", "paligemma")
MORE = ("llava_onevision", "qwen3_vl", "smolvlm")
QWEN = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}


@pytest.fixture(scope="session", params=NAMES)
def built(request) -> tuple[Any, Any]:
    """Every model with its processor."""
    return _vision_model(request.param)


@pytest.fixture(scope="session", params=[*NAMES, *MORE])
def seeing(request) -> Any:
    """Every model, and those whose images are of more than one grid, loaded with its processor."""
    return _seeing(request.param)


@pytest.fixture(scope="session")
def vision_lm() -> Any:
    """A model with its processor loaded, by name."""
    return _seeing


@pytest.fixture(scope="session")
def vision_model() -> Any:
    """A tiny random model and its processor, by name."""
    return _vision_model


@pytest.fixture(scope="session")
def picture() -> Any:
    """Noise of a given seed and size."""
    return _picture


@pytest.fixture
def template() -> str:
    """A chat template whose images are the one token ``<image>``."""
    return TEMPLATE.replace("IMAGE", "<image>")


def _tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", extra_special_tokens=special
    )


def _without_video(kind: type) -> type:
    """A Qwen processor of images only: its video processor would need torchvision."""
    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": lambda self, name, value: None})


class Frames:
    """In place of a Qwen video processor: patches of ``patch`` pixels, two frames and two by two of them a token."""

    merge_size, temporal_patch_size, patch = 2, 2, 8
    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __call__(self, videos: Any, do_sample_frames: bool = True, **_: Any) -> BatchFeature:
        assert not do_sample_frames
        grids, rows = [], []
        for video in make_batched_videos(videos):
            x = torch.tensor(np.stack([np.asarray(frame) for frame in video])).float().permute(0, 3, 1, 2) / 127.5 - 1
            frames, _, high, wide = x.shape
            grids.append((frames // 2, high // 8, wide // 8))
            x = x.reshape(frames // 2, 2, 3, high // 16, 2, 8, wide // 16, 2, 8)
            rows.append(x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * 2 * 8 * 8))  # two by two, then patches
        made = {"pixel_values_videos": torch.cat(rows), "video_grid_thw": torch.tensor(grids)}
        return BatchFeature(made | {"video_metadata": [VideoMetadata(1, fps=2.0, frames_indices=[0]) for _ in grids]})


def _processor(name: str) -> Any:
    """The processor of one architecture, for images of 32 x 32 pixels in patches of 8."""
    if name == "llava":
        images = LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)
        return LlavaProcessor(
            images,
            _tokenizer(image_token="<image>"),
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=TEMPLATE.replace("IMAGE", "<image>\n"),
        )
    if name == "llava_onevision":
        sizes = {"size": SQUARE, "image_grid_pinpoints": [[32, 32], [32, 64], [64, 32], [64, 64]]}
        return _without_video(LlavaOnevisionProcessor)(
            LlavaOnevisionImageProcessorPil(**sizes),
            _tokenizer(image_token="<image>", video_token="<video>"),
            None,
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            chat_template=TEMPLATE.replace("IMAGE", "<image>\n"),
        )
    if name in QWEN:
        names = ("image_pad", "video_pad", "vision_start", "vision_end")
        keys = ("image_token", "video_token", "vision_start_token", "vision_end_token")
        special = {key: f"<|{token}|>" for key, token in zip(keys, names, strict=True)}
        sizes = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 256, "max_pixels": 4096}
        kind = _without_video(QWEN[name])
        template = TEMPLATE
        for media in ("IMAGE", "VIDEO"):
            template = template.replace(media, f"<|vision_start|><|{media.lower()}_pad|><|vision_end|>")
        return kind(Qwen2VLImageProcessorPil(**sizes), _tokenizer(**special), Frames(), chat_template=template)
    if name == "gemma3":
        special = {
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        }
        template = TEMPLATE.replace("IMAGE", "<start_of_image>")
        images = Gemma3ImageProcessorPil(size=SQUARE)
        return Gemma3Processor(images, _tokenizer(**special), image_seq_length=4, chat_template=template)
    if name in ("idefics3", "smolvlm"):
        tags = {f"tag_{i}_{j}": f"<row_{i + 1}_col_{j + 1}>" for i in range(6) for j in range(6)}
        special = {"image_token": "<image>", "fake": "<fake_token_around_image>", "global": "<global-img>", **tags}
        # SmolVLM's own processor is this one and videos, for which it needs num2words
        images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
        template = TEMPLATE.replace("IMAGE", "<image>")
        return Idefics3Processor(images, _tokenizer(**special), image_seq_len=4, chat_template=template)
    images = SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 16
    return PaliGemmaProcessor(
        images, _tokenizer(image_token="<image>"), chat_template=TEMPLATE.replace("IMAGE", "<image>")
    )


def _vision_model(name: str) -> tuple[Any, Any]:
    """A tiny random model and its processor, agreeing on the tokens."""
    model, made = tiny_model(name, "image-text"), _processor(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(len(made.tokenizer), mean_resizing=False)
        model.get_input_embeddings().weight.data.normal_(std=0.5)
    if name == "llava_onevision":
        model.config.image_grid_pinpoints = made.image_processor.image_grid_pinpoints
    token = made.tokenizer.convert_tokens_to_ids(made.tokenizer.image_token)
    model.config.image_token_id = token
    for key in ("vision_start", "vision_end", "video"):
        if getattr(made.tokenizer, f"{key}_token", None) is not None:
            setattr(model.config, f"{key}_token_id", getattr(made.tokenizer, f"{key}_token_id"))
    return model, made


@functools.cache
def _seeing(name: str) -> LanguageModel:
    """A tiny model as load_model gives it."""
    model, made = _vision_model(name)
    return load_model(model, processor=made)


def _picture(seed: int, height: int = 40, width: int = 64) -> Image.Image:
    """Noise of this size."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))
