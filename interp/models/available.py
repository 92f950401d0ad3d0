"""The models that ``load_model`` knows by name: those of package indexes, and the one that was trained here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from headscope.interp.models.packages import PACKAGED, cache_root, is_ready, model_folder

LLAVA, LANGUAGE = "llava-smollm2", "smollm2-135m"  # the vision-language model, and what its language model is
TRAINED = Path(__file__).parent / "trained" / LLAVA
IMAGE_SIZE, PATCH_SIZE = 120, 12  # pixels of an image's side that it reads, and of one image token's
_MB = 1_000_000


@dataclass(frozen=True)
class AvailableModel:
    """One line of ``headscope models``; sizes in bytes."""

    name: str
    title: str
    license: str
    download: int
    size: int
    source: str
    cached: bool
    folder: str


def known_names() -> str:
    """The names, for messages."""
    return ", ".join(sorted([*PACKAGED, LLAVA]))


def available_models() -> list[AvailableModel]:
    """The models that ``load_model`` knows by name, and whether each is already in the cache."""
    packaged = [
        AvailableModel(m.name, m.title, m.license, m.download, m.size, m.source, is_ready(m), str(model_folder(m)))
        for m in PACKAGED.values()
    ]
    return [*packaged, _llava()]


def llava_revision() -> str:
    """Which training the shipped weights are of."""
    return str(json.loads((TRAINED / "training.json").read_text(encoding="utf-8"))["revision"])


def llava_folder() -> Path:
    """Where the vision-language model is put together; the name changes with each of its two sources."""
    return cache_root() / f"{LLAVA}-{PACKAGED[LANGUAGE].gguf_sha256[:12]}-{llava_revision()[:12]}"


def _llava() -> AvailableModel:
    base, folder = PACKAGED[LANGUAGE], llava_folder()
    download = 0 if is_ready(base) else base.download
    ready = (folder / "config.json").is_file()
    title, source = f"LLaVA on {base.title}, of drawn scenes", f"headscope's own weights, and {base.source}"
    return AvailableModel(LLAVA, title, base.license, download, 560 * _MB, source, ready, str(folder))
