"""What a committed benchmark writes: its numbers, on what they were made, and by which command."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from headscope.interp.runs.files import write_atomically
from headscope.interp.runs.provenance import provenance


def hardware(device: torch.device | str = "cpu") -> str:
    """A device in words: the card's name, or the processor's kind and the threads that torch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads > 1 else ''}, {platform.machine()} CPU"


def save_measured(path: Path | None, numbers: Mapping[str, Any], lm: Any, **settings: Any) -> None:
    """Write ``numbers`` as JSON with device, command and provenance; nothing where ``path`` is None.

    Args:
        path: the file; its folder is made.
        numbers: by name.
        lm: the model that was measured.
        settings: of the run, for its provenance.
    """
    if path is None:
        return
    made = {"device": hardware(lm.device), "command": shlex.join(["python", *sys.argv])}
    document = {**made, **numbers, "provenance": provenance(lm, **settings)}
    write_atomically(path, (json.dumps(document, indent=1, default=str) + "\n").encode())
