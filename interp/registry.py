"""Registries: what a user names, by name. Head methods, statistics, edits and tasks are each in one.

Everything a user names is a small frozen dataclass (a *declaration*), but for attention variants, which are modules.
Its fields are its settings, and ``settings`` reads them for the command line, the documents and provenance; its
docstring is its page; class variables say the rest: ``unit``, ``higher_is_better``, ``source``, ``refused``. To add
one: a file, and a line in its registry. A package of somebody else adds its own through an entry point of the group
``headscope.KIND`` (``name = "module:Class"``).

Classes are imported when they are asked for, so that reading a registry's names costs nothing.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module, metadata
from numbers import Integral, Real
from typing import Any, Generic, TypeVar

from headscope.interp.errors import HeadscopeError

T = TypeVar("T")


class UnknownNameError(HeadscopeError, KeyError):
    """A name that a registry does not hold; a KeyError too, so that a registry is a mapping like any other."""

    __str__ = Exception.__str__


class Registry(Mapping[str, type[T]], Generic[T]):
    """Names to classes of one ``kind`` (``"head method"``); a hyphen in a name stands for an underscore.

    Args:
        kind: what its entries are, for messages.
        group: the registry's name on the command line, and of the entry points that add to it.
        room: the package that ``entries`` are counted from.
        entries: ``{name: "module:Class"}``.
    """

    def __init__(self, kind: str, group: str, room: str, entries: Mapping[str, str]) -> None:
        self.kind, self.group = kind, group
        self._own = {name: f"{room}.{place}" for name, place in entries.items()}

    @cached_property
    def places(self) -> dict[str, str]:
        """Where every class stands, ``"package.module:Class"``: the entries, then those of installed packages.

        Raises:
            HeadscopeError: two of one name.
        """
        found = dict(self._own)
        for point in metadata.entry_points(group=f"headscope.{self.group}"):
            if found.setdefault(point.name, point.value) != point.value:
                raise HeadscopeError(
                    f"two packages define the {self.kind} {point.name!r} ({found[point.name]} and {point.value}): "
                    "rename one of them"
                )
        return found

    def __getitem__(self, name: str) -> type[T]:
        self.check([name])
        key = str(name).replace("-", "_")
        module, _, own = self.places[key].partition(":")
        found: type[T] = getattr(import_module(module), own)
        return found

    def __contains__(self, name: object) -> bool:
        return str(name).replace("-", "_") in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __repr__(self) -> str:
        return f"Registry({self.kind}: {', '.join(self)})"

    def check(self, names: Iterable[str]) -> None:
        """Raise UnknownNameError for the first that is not held; nothing is imported."""
        for name in names:
            if name not in self:
                close = meant(str(name).replace("-", "_"), self)
                raise UnknownNameError(f"there is no {self.kind} {name!r}{close}; known: {', '.join(self)}")

    def rows(self) -> list[dict[str, Any]]:
        """One row an entry, for tables: name, class, file, summary, unit, higher_is_better, source, refused, settings.

        A setting has name, type, required, default (None where it is required) and meaning.
        """
        return [_row(name, self[name]) for name in self]


@dataclass(frozen=True)
class Setting:
    """A field of a declaration: its name, its type in words, its default (``dataclasses.MISSING``: it has to be
    given) and what a docstring says of it."""

    name: str
    type: str
    default: Any
    meaning: str


def settings(cls: type) -> dict[str, Setting]:
    """The settings of a declaration: every field that its constructor takes, described by an ``Args:`` section of the
    class or of one that it is made from; of a class that is no dataclass (an attention variant) none."""
    meanings: dict[str, str] = {}
    for base in cls.__mro__:
        meanings = {**_arguments(vars(base).get("__doc__") or ""), **meanings}
    known = {field.name: field for field in fields(cls) if field.init} if is_dataclass(cls) else {}
    own_first = [name for base in cls.__mro__ for name in vars(base).get("__annotations__", ()) if name in known]
    found = {}
    for name in dict.fromkeys(own_first):
        field = known[name]
        default = field.default if field.default_factory is MISSING else field.default_factory()
        found[name] = Setting(name, str(field.type), default, meanings.get(name, ""))
    return found


def make(cls: type[T], name: str, given: Mapping[str, Any]) -> T:
    """A declaration from settings by name.

    Raises:
        HeadscopeError: a setting that ``cls`` does not have, or one that it needs and was not given.
    """
    known = settings(cls)
    for key in given:
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise HeadscopeError(f"{name} has no setting {key!r}{meant(key, known)}; {takes}")
    missing = [key for key, one in known.items() if one.default is MISSING and key not in given]
    if missing:
        raise HeadscopeError(f"{name} needs {' and '.join(missing)}: give {', '.join(f'{key}=...' for key in missing)}")
    return cls(**given)


def check_numbers(made: Any, name: str) -> None:
    """Refuse settings of ``made``, a dataclass, that are declared as numbers and are none.

    Raises:
        HeadscopeError: names the setting.
    """
    for one in fields(made):
        kinds, value = set(str(one.type).split(" | ")), getattr(made, one.name)
        if not kinds <= {"int", "float", "None"} or (value is None and "None" in kinds):
            continue
        whole = "float" not in kinds
        if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
            raise HeadscopeError(f"{name}: {one.name} must be a {'whole ' if whole else ''}number, not {value!r:.60}")


def check_counts(low: int, **given: int | None) -> None:
    """Refuse numbers, by the names of the settings, that are not whole or below ``low``; None is left alone.

    Raises:
        HeadscopeError: names the setting.
    """
    for name, value in given.items():
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (whole and value >= low):
            raise HeadscopeError(f"{name} is a whole number of at least {low}, not {value!r:.60}")


def shared_out(classes: Mapping[str, type], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings for several declarations: each is given those that it has.

    Raises:
        HeadscopeError: a setting that none of them has.
    """
    known = {name: settings(cls) for name, cls in classes.items()}
    every = dict.fromkeys(key for has in known.values() for key in has)
    names = ", ".join(classes)
    for key in given:
        if key not in every:
            who = f"{names} has no" if len(classes) == 1 else f"none of {names} has a"
            raise HeadscopeError(f"{who} setting {key!r}{meant(key, every)}; known: {', '.join(every)}")
    return {name: {key: value for key, value in given.items() if key in has} for name, has in known.items()}


