"""Settings from the command line as arguments of the library's functions, refused where they take no such thing."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headscope.interp.errors import HeadscopeError
from headscope.interp.registry import meant, settings, shared_out

PASSAGES = 32  # of a reference text, evenly spread


def for_methods(classes: Mapping[str, type], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Command-line settings for several head methods: each is given those that it has, and ``--text`` and ``--seed``.

    Raises:
        HeadscopeError: a setting that none of them has, one that cannot be read, or a method that reads no text.
    """
    found = shared_out(classes, asked(given))
    for name, own in found.items():
        has = settings(classes[name])
        if given.get("text") is not None:
            field = next((field for field in ("haystack", "texts") if field in has), None)
            if field is None:
                raise HeadscopeError(f"{name} reads no text: leave --text out")
            own[field] = given["text"] if field == "haystack" else read_text(given["text"])
        if "seed" in has and given.get("seed") is not None:
            own["seed"] = given["seed"]
    return found


def asked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name from "lengths", "depths", "samples" and "data" as their options read them, and "set"
    (NAME=VALUE)."""
    found: dict[str, Any] = {}
    if given.get("lengths") is not None:
        found["lengths"] = numbers(given["lengths"], int, "--lengths")
    if given.get("depths") is not None:
        found["depths"] = numbers(given["depths"], float, "--depths")
    found |= {name: given[name] for name in ("samples", "data") if given.get(name) is not None}
    more = assignments(given.get("set") or ())
    if twice := sorted(found.keys() & more.keys()):
        raise HeadscopeError(f"--{twice[0]} and --set {twice[0]}= say the same setting: give one of them")
    return found | more


def left_out(classes: Mapping[str, type], given: Mapping[str, Any]) -> list[str]:
    """One line for every setting that some of several methods were given and others do not have."""
    lines = []
    for key in asked(given):
        without = [name for name, cls in classes.items() if key not in settings(cls)]
        lines += [f"{', '.join(without)} takes no {key} and runs as it is"] if without else []
    return lines


def numbers(text: str, kind: Callable[[str], Any], option: str) -> list[Any]:
    """Comma-separated numbers."""
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise HeadscopeError(f"{option} takes comma-separated numbers, e.g. {option} 1,2; got {text!r}") from error


def keywords(function: Callable[..., Any], name: str, items: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE lines as keyword arguments of a function, refusing what it does not take."""
    found = assignments(items)
    takes = [key for key in inspect.signature(function).parameters if key not in ("lm", "model", "out", "progress")]
    for key in found:
        if key not in takes:
            known = dict.fromkeys(takes)
            raise HeadscopeError(f"{name} has no setting {key!r}{meant(key, known)}; it takes {', '.join(takes)}")
    return found


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
    count = min(PASSAGES, len(paragraphs))
    return [paragraphs[i * len(paragraphs) // count] for i in range(count)]
