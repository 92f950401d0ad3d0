"""Vision data: chats with pictures, from any iterable, a file or a folder, and what is known of their pictures.

Whatever takes ``data`` takes all of these (``vision_items`` reads them):

- None: pictures drawn here, whose objects' places are known (``scenes``);
- a folder of pictures; beside ``a.png`` may stand ``a.txt``, what is asked about it; or a folder with a
  ``metadata.jsonl`` (as Hugging Face's ImageFolder writes it), read like any other ``.jsonl``;
- a ``.jsonl`` file, a line a chat: ``{"image": "a.png", "text": "What is it?", "boxes": {"cat": [10, 20, 50, 60]}}``;
  ``image`` (or ``file_name``) is a path from the file's folder, ``images`` several; ``system`` and ``messages`` (a
  whole chat) may be given;
- an iterable of ``VisionItem`` or of chats, as ``processor.apply_chat_template`` takes them; or a single one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from headscope.interp.errors import HeadscopeError
from headscope.interp.prompts.grids import Box
from headscope.interp.prompts.pictures import ADDRESSES, Message, check_chat, is_picture, picture_of
from headscope.interp.prompts.scenes.language import LONG
from headscope.interp.prompts.scenes.pictures import sample_pictures

DESCRIBE = "Please describe the image in detail."  # of VHD (arXiv 2412.13949)
BOXES = '"boxes": {"name": [left, top, right, bottom]}, in pixels'
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


@dataclass(frozen=True, eq=False)
class VisionItem:
    """A ``chat`` with pictures, and what is known of it: ``boxes`` (left, top, right, bottom) of named objects in the
    pixels of its first picture, and a ``name`` for tables.

    Raises:
        HeadscopeError: the chat is no list of messages; boxes are not so written.
    """

    chat: Sequence[Message]
    boxes: Mapping[str, Box] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        check_chat(self.chat)
        object.__setattr__(self, "boxes", _boxes(self.boxes))

    @property
    def pictures(self) -> list[Any]:
        """The pictures of the chat in their order, as they were given."""
        return [picture_of(part) for part in _picture_parts(self.chat)]


VisionData = str | Path | VisionItem | Sequence[Message] | Iterable[VisionItem | Sequence[Message]] | None


def ask(
    pictures: Any,
    text: str = DESCRIBE,
    *,
    system: str | None = None,
    boxes: Mapping[str, Sequence[float]] | None = None,
    name: str = "",
) -> VisionItem:
    """One question about one picture or a list of them (as ``pixels`` takes them: PIL image, array, path).

    Raises:
        HeadscopeError: ``text`` is not text.
    """
    if not isinstance(text, str):
        raise HeadscopeError(f"what is asked of a picture is text, not {text!r:.60}")
    several = pictures if isinstance(pictures, list | tuple) else [pictures]
    parts = [{"type": "image", "image": str(one) if isinstance(one, Path) else one} for one in several]
    chat: list[Message] = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    if system is not None:
        chat.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return VisionItem(chat, _boxes(boxes), name)


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
        found = [_item(i, one) for i, one in enumerate(listed(data, samples))]
    if not found:
        raise HeadscopeError("the vision data hold no chat: give at least one picture with a text")
    for i, one in enumerate(found):
        if not one.pictures:
            raise HeadscopeError(f"chat {i} of the vision data holds no picture: give each at least one")
    return found


def listed(data: Any, samples: int) -> list[Any]:
    """The first ``samples`` items or chats of what is no path; a single item or chat is a list of it.

    Raises:
        HeadscopeError: it is no iterable of them.
    """
    if isinstance(data, VisionItem) or (isinstance(data, Sequence) and data and isinstance(data[0], Mapping)):
        return [data]
    if not isinstance(data, Iterable) or isinstance(data, Mapping) or hasattr(data, "shape"):
        raise HeadscopeError(
            f"{type(data).__name__} is no vision data: give a folder, a .jsonl file or chats; ask(picture, text) is one"
        )
    return list(islice(data, samples))


def _item(number: int, given: Any) -> VisionItem:
    try:
        return given if isinstance(given, VisionItem) else VisionItem(given)
    except HeadscopeError as error:
        raise HeadscopeError(f"chat {number} of the vision data: {error}; or ask(picture, text) makes it") from error


def _read(path: Path) -> Iterable[VisionItem]:
    if path.is_dir():
        table = path / "metadata.jsonl"
        return _lines(table) if table.is_file() else _folder(path)
    if path.suffix == ".jsonl" and path.is_file():
        return _lines(path)
    raise HeadscopeError(f"{path} is no vision data: give a folder of pictures or a .jsonl file with a chat a line")


def _folder(path: Path) -> Iterable[VisionItem]:
    pictures = sorted(one for one in path.iterdir() if one.suffix.lower() in ENDINGS)
    if not pictures:
        alone = next(iter(sorted(path.glob("*.txt"))), None)
        beside = "" if alone is None else f"; {alone.name} is there, without the picture that it asks about"
        raise HeadscopeError(f"the folder {path} holds no picture ({', '.join(ENDINGS)}){beside}")
    for picture in pictures:
        words = picture.with_suffix(".txt")
        text = words.read_text(encoding="utf-8").strip() if words.is_file() else DESCRIBE
        yield ask(str(picture), text, name=picture.name)


def _lines(path: Path) -> Iterable[VisionItem]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield _line(json.loads(line), path.parent)
        except HeadscopeError as error:
            raise HeadscopeError(f"line {number} of {path}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise HeadscopeError(
                f"line {number} of {path} is no chat with pictures ({type(error).__name__}: {error}); write "
                '{"image": "a.png", "text": "What is it?"}'
            ) from error


def _line(row: Any, folder: Path) -> VisionItem:
    if not isinstance(row, dict):
        raise TypeError(f"a {type(row).__name__} and not an object in braces")
    boxes = _boxes(row.get("boxes"))
    if "messages" in row:
        check_chat(row["messages"])
        for part in _picture_parts(row["messages"]):
            found = _below(folder, picture_of(part))
            part.clear()
            part.update({"type": "image", "image": found})
        return VisionItem(row["messages"], boxes, str(row.get("name", "")))
    several = row["images"] if "images" in row else [row["image"] if "image" in row else row["file_name"]]
    text = row.get("text", row.get("question", DESCRIBE))
    if not isinstance(text, str) or not isinstance(several, list):
        raise TypeError("text is a string and images are a list")
    pictures = [_below(folder, one) for one in several]
    return ask(pictures, text, system=row.get("system"), boxes=boxes, name=str(row.get("name", several[0])))


def _below(folder: Path, place: Any) -> str:
    if not isinstance(place, str):
        raise TypeError(f"a picture is a path, not {place!r:.60}")
    return place if place.startswith(ADDRESSES) else str(folder / place)


def _picture_parts(chat: Sequence[Message]) -> list[Any]:
    return [
        p for message in chat if not isinstance(message["content"], str) for p in message["content"] if is_picture(p)
    ]


def _boxes(given: Any) -> dict[str, Box]:
    if not isinstance(given or {}, Mapping):
        raise HeadscopeError(f"boxes have names: write {BOXES}, not {given!r:.60}")
    return {str(name): _box(str(name), box) for name, box in (given or {}).items()}


def _box(name: str, box: Any) -> Box:
    try:
        left, top, right, bottom = (float(x) for x in box)
    except (TypeError, ValueError):
        left = top = right = bottom = 0.0
    if not (left < right and top < bottom):
        raise HeadscopeError(f"the box of {name!r} is (left, top, right, bottom) in pixels, not {box!r:.60}")
    if right <= 1 and bottom <= 1:
        raise HeadscopeError(f"the box of {name!r}, {box!r:.60}, lies in 0..1: boxes are in pixels, write {BOXES}")
    return left, top, right, bottom
