"""Vision data: chats with pictures, from any iterable, a file or a folder, and what is known of their pictures.

Whatever takes ``data`` takes all of these (``vision_items`` reads them):

- None: pictures drawn here, whose objects' places are known (``scenes``);
- a folder of pictures; beside ``a.png`` may stand ``a.txt``, what is asked about it; or a folder with a
  ``metadata.jsonl`` (as Hugging Face's ImageFolder writes it), read like any other ``.jsonl``;
- a ``.jsonl`` file, a line a chat: ``{"image": "a.png", "text": "What is it?", "boxes": {"cat": [10, 20, 50, 60]}}``;
  ``image`` (or ``file_name``) is a path from the file's folder, ``images`` several; ``system`` and ``messages`` (a
  whole chat) may be given;
- an iterable of ``VisionItem`` or of chats, as ``processor.apply_chat_template`` takes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts.grids import Box
from headscope.interp.prompts.scenes.language import LONG
from headscope.interp.prompts.scenes.pictures import sample_pictures
from headscope.interp.prompts.vision import Message

DESCRIBE = "Please describe the image in detail."  # of VHD (arXiv 2412.13949)
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


@dataclass(frozen=True, eq=False)
class VisionItem:
    """A ``chat`` with pictures, and what is known of it: ``boxes`` (left, top, right, bottom) of named objects in the
    pixels of its first picture, and a ``name`` for tables."""

    chat: Sequence[Message]
    boxes: Mapping[str, Box] = field(default_factory=dict)
    name: str = ""

    @property
    def pictures(self) -> list[Any]:
        """The pictures of the chat in their order, as they were given."""
        parts = [p for m in self.chat if not isinstance(m["content"], str) for p in m["content"]]
        return [next(p[key] for key in ("image", "url", "path") if key in p) for p in parts if p.get("type") == "image"]


VisionData = str | Path | Iterable[VisionItem | Sequence[Message]] | None


def ask(
    pictures: Any,
    text: str = DESCRIBE,
    *,
    system: str | None = None,
    boxes: Mapping[str, Sequence[float]] | None = None,
    name: str = "",
) -> VisionItem:
    """One question about one picture or a list of them (PIL image, array (height, width, 3) of bytes, or path)."""
    several = pictures if isinstance(pictures, list | tuple) else [pictures]
    parts = [{"type": "image", "image": str(one) if isinstance(one, Path) else one} for one in several]
    chat: list[Message] = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    if system is not None:
        chat.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return VisionItem(chat, {key: _box(key, box) for key, box in (boxes or {}).items()}, name)


def vision_items(data: VisionData, samples: int) -> list[VisionItem]:
    """The first ``samples`` items of ``data``.

    Raises:
        HeadscopeError: there is none, or one without a picture; a path or a line that cannot be read.
    """
    if data is None:
        drawn = enumerate(sample_pictures(samples))
        found = [ask(one.pixels, LONG, boxes=one.boxes, name=f"scene {i}") for i, one in drawn]
    elif isinstance(data, str | Path):
        found = list(islice(_read(Path(data)), samples))
    else:
        found = [one if isinstance(one, VisionItem) else VisionItem(one) for one in islice(data, samples)]
    if not found:
        raise HeadscopeError("the vision data hold no chat: give at least one picture with a text")
    for i, one in enumerate(found):
        if not one.pictures:
            raise HeadscopeError(f"chat {i} of the vision data holds no picture: give each at least one")
    return found


def pixels(picture: Any) -> NDArray[np.uint8]:
    """A picture (PIL image, array, tensor or path) as bytes (height, width, 3).

    Raises:
        HeadscopeError: it cannot be read.
    """
    if isinstance(picture, str | Path):
        from transformers.image_utils import load_image

        try:
            picture = load_image(str(picture))
        except Exception as error:  # of PIL and of the file system
            raise HeadscopeError(f"cannot read the picture {picture} ({error}); give an image file") from error
    picture = picture.convert("RGB") if hasattr(picture, "convert") else picture
    found = np.asarray(picture)
    if found.ndim == 2:
        found = np.repeat(found[..., None], 3, axis=2)
    if found.ndim == 3 and found.shape[2] not in (3, 4) and found.shape[0] in (3, 4):
        found = np.moveaxis(found, 0, 2)
    if found.ndim != 3 or found.shape[2] not in (3, 4):
        raise HeadscopeError(f"an array of shape {found.shape} is no picture: give (height, width, 3)")
    if found.dtype.kind == "f":
        found = np.round(np.clip(found, 0.0, 1.0) * 255)
    return np.ascontiguousarray(found[..., :3].astype(np.uint8))


def _read(path: Path) -> Iterable[VisionItem]:
    if path.is_dir():
        listed = path / "metadata.jsonl"
        return _lines(listed) if listed.is_file() else _folder(path)
    if path.suffix == ".jsonl" and path.is_file():
        return _lines(path)
    raise HeadscopeError(f"{path} is no vision data: give a folder of pictures or a .jsonl file with a chat a line")


def _folder(path: Path) -> Iterable[VisionItem]:
    for picture in sorted(one for one in path.iterdir() if one.suffix.lower() in ENDINGS):
        words = picture.with_suffix(".txt")
        text = words.read_text(encoding="utf-8").strip() if words.is_file() else DESCRIBE
        yield ask(str(picture), text, name=picture.name)


def _lines(path: Path) -> Iterable[VisionItem]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield _line(json.loads(line), path.parent)
        except (ValueError, KeyError, TypeError) as error:
            raise HeadscopeError(
                f"line {number} of {path} is no chat with pictures ({type(error).__name__}: {error}); write "
                '{"image": "a.png", "text": "What is it?"}'
            ) from error


def _line(row: dict[str, Any], folder: Path) -> VisionItem:
    boxes = {key: _box(key, box) for key, box in row.get("boxes", {}).items()}
    if "messages" in row:
        parts = [p for m in row["messages"] if not isinstance(m["content"], str) for p in m["content"]]
        for part in parts:
            if part.get("type") == "image":
                key = next(key for key in ("image", "path") if key in part)
                part[key] = str(folder / part[key])
        return VisionItem(row["messages"], boxes, str(row.get("name", "")))
    several = row["images"] if "images" in row else [row["image"] if "image" in row else row["file_name"]]
    text = row.get("text", row.get("question", DESCRIBE))
    pictures = [str(folder / one) for one in several]
    return ask(pictures, text, system=row.get("system"), boxes=boxes, name=str(row.get("name", several[0])))


def _box(name: str, box: Sequence[float]) -> Box:
    left, top, right, bottom = (float(x) for x in box)
    if not (left < right and top < bottom):
        raise HeadscopeError(f"the box of {name!r} is (left, top, right, bottom) in pixels, not {tuple(box)}")
    return left, top, right, bottom
