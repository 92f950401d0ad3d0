"""What the libraries raise while a model is loaded, as one line that says what to do."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError
from transformers.utils import logging

from headscope.interp.errors import HeadscopeError
from headscope.interp.models.available import known_names
from headscope.interp.models.options import NEEDS_BITSANDBYTES


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No "Loading weights" bars in logs: transformers draws them only where someone is looking."""
    was = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if was:
            logging.enable_progress_bar()


@contextlib.contextmanager
def explained(name: str, let_pass: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn what the libraries raise into one line; exceptions of the types ``let_pass`` stay what they are."""
    try:
        yield
    except Exception as error:  # of transformers, safetensors, tokenizers and the HTTP client: no common base
        if isinstance(error, (HeadscopeError, *let_pass)):
            raise
        raise HeadscopeError(_explain(name, error)) from error


def _explain(name: str, error: BaseException) -> str:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__

    text = " ".join(str(error).split())
    hub = _explain_hub(name, tuple(chain))
    if hub is not None:
        return hub
    if isinstance(error, SafetensorError):
        return f"the weights of {name} cannot be read ({text[:120]}): the file is damaged: remove it and load again"
    if isinstance(error, ImportError) and "bitsandbytes" in text:
        return f"{name} is quantized: it {NEEDS_BITSANDBYTES}"
    if "trust_remote_code" in text:
        return f"{name} needs its own code: read it, then pass trust_remote_code=True if you trust it"
    if "safetensors" in text and isinstance(error, OSError):
        return f"{name} has no safetensors weights (headscope reads no pickles): save it with save_pretrained first"
    return f"cannot load {name} ({text[:240] or type(error).__name__}): fix that and retry"


def _explain_hub(name: str, chain: tuple[BaseException, ...]) -> str | None:
    def has(*types: type[BaseException]) -> bool:
        return any(isinstance(one, types) for one in chain)

    if has(hub_errors.GatedRepoError):
        return f"{name} is gated on the hub: accept its terms there and log in (hf auth login)"
    if has(hub_errors.RepositoryNotFoundError):
        return f"unknown model {name!r}: known names are {known_names()}; or give a hub id, a folder or a .gguf file"
    if has(hub_errors.RevisionNotFoundError):
        return f"{name} has no such revision on the hub: check revision="
    if has(hub_errors.RemoteEntryNotFoundError):
        return f"{name} on the hub has no config.json, so it is not a transformers model: choose another repository"
    unreachable = (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, ConnectionError, TimeoutError)
    if has(*unreachable) or any(type(one).__module__.startswith("httpx") for one in chain):
        return (
            f"{name!r} is not wholly on this machine and the hub cannot be reached: connect and retry, or take a known "
            f"name ({known_names()}), a folder or a .gguf file"
        )
    return None