def summary(cls: type) -> str:
    """The first sentence of a class's docstring."""
    text = " ".join(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].split())
    return re.split(r"(?<!\bal)(?<!\bEq)\.\s+(?=[A-Z(`])", text)[0].rstrip(".: ")


def page(cls: type, **more: str) -> str:
    """A class's docstring with an ``Args:`` section for all of its settings, those of its bases included; ``more`` adds
    arguments that are no settings."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")[0].rstrip()
    entries = [(one.name, one.meaning, one.default) for one in settings(cls).values()]
    lines = [f"    {name}: {meaning}" for name, meaning in more.items()]
    for name, meaning, default in entries:
        lines.append(f"    {name}: {meaning}" + ("" if default is MISSING else f" [{default!r}]"))
    return f"{text}\n\nArgs:\n" + "\n".join(lines) if lines else text


def _row(name: str, cls: type) -> dict[str, Any]:
    module = sys.modules[cls.__module__]
    parts = cls.__module__.split(".")
    here = parts[0] == "headscope"
    return {
        "name": name,
        "class": cls.__qualname__,
        "file": "/".join(parts[1:]) + ".py" if here else str(module.__file__),
        "summary": summary(cls),
        "unit": getattr(cls, "unit", ""),
        "higher_is_better": getattr(cls, "higher_is_better", None),
        "source": getattr(cls, "source", ""),
        "refused": dict(getattr(cls, "refused", None) or {}),
        "settings": [_setting(one) for one in settings(cls).values()],
    }


def _setting(one: Setting) -> dict[str, Any]:
    required = one.default is MISSING
    default = None if required else one.default
    return {"name": one.name, "type": one.type, "required": required, "default": default, "meaning": one.meaning}


def meant(name: str, known: Mapping[str, Any]) -> str:
    """`` (did you mean ...?)`` where a known name is close, else nothing."""
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _arguments(doc: str) -> dict[str, str]:
    """What the ``Args:`` section of a docstring says, by name; ``a, b: ...`` speaks of both."""
    text = inspect.cleandoc(doc)
    section = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)+)", text, re.MULTILINE)
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=[ ]{4}\S)", section[1]) if section else ():
        names, _, meaning = entry.strip().partition(":")
        for name in names.split(","):
            found[name.strip()] = " ".join(meaning.split())
    return found
