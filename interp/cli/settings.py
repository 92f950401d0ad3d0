"""Settings from the command line as arguments of the library's functions, refused where they take no such thing."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from headscope.interp.errors import HeadscopeError

PASSAGES = 32  # of a reference text, evenly spread


def numbers(text: str, kind: Callable[[str], Any], option: str) -> list[Any]:
    """Comma-separated numbers."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise HeadscopeError(f"{option} takes comma-separated numbers, e.g. {option} 1,2; got {text!r}") from error


def keywords(function: Callable[..., Any], name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Command-line settings as keyword arguments of ``function``, refusing what it does not take."""
    known = inspect.signature(function).parameters
    settings: dict[str, Any] = {}
    if given.get("lengths") is not None:
        settings["lengths"] = numbers(given["lengths"], int, "--lengths")
    if given.get("depths") is not None:
        settings["depths"] = numbers(given["depths"], float, "--depths")
    if given.get("samples") is not None:
        settings["samples"] = given["samples"]
    if given.get("text") is not None:
        if "haystack" in known:
            settings["haystack"] = given["text"]
        else:
            settings["texts" if "texts" in known else "text"] = read_text(given["text"])
    settings |= assignments(given.get("set", []))
    for key in settings:
        if key not in known:
            hidden = {"lm", "model", "out", "progress", "seed"}
            raise HeadscopeError(
                f"{name} has no setting {key!r}; it takes {', '.join(k for k in known if k not in hidden)}"
            )
    if "seed" in known and "seed" in given:
        settings["seed"] = given["seed"]
    return settings


def assignments(items: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """NAME=VALUE, with JSON values (anything else is a string), by name."""
    found = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise HeadscopeError(f"{option} takes NAME=VALUE, got {item!r}")
        found[key.strip()] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_text(file: Path) -> str:
    """A file's text.

    Raises:
        HeadscopeError: it cannot be read, or not as UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HeadscopeError(f"cannot read {file} as text ({error}); give a UTF-8 text file") from error


def passages(file: Path | None) -> list[str]:
    """Paragraphs of a reference text (the bundled haystack by default), at most ``PASSAGES``, evenly spread."""
    from headscope.interp.prompts import load_haystack

    paragraphs = [part for part in load_haystack(file).split("\n\n") if part.strip()]
    if file is None:
        paragraphs = [part for part in paragraphs if len(part) > 200]
    return paragraphs[:: max(1, len(paragraphs) // PASSAGES)][:PASSAGES]
