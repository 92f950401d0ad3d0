"""Small random inputs that a model accepts: text with padding, pixels, sound features, decoder tokens.

What a model takes is read from its forward's signature; shapes that no signature tells (one image or several tiles,
flattened patches) are tried in turn, and the number of image tokens is read from the model's own complaint.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.given import PreTrained
from headscope.interp.sites.pictures import GRIDS
from headscope.interp.sites.pictures import pictures as forms
from headscope.interp.sites.unwrap import model_device

LENGTH = 24
_MEDIA_TOKEN = {
    "image": ("image_token_id", "image_token_index", "img_token_id", "media_token_id", "image_patch_id"),
    "video": ("video_token_id", "video_token_index"),
    "audio": ("audio_token_id", "audio_token_index"),
}


def media_tokens(config: Any) -> dict[str, int]:
    """The token ids at whose positions a model puts image, video or audio features, where its configuration says."""
    found = {}
    for kind, names in _MEDIA_TOKEN.items():
        ids = (getattr(config, name, None) for name in names)
        token = next((one for one in ids if one is not None), None)
        if token is not None:
            found[kind] = int(token)
    return found


def special_tokens(config: Any) -> set[int]:
    """The token ids that a configuration names (padding, image, end ...): plain text holds none of them."""
    named = {k: v for k, v in config.to_dict().items() if re.search(r"(token_id|token_index)$", str(k))}
    return {v for v in named.values() if isinstance(v, int)}


def example_inputs(
    model: PreTrained, *, padding: bool = True, length: int = LENGTH, seed: int = 0, images: bool = True
) -> dict[str, Tensor]:
    """Inputs for two examples in the model's precision and on its device, checked by running the model on them once.

    Text is ``length`` random tokens, the first example padded by three on the left and the second by two on the right
    (with ``padding``). A model of images and text gets one image an example, before its text.

    Raises:
        HeadscopeError: no form of input that was tried runs; the message holds the model's own.
    """
    generator = torch.Generator().manual_seed(seed)
    failure: Exception | None = None
    for inputs in _candidates(model, padding, length, generator, images):
        for _ in range(4):
            placed = _placed(inputs, model)
            try:
                with torch.no_grad():
                    model(**placed)
                return placed
            except HeadscopeError:
                raise
            except Exception as error:
                failure = failure or error
                missing = _wanted_image_tokens(model, error)
                if missing is None or "input_ids" not in inputs or not _put_images(model, inputs, missing):
                    break
                failure = None
    reason = str(failure).strip().splitlines()[0][:160] if str(failure).strip() else ""
    raise HeadscopeError(f"{type(model).__name__} runs on none of our inputs: {type(failure).__name__}: {reason}")


def _placed(inputs: dict[str, Tensor], model: PreTrained) -> dict[str, Tensor]:
    device, dtype = model_device(model), model.dtype
    return {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in inputs.items()}


def given(inputs: dict[str, Tensor]) -> str:
    """What inputs hold, in words: "text and images"."""
    marks = {"text": ("input_ids",), "images": ("pixel", "patches"), "sound": ("input_features", "input_values")}
    own = [name for name in inputs if not name.startswith("decoder")]
    return " and ".join(word for word, parts in marks.items() if any(p in name for p in parts for name in own))


def _candidates(
    model: PreTrained, padding: bool, length: int, generator: torch.Generator, images: bool
) -> Iterator[dict[str, Tensor]]:
    names = inspect.signature(model.forward).parameters
    text = _text(model, padding, length, generator, names)
    pictures = list(forms(model, names, text, generator)) if images else []
    sound = _sound(model, generator, names)
    if sound:
        yield {**sound, **_decoder(model, text, names)}
    for picture in pictures:
        yield {**text, **picture}
    for picture in pictures if getattr(model, "main_input_name", "") != "input_ids" else ():
        yield {**picture, **_decoder(model, text, names)}
        yield picture
    yield text
    yield {k: v for k, v in text.items() if k != "attention_mask"}


def _text(model: PreTrained, padding: bool, length: int, generator: torch.Generator, names: Any) -> dict[str, Tensor]:
    if "input_ids" not in names:
        return {}
    config = model.config
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocab = min(int(getattr(inner, "vocab_size", None) or 64), 100)
    plain = [i for i in range(min(4, vocab - 1), vocab) if i not in special_tokens(config)]
    ids = torch.tensor(plain)[torch.randint(len(plain), (2, length), generator=generator)]
    text = {"input_ids": ids}
    if "attention_mask" in names or "kwargs" in names:
        mask = torch.ones_like(ids)
        if padding:
            mask[0, :3] = 0
            mask[1, -2:] = 0
        text["attention_mask"] = mask
    if "mm_token_type_ids" in names:
        text["mm_token_type_ids"] = torch.zeros_like(ids)
    return {**text, **_decoder(model, text, names)}


def _decoder(model: PreTrained, text: dict[str, Tensor], names: Any) -> dict[str, Tensor]:
    if "decoder_input_ids" not in names or not getattr(model.config, "is_encoder_decoder", True):
        return {}
    if "input_ids" in text:
        return {"decoder_input_ids": text["input_ids"][:, :12].flip(0).contiguous()}
    return {"decoder_input_ids": torch.arange(5, 17).repeat(2, 1) + torch.arange(2)[:, None]}


def _sound(model: PreTrained, generator: torch.Generator, names: Any) -> dict[str, Tensor]:
    config = model.config
    reads = getattr(model, "main_input_name", "")
    if reads == "input_values" and reads in names:
        return {"input_values": torch.randn(2, 4000, generator=generator)}
    if reads != "input_features" or reads not in names:
        return {}
    bins, frames = getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 50)
    return {"input_features": torch.randn(2, bins, frames, generator=generator)}


def _wanted_image_tokens(model: PreTrained, error: Exception) -> int | None:
    """How many image features a model says it has for the image tokens it found; some count single numbers."""
    found = re.search(r"tokens.*?(?:tokens)?: \d+,? (?:and )?(?:image )?features:? (\d+)", str(error))
    found = found or re.search(r"Got (\d+) feature vectors for \d+ placeholder tokens", str(error))
    if found is None:
        return None
    features, width = int(found.group(1)), int(getattr(model.config.get_text_config(), "hidden_size", 1))
    return features // width if features >= 8 * width else features


def _put_images(model: PreTrained, inputs: dict[str, Tensor], features: int) -> bool:
    """Prefix each example with its share of ``features`` image tokens."""
    token = media_tokens(model.config).get("image")
    ids = inputs["input_ids"]
    if token is None or bool((ids == token).any()):
        return False
    grid = next((inputs[name] for name in GRIDS if name in inputs), None)
    patches = torch.ones(2, dtype=torch.long) if grid is None else grid.prod(-1)
    first = int(patches[0] * features // patches.sum())
    shares = [first, features - first]
    width = max(shares)
    rows = []
    for row, share in zip(ids, shares, strict=True):
        rest = row.repeat(1 + width // row.numel())[: width - share]
        rows.append(torch.cat([row[:4], torch.full((share,), token), rest, row[4:]]))
    inputs["input_ids"] = torch.stack(rows)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == token).long()
    if "attention_mask" in inputs:
        mask = inputs["attention_mask"]
        inputs["attention_mask"] = torch.cat([mask[:, :4], torch.ones(2, width, dtype=mask.dtype), mask[:, 4:]], 1)
    return True
