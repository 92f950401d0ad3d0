"""Settings from the command line as arguments of the library's functions, refused where they take no such thing."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from headscope.interp.errors import HeadscopeError
from headscope.interp.registry import meant, settings

POSITIONAL = ("name", "metric")  # fields of a task that are no settings
PASSAGES = 32  # of a reference text, evenly spread


def shared_out(
    classes: Mapping[str, type], given: Mapping[str, Any], kind: str = "method"
) -> dict[str, dict[str, Any]]:
    """Command-line settings for several declarations: each is given those that it takes.

    ``given``: "lengths", "depths", "samples", "text" and "seed" as their options read them, "set" as NAME=VALUE lines.

    Raises:
        HeadscopeError: a setting that none of them takes, or one that cannot be read.
    """
    asked = _asked(given)
    known = {name: settings(cls) for name, cls in classes.items()}
    for key in asked:
        if not any(key in takes for takes in known.values()):
            everything = dict.fromkeys(one for takes in known.values() for one in takes)
            raise HeadscopeError(f"{', '.join(classes)} has no setting {key!r}{meant(key, everything)}")
    found = {name: {key: value for key, value in asked.items() if key in takes} for name, takes in known.items()}
    for name, takes in known.items():
        if given.get("text") is not None:
            field = next((field for field in ("haystack", "texts") if field in takes), None)
            if field is None:
                raise HeadscopeError(f"the {kind} {name} reads no text: leave --text out")
            found[name][field] = given["text"] if field == "haystack" else read_text(given["text"])
        if given.get("seed") is not None and "seed" in takes:
            found[name]["seed"] = given["seed"]
    return found


def _asked(given: Mapping[str, Any]) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    if given.get("lengths") is not None:
        asked["lengths"] = numbers(given["lengths"], int, "--lengths")
    if given.get("depths") is not None:
        asked["depths"] = numbers(given["depths"], float, "--depths")
    if given.get("samples") is not None:
        asked["samples"] = given["samples"]
    for item in given.get("set") or ():
        key, separator, value = item.partition("=")
        if not separator:
            raise HeadscopeError(f"--set takes NAME=VALUE, got {item!r}")
        asked[key] = _value(value)
    return asked


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
        depths = numbers(given["depths"], float, "--depths")
        settings["depths"] = int(depths[0]) if len(depths) == 1 else depths
    if given.get("samples") is not None:
        settings["samples"] = given["samples"]
    if given.get("text") is not None:
        if "haystack" in known:
            settings["haystack"] = given["text"]
        else:
            settings["texts" if "texts" in known else "text"] = read_text(given["text"])
    for item in given.get("set", []):
        key, separator, value = item.partition("=")
        if not separator:
            raise HeadscopeError(f"--set takes NAME=VALUE, got {item!r}")
        settings[key] = _value(value)
    for key in settings:
        if key not in known:
            hidden = {"lm", "model", "out", "progress", "seed", *POSITIONAL}
            raise HeadscopeError(
                f"{name} has no setting {key!r}; it takes {', '.join(k for k in known if k not in hidden)}"
            )
    if "seed" in known and "seed" in given:
        settings["seed"] = given["seed"]
    return settings


def shared(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Of settings shared by several tasks, those that this one takes."""
    known = inspect.signature(function).parameters
    common = {key: value for key, value in given.items() if key in ("lengths", "depths") and key in known}
    return {**common, "set": [item for item in given["set"] if item.partition("=")[0] in known]}


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
