"""Gradients inside a block: off unless asked for, and one clear line where they are missed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from headscope.interp.errors import HeadscopeError
from headscope.interp.sites.given import ModelLike
from headscope.interp.sites.unwrap import bare_model

Method = TypeVar("Method", bound=Callable[..., Any])
_OFF = "gradients are off inside this block: pass grad=True to every trace and apply around the backward pass"
_NONE = (
    "this value carries no gradient although grad=True: it came from a pass that ran without them (as lm(texts) does: "
    "call lm.model(**lm.encode(texts))), or nothing that it depends on requires one"
)


def without_gradients(method: Method) -> Method:
    """``torch.no_grad``, which takes as long to enter as an operation, where gradients are not off already."""
    quiet = torch.no_grad()(method)

    @wraps(method)
    def called(*args: Any) -> Any:
        return quiet(*args) if torch.is_grad_enabled() else method(*args)

    return cast(Method, called)


class _Mode:
    """torch's gradient mode, switched until ``leave``. Blocks may end in any order: what the first to begin found comes
    back when the last has ended."""

    entered = threading.local()

    def __init__(self, on: bool) -> None:
        self.modes: list[_Mode] = self.entered.__dict__.setdefault("modes", [])
        self.before = torch.is_grad_enabled()
        self.modes.append(self)
        torch.set_grad_enabled(on)

    def leave(self) -> None:
        later = self.modes[self.modes.index(self) + 1 :]
        self.modes.remove(self)
        if later:
            later[0].before = self.before
        else:
            torch.set_grad_enabled(self.before)


@contextmanager
def gradients(model: ModelLike, *, on: bool) -> Iterator[None]:
    """Forward passes inside the block keep what a backward pass needs (``on``), or nothing.

    Raises:
        HeadscopeError: where they are on, under ``torch.inference_mode`` or with gradient checkpointing, whose second
            forward pass may come when the block has ended; where they are off, in place of torch's error in a backward
            pass.
    """
    if on:
        _refuse(model)
    mode = _Mode(on)
    try:
        yield
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise HeadscopeError(_NONE if on else _OFF) from error
    finally:
        mode.leave()


@contextmanager
def frozen(model: ModelLike) -> Iterator[None]:
    """Inside the block no parameter asks for a gradient and every module evaluates (no dropout); then all is as it was,
    also after an exception."""
    inner = bare_model(model)
    asked, trained = [p for p in inner.parameters() if p.requires_grad], [m for m in inner.modules() if m.training]
    try:
        for p in asked:
            p.requires_grad_(False)
        for part in trained:
            part.training = False
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)
        for part in trained:
            part.training = True


def _refuse(model: ModelLike) -> None:
    if (getattr(bare_model(model), "_tp_size", None) or 1) > 1:
        raise HeadscopeError(
            "gradients of a model under tensor parallelism (tp_size) are not taken: load it on one process, with "
            "device_map='auto' if it is large, for grad=True"
        )
    if hasattr(bare_model(model).forward, "headscope_shared"):
        raise HeadscopeError("gradients are not taken inside context_parallel: leave that block first for grad=True")
    if torch.is_inference_mode_enabled():
        raise HeadscopeError("grad=True does nothing under torch.inference_mode(); leave that block first")
    if any(part.training and getattr(part, "gradient_checkpointing", False) for part in bare_model(model).modules()):
        raise HeadscopeError(
            "gradient checkpointing runs layers again in the backward pass, which may come after the block; call "
            "model.gradient_checkpointing_disable() or model.eval() before grad=True"
        )
