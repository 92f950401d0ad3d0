"""Methods that ask before they run, for single objects.

The method is replaced on its class while anything is guarded and asks for guarded objects only. Nothing is put on the
objects: a copy of one, or what is saved of it, holds nothing of ours.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from threading import RLock
from typing import Any

Around = Callable[[tuple[Any, ...], dict[str, Any]], AbstractContextManager[Any]]
_LOCK = RLock()


@dataclass(frozen=True, eq=False)
class Guard:
    """``around`` is entered with the arguments of every call of a method of one object, which is held weakly;
    ``instead`` is called in place of the method."""

    of: weakref.ref[Any]
    owner: type
    name: str
    around: Around
    instead: Callable[..., Any] | None = None


@dataclass(eq=False)
class _Replaced:
    real: Any
    ours: Any


_GUARDS: dict[tuple[type, str], list[Guard]] = {}
_REPLACED: dict[tuple[type, str], _Replaced] = {}


def _nothing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[Any]:
    return nullcontext()


def guard(thing: Any, name: str, around: Around = _nothing, instead: Callable[..., Any] | None = None) -> Guard | None:
    """Guard a method of one object, until ``release``; None where its class has no such method.

    Of several guards that call something ``instead`` of the method, the last one does.
    """
    owner = _owner(thing, name)
    if owner is None:
        return None
    made = Guard(weakref.ref(thing), owner, name, around, instead)
    with _LOCK:
        held = _GUARDS.setdefault((owner, name), [])
        held[:] = [other for other in held if other.of() is not None]
        held.append(made)
        if (owner, name) not in _REPLACED:
            real = vars(owner)[name]
            _REPLACED[owner, name] = _Replaced(real, _asking(owner, name, real))
            setattr(owner, name, _REPLACED[owner, name].ours)
    return made


def unguarded(thing: Any, name: str) -> Callable[..., Any]:
    """The method of an object that guards stand before."""
    owner = _owner(thing, name)
    if owner is None:
        raise AttributeError(f"{type(thing).__name__} has no method {name!r}")
    replaced = _REPLACED.get((owner, name))
    method: Callable[..., Any] = (vars(owner)[name] if replaced is None else replaced.real).__get__(thing)
    return method


def _owner(thing: Any, name: str) -> type | None:
    return next((kind for kind in type(thing).__mro__ if name in vars(kind)), None)


def release(made: Guard | None) -> None:
    """End a guard; the class gets its own method back with the last one. Doing so twice is doing so once."""
    if made is None or made not in _GUARDS.get((made.owner, made.name), ()):
        return
    key = made.owner, made.name
    with _LOCK:
        held = _GUARDS.get(key, [])
        held[:] = [other for other in held if other is not made and other.of() is not None]
        replaced = _REPLACED.get(key)
        if held or replaced is None:
            return
        if vars(made.owner).get(made.name) is replaced.ours:  # not what somebody else has put over it since
            setattr(made.owner, made.name, replaced.real)
        del _REPLACED[key]
        _GUARDS.pop(key, None)


def _asking(owner: type, name: str, real: Any) -> Any:
    @functools.wraps(real)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            instead = None
            for made in _of(self, owner, name):
                stack.enter_context(made.around(args, kwargs))
                instead = made.instead or instead
            return real(self, *args, **kwargs) if instead is None else instead(*args, **kwargs)

    return method


def _of(thing: Any, owner: type, name: str) -> Iterator[Guard]:
    return (made for made in list(_GUARDS.get((owner, name), ())) if made.of() is thing)
