"""Pictures of chats as bytes: the one place where they are read, for the model and for what is drawn of them alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError

Message = Mapping[str, Any]
CHAT = '[{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]}]'
ADDRESSES = ("http://", "https://", "data:image/")
SLACK = 1e-3  # by which interpolation may leave 0..1
_KEYS = ("image", "url", "path", "base64", "image_url")


def check_chat(chat: Any) -> None:
    """Refuse what is no list of messages with a role and a content, or holds a picture part without a picture.

    Raises:
        HeadscopeError: says which message it is, and how a chat is written.
    """
    if isinstance(chat, str | Mapping) or not isinstance(chat, Sequence):
        raise HeadscopeError(f"a chat is a list of messages, not {_short(chat)}: write {CHAT}")
    for i, message in enumerate(chat):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise HeadscopeError(f"message {i} of the chat has no role and content ({_short(message)}): write {CHAT}")
        content = message["content"]
        if isinstance(content, str):
            continue
        if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
            raise HeadscopeError(f"the content of message {i} is a text or a list of parts: write {CHAT}")
        for part in content:
            kind = str(part.get("type"))
            if (is_picture(part) and not set(_KEYS) & set(part)) or (kind in ("text", "video") and kind not in part):
                raise HeadscopeError(f"message {i} holds a part without its {part['type']}: write {CHAT}")


def is_picture(part: Mapping[str, Any]) -> bool:
    """Whether a part of a message is a picture."""
    return part.get("type") in ("image", "image_url")


def frames_of(part: Mapping[str, Any]) -> list[NDArray[np.uint8]]:
    """The frames of a video part as bytes, (height, width, 3) each.

    Raises:
        HeadscopeError: it holds no frames (a file is not decoded here), one cannot be read, or they differ in size.
    """
    given = part["video"]
    if isinstance(given, str | Path | Mapping) or not hasattr(given, "__len__") or not len(given):
        raise HeadscopeError(
            f"a video is given by its frames, a list of pictures or an array (frame, height, width, 3), not by "
            f"{_short(given)}: decode the file first (PyAV, decord), and take the frames that the model is to see"
        )
    frames = [pixels(frame) for frame in given]
    if len({frame.shape for frame in frames}) > 1:
        raise HeadscopeError(f"the frames of a video differ in size ({frames[0].shape} and others): make them alike")
    return frames


def picture_of(part: Mapping[str, Any]) -> Any:
    """The picture of a part, as it was given."""
    given = next(part[key] for key in _KEYS if key in part)
    if "image_url" in part and isinstance(given, Mapping):
        return given.get("url", "")
    return f"data:image/any;base64,{given}" if "base64" in part and not str(given).startswith(ADDRESSES) else given


def with_bytes(chat: Sequence[Message]) -> list[Message]:
    """The chat with every picture and frame read, so that a processor gets the bytes that ``pixels`` makes of it.

    Raises:
        HeadscopeError: it is no chat; a picture cannot be read.
    """
    check_chat(chat)
    made: list[Message] = []
    for message in chat:
        parts = message["content"]
        if not isinstance(parts, str):
            message = {**message, "content": [_read(part) for part in parts]}
        made.append(message)
    return made


def _read(part: Mapping[str, Any]) -> Mapping[str, Any]:
    from PIL import Image

    if is_picture(part):
        return {"type": "image", "image": Image.fromarray(pixels(picture_of(part)))}
    if part.get("type") == "video":
        return {"type": "video", "video": [Image.fromarray(frame) for frame in frames_of(part)]}
    return part


def pixels(picture: Any) -> NDArray[np.uint8]:
    """A picture (PIL image, array, tensor, path or address) as bytes (height, width, 3).

    Arrays hold bytes 0..255, or floats 0..1; a grey one (height, width) becomes three equal channels.

    Raises:
        HeadscopeError: it cannot be read; its numbers are neither.
    """
    if isinstance(picture, str | Path):
        picture = _opened(str(picture))
    try:
        picture = picture.convert("RGB") if hasattr(picture, "convert") else picture
        found = np.asarray(picture.detach().cpu() if hasattr(picture, "detach") else picture)
    except (OSError, ValueError, TypeError) as error:  # of PIL, whose images are read when they are needed
        raise HeadscopeError(f"cannot read the picture {_short(picture)} ({error}); give an image file") from error
    shape = found.shape
    if found.ndim == 3 and shape[2] not in (3, 4) and 1 in (shape[0], shape[2]):  # grey, with an axis of channels
        found = found[..., 0] if shape[2] == 1 else found[0]
    if found.ndim == 2:
        found = np.repeat(found[..., None], 3, axis=2)
    if found.ndim == 3 and found.shape[2] not in (3, 4) and found.shape[0] in (3, 4):
        found = np.moveaxis(found, 0, 2)
    if found.ndim != 3 or found.shape[2] not in (3, 4) or not found.size:
        kind = "an array" if found.ndim else _short(picture)
        raise HeadscopeError(f"{kind} of shape {shape} is no picture: give (height, width, 3), a PIL image or a path")
    return np.ascontiguousarray(_as_bytes(found[..., :3]))


def _as_bytes(found: NDArray[Any]) -> NDArray[np.uint8]:
    kind = found.dtype.kind
    if kind not in "buif":
        raise HeadscopeError(f"an array of {found.dtype} is no picture: give bytes 0..255 or floats 0..1")
    least, most = float(found.min()), float(found.max())
    low, high = (-SLACK, 1 + SLACK) if kind == "f" else (0, 255)
    if not low <= least <= most <= high:  # not a number, too
        wanted = "floats are 0..1" if kind == "f" else "whole numbers are 0..255"
        raise HeadscopeError(
            f"a picture's {wanted}, and this array of {found.dtype} has {least:g} to {most:g}: give bytes (numpy.uint8)"
        )
    if kind in "bf":
        found = np.round(np.clip(found.astype(np.float64), 0.0, 1.0) * 255)
    return found.astype(np.uint8)


def _opened(place: str) -> Any:
    from transformers.image_utils import load_image

    if not place.startswith(ADDRESSES):
        if not Path(place).exists():
            raise HeadscopeError(
                f"there is no picture {place:.200}: give the path of an image file, or correct this one"
            )
        if not Path(place).is_file():
            raise HeadscopeError(f"the picture {place} is no file: give one image file")
    try:
        return load_image(place)
    except Exception as error:  # of PIL, of the file system and of the network
        raise HeadscopeError(
            f"cannot read the picture {place:.200} ({error}); give an image file, as .png or .jpg"
        ) from error


def _short(given: Any) -> str:
    return f"{type(given).__name__} {given!r:.60}"
